"""Settings of all tests: how long a property's example takes says nothing on a loaded machine, and processes that tests
start are interrupted by SIGINT even where the tests themselves run with it ignored (`nohup make test &`). What they
remember of checkpoints does not go into the cache of the user who runs them."""

import atexit
import importlib.util
import os
import shutil
import signal
import tempfile

if "PENSTOCK_TESTS_CACHE" not in os.environ:  # not in a child of the tests
    os.environ["PENSTOCK_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="penstock-tests-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what is ignored here would be ignored in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis") is not None:  # not in the environment of tests/inside_vllm
    from hypothesis import HealthCheck, settings

    settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("penstock")
