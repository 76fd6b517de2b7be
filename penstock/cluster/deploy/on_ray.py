"""`penstock up --on ray`: each process of a cluster under a Ray core actor, which Ray places and starts again.

An actor restarts its process when that dies; Ray restarts an actor, if needed on another host, when the actor or its
host dies. Only command lines, addresses and output lines go through Ray, never tokens or KV.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from penstock.cluster.deploy.cluster_config import NODE_IP, ProcessSpec
from penstock.cluster.deploy.supervisor import Child
from penstock.core.config import ConfigError
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.supervised import StartFailed

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

WATCH_S = 0.5
CALL_S = 30.0
STOP_S = 20.0
PLACE_AGAIN_S = 30.0  # before an actor that could not begin
RAY_GONE_S = 300.0  # after so long without an answer, Ray counts as lost
LINES_MAX = 200  # of output of one process between two calls of `watch`


class ProcessState(NamedTuple):
    """The state of an actor's process. `given`: the addresses that it was started with. `failure`: where and why it
    never became ready; empty while it may."""

    ready: bool
    given: Mapping[str, list[str]]
    addresses: tuple[str, ...]
    pid: int
    restarts: int
    failure: str
    lines: list[str]


class ProcessActor:
    """One process, on the host that Ray chose. Ray calls all methods on one thread."""

    def __init__(self, spec: ProcessSpec, addresses: Mapping[str, list[str]]) -> None:
        self._spec = spec
        self._lines: deque[str] = deque(maxlen=LINES_MAX)
        self._child = Child(spec, lambda _, line: self._lines.append(line))
        self._node, self._given = "", addresses
        self.start(addresses)

    def start(self, addresses: Mapping[str, list[str]]) -> None:
        """Start the process, or restart it with other addresses."""
        import ray

        self._child.stop(STOP_S)
        self._given = addresses
        self._node = ray.util.get_node_ip_address()
        self._child.start_or_pause([word.replace(NODE_IP, self._node) for word in self._spec.command(addresses)])

    def watch(self) -> ProcessState:
        """Restart a dead process. Returns its state, with its output lines since the last call."""
        child = self._child
        why = child.failure
        child.watch(time.monotonic())
        if child.ready.is_set():
            child.keep_port()
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        failure = f"on {self._node} {why}" if why is not None else ""
        ready, pid = child.ready.is_set(), child.pid
        return ProcessState(ready, self._given, child.addresses, pid, child.restarts, failure, lines)

    def stop(self) -> None:
        """End the process, within STOP_S seconds."""
        self._child.stop(STOP_S)


class _Known:
    """The last known state of an actor's process."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.actor: Any = None
        self.ready = False
        self.addresses: tuple[str, ...] = ()
        self.pid = 0
        self.restarts = 0
        self.failure = ""
        self.given: Mapping[str, list[str]] | None = None
        self.place_again_s = 0.0  # not before, without an actor


class RaySupervisor:
    """As `supervisor.Supervisor`, with actors as processes. All calls, except `stopping.set()`, on one thread."""

    def __init__(self, processes: Sequence[ProcessSpec], on_line: Callable[[str, str], None], address: str) -> None:
        """Raises ConfigError with one line when there is no Ray, or no cluster at that address."""
        try:
            import ray
        except ImportError:
            raise ConfigError("on is 'ray', and Ray is not installed; allowed: pip install 'penstock[ray]'") from None
        self._ray = ray
        try:
            if not ray.is_initialized():
                with contextlib.chdir("/"):  # Ray's workers import modules from this process's folder first
                    ray.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # noqa: BLE001 (Ray raises exceptions of many types here)
            why = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"no Ray cluster at {address!r}: {why} (where it asks for a token, set RAY_AUTH_MODE=token)"
            ) from None
        self.known = {spec.name: _Known(spec) for spec in processes}
        self.stopping = threading.Event()
        self._on_line = on_line
        self._given: dict[str, list[str]] = {}

    @property
    def url(self) -> str:
        """URL of the router's API."""
        return next(one.addresses[0] for one in self.known.values() if one.spec.kind == "router")

    def start(self, ready_s: float) -> None:
        """Start pools, then the router, then all engines at once; returns when they are ready, or `stopping` is set.
        Raises StartFailed; all processes have ended then."""
        end_s = time.monotonic() + ready_s
        try:
            for kind in ("pool", "router", "engine"):
                group = [one for one in self.known.values() if one.spec.kind == kind]
                self._given = self._addresses()
                for one in group:
                    if self.stopping.is_set():
                        return
                    one.actor = self._place(one.spec)
                while not all(one.ready for one in group) and not self.stopping.is_set():
                    self._look(group)
                    failed = next((one for one in group if one.failure), None)
                    if failed is not None:
                        raise StartFailed(f"{failed.spec.name} {failed.failure}")
                    waiting = next((one.spec.name for one in group if not one.ready), None)
                    if time.monotonic() > end_s:
                        raise StartFailed(f"{waiting} was not ready within {ready_s:g} s (can Ray place it?)")
                    self.stopping.wait(0.1)
            self._given = self._addresses()
        except BaseException:
            self.stop()
            raise

    def _place(self, spec: ProcessSpec) -> Any:
        options: dict[str, Any] = {"num_cpus": 1 if spec.kind == "engine" else 0, "max_restarts": -1}
        try:
            actor = self._ray.remote(ProcessActor).options(**(options | dict(spec.ray)))
            return actor.remote(spec, self._given)
        except (ValueError, TypeError) as error:
            raise StartFailed(f"{spec.name}: ray: {' '.join(str(error).split())[:300]}") from None

    def _look(self, group: Sequence[_Known]) -> None:
        """Ask all actors for the state of their processes; actors that Ray is restarting do not answer."""
        asked = {one.actor.watch.remote(): one for one in group if one.actor is not None}
        done, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=2.0) if asked else ([], [])
        for answer in done:
            one = asked[answer]
            try:
                state = self._ray.get(answer, timeout=CALL_S)
            except self._ray.exceptions.RayError as error:
                self._lost(one, error)
                continue
            one.ready, one.pid, one.restarts, one.failure = state.ready, state.pid, state.restarts, state.failure
            one.addresses, one.given = state.addresses or one.addresses, state.given
            for line in state.lines:
                self._on_line(one.spec.name, line)

    def _lost(self, one: _Known, error: Exception) -> None:
        """An actor does not answer: Ray starts it again, unless it could not begin (a machine without Penstock)."""
        if getattr(error, "actor_init_failed", False):
            words = str(error).split("\n")
            one.failure = f"cannot be started: {next((line for line in reversed(words) if line.strip()), '')[:300]}"
            one.actor, one.place_again_s = None, time.monotonic() + PLACE_AGAIN_S
            self._on_line(one.spec.name, f"its actor {one.failure}; again in {PLACE_AGAIN_S:g} s")
        elif one.ready:
            self._on_line(one.spec.name, f"its actor is gone, Ray starts it again: {type(error).__name__}")
        one.ready = False

    def _addresses(self) -> dict[str, list[str]]:
        """The addresses that engines get: of the router and of all pools."""
        found: dict[str, list[str]] = {}
        for one in self.known.values():
            if one.addresses and one.spec.kind in ("pool", "router"):
                found.setdefault(one.spec.kind, []).append(one.addresses[-1])
        return found

    def run(self) -> None:
        """Watch until `stopping` is set: restart processes and actors, and engines whose router moved. Raises
        StartFailed when Ray does not answer any more."""
        asked_s = time.monotonic()
        while not self.stopping.wait(WATCH_S):
            try:
                self.watch()
                asked_s = time.monotonic()
            except Exception as error:  # noqa: BLE001 (of many types; Ray may answer again)
                rare.exception("watch", "the state of the actors could not be read: %r", error)
                if time.monotonic() - asked_s > RAY_GONE_S:
                    raise StartFailed(f"Ray could not be asked for {RAY_GONE_S:g} s: {error!r}") from None

    def watch(self) -> None:
        """Check all actors once; restart processes that died, or that use an address that changed, as that of an actor
        which Ray started again does."""
        for one in self.known.values():
            if one.actor is None and time.monotonic() > one.place_again_s:
                one.actor = self._place(one.spec)
        self._look(list(self.known.values()))
        self._given = self._addresses()
        for one in self.known.values():
            if one.spec.kind == "engine" and one.actor is not None and one.given not in (None, self._given):
                self._on_line(one.spec.name, "a pool or the router has moved: it begins again")
                one.ready, one.given = False, None
                one.actor.start.remote(self._given)

    def stop(self) -> None:
        """End the router first, then engines, then pools."""
        self.stopping.set()
        for kind in ("router", "engine", "pool"):
            group = [one for one in self.known.values() if one.spec.kind == kind and one.actor is not None]
            try:
                ended = [one.actor.stop.remote() for one in group]
                if ended:
                    self._ray.wait(ended, num_returns=len(ended), timeout=STOP_S + 10.0)
            except Exception as error:  # noqa: BLE001 (the others must end too)
                log.error("%s processes could not be asked to end: %r", kind, error)
            for one in group:
                try:
                    self._ray.kill(one.actor, no_restart=True)
                except Exception as error:  # noqa: BLE001 (the other actors must end too)
                    log.error("the actor of %s could not be ended: %r", one.spec.name, error)
                one.actor = None
