"""Settings of all tests: which are slow or have a server, how they are divided among processes, no deadline for a
property's example (it would depend on the machine's load), and SIGINT: the tests and their child processes end on it
even if it was ignored when the tests started (`nohup make test &`). Digests of checkpoints stay out of the
user's cache."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import serves

# Once any Ray has written a token into the home folder, `ray start` asks for it, and `ray.init` does not send it.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Files whose tests run one after another: one start of the QEMU guest runs all of its tests, and two cores can start
# only one cluster of engines within its deadline.
TOGETHER = {
    "tests/io/test_block_engines.py": "guest",
    "tests/io/test_nvme_engine.py": "guest",
    "tests/rdma/test_over_verbs.py": "guest",
    "tests/cluster/test_kill_rounds.py": "cluster",
    "tests/cluster/test_pool_out_of_memory.py": "cluster",
    "tests/cluster/test_tls_cluster.py": "cluster",
}

if "PENSTOCK_TESTS_CACHE" not in os.environ:  # not in a child of the tests
    os.environ["PENSTOCK_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="penstock-tests-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # every child would inherit the ignored signal
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis") is not None:  # not in the environment of tests/inside_vllm
    from hypothesis import HealthCheck, settings

    settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("penstock")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds of CPU; not in `make quick`")
    config.addinivalue_line("markers", "server: has a server, found by tests/serving.py; not in `make quick`")
    config.addinivalue_line("markers", "alone: measures time or memory; runs while no other test does")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that have a server. Files with slow tests start first, so that none runs alone at the end."""
    for item in items:
        if serves(item):
            item.add_marker(pytest.mark.server)
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Restores SIGINT after each test, also after one that failed and after fixtures: pytest has to end on it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return (yield)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that changes SIGINT's handler and does not restore it fails."""
    before = signal.getsignal(signal.SIGINT)
    result = yield
    after = signal.getsignal(signal.SIGINT)
    assert after == before, f"SIGINT was left to {after}"
    return result


@pytest.fixture
def folder_for_others() -> Iterator[Path]:
    """A folder that other users may enter. Pytest closes its own to them, whenever any pytest of this user starts."""
    with tempfile.TemporaryDirectory(prefix="penstock-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def _listens_only_if_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `make quick`, a test whose server was not found fails when it listens with a backlog, as all servers do."""
    if "not server" not in request.config.option.markexpr:
        return
    listen = socket.socket.listen

    def refuse(sock: socket.socket, *backlog: int) -> None:
        assert sock.family == socket.AF_UNIX or not backlog, f"a server: name what starts it in {serves.__module__}"
        listen(sock, *backlog)

    monkeypatch.setattr(socket.socket, "listen", refuse)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test failed that then passed: it failed on somebody's machine, and its cause is to be looked for."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"{report.nodeid} failed at first", "_")
        terminalreporter.write_line(report.longreprtext)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run in one process, those of some files too."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # the order of collection: files with slow tests first
    return ByFile(config, log)
