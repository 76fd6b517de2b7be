"""Settings of all tests: how long a property's example takes says nothing on a loaded machine."""

import importlib.util

if importlib.util.find_spec("hypothesis") is not None:  # not in the environment of tests/inside_vllm
    from hypothesis import HealthCheck, settings

    settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("penstock")
