"""Settings of all tests: how long a property's example takes says nothing on a loaded machine, and processes that tests
start are interrupted by SIGINT even where the tests themselves run with it ignored (`nohup make test &`)."""

import importlib.util
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what is ignored here would be ignored in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis") is not None:  # not in the environment of tests/inside_vllm
    from hypothesis import HealthCheck, settings

    settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("penstock")
