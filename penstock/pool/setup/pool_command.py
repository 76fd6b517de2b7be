"""`penstock pool`: serves memory and SSDs of this machine as a pool node, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from penstock.command_line import one_line, refuse, with_flags
from penstock.core.settings import setting, settings_of
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL
from penstock.pool.setup.check_command import check
from penstock.pool.setup.config import NodeSettings
from penstock.pool.setup.reset_command import reset
from penstock.pool.setup.stat_command import stat
from penstock.process.log_lines import log_to_stderr
from penstock.units import format_address, format_bytes, parse_address, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from penstock.pool.net.node import PoolNode
    from penstock.pool.net.one_sided_agent import OneSidedAgent
    from penstock.pool.node_backend import NodeBackend
    from penstock.pool.setup.config import MemberConfig, PoolConfig
    from penstock.pool.setup.reload import LiveConfig, ReadConfig

    Inbox = queue.SimpleQueue[Any]  # "stop", or what `asked` understands

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 15.0
SIGNAL_POLL_S = 0.5
LOG_LEVELS = ("debug", "info", "warning", "error")
FAILED_STATUS = 70
BEGIN_S_MAX = 5.0
METRICS_KEY_BYTES_MAX = 64 << 10

pool_app = typer.Typer(name="pool", invoke_without_command=True, add_completion=False)
pool_app.command()(stat)
pool_app.command()(check)
pool_app.command()(reset)


def parse_slab(text: str) -> tuple[Path, int]:
    """Path and bytes of "PATH:SIZE". Raises ValueError."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ValueError(f"slab {text!r} is not understood; allowed is PATH:SIZE, for example /data/kv.slab:100GiB")
    return Path(path), parse_bytes(size)


@dataclass(frozen=True, kw_only=True)
class NodeFlags(NodeSettings):
    """A node's settings, and the members that can be given without a file."""

    memory: tuple[int, ...] = setting(
        (), "A memory member of this SIZE, such as 2GiB; may be repeated.", parse=parse_bytes, shown=""
    )
    slab: tuple[tuple[Path, int], ...] = setting(
        (),
        "A slab member PATH:SIZE on a file or block device, such as /data/kv.slab:100GiB. Its blocks survive a "
        "restart. May be repeated.",
        parse=parse_slab,
        shown="",
    )
    weight: tuple[float, ...] = setting(
        (), "Share of new blocks per member, memory first, then slabs; measured when not given.", shown=""
    )


PANELS = {
    "": (
        *("listen", "memory", "slab", "weight", "processes", "state", "name", "pace", "staging", "connections"),
        *("connections_per_address", "replicate", "rdma", "rdma_transport", "rdma_device"),
        *("metrics_listen", "metrics_key_file", "secret_file"),
    ),
    TLS_PANEL: TLS_NAMES,
}


@pool_app.callback()
@with_flags(NodeFlags, PANELS)
def pool(
    context: typer.Context,
    *,
    config: Annotated[
        Path | None, typer.Option(help="TOML file that describes the pool; read again on SIGHUP.", metavar="FILE")
    ] = None,
    given: Mapping[str, Any],
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a pool of memory and SSDs to engines on this and other machines; or inspect one."""
    if context.invoked_subcommand is not None:
        return
    from penstock.pool.api import PoolError
    from penstock.pool.setup.split import process_count
    from penstock.process.supervised import StartFailed

    try:
        if log_level not in LOG_LEVELS:
            raise ValueError(f"log-level is {log_level!r}; allowed is one of {', '.join(LOG_LEVELS)}")
        log_to_stderr(log_level.upper())
        read = partial(_config, config, given)
        found = read()
        if (count := process_count(found)) > 1:
            from penstock.pool.setup.node_processes import serve_processes

            serve_processes(found, count, read, log_level.upper())
        else:
            _serve(found, read)
    except (ValueError, OSError, PoolError, StartFailed) as error:
        refuse("penstock pool", error)


def _config(
    file: Path | None, flags: Mapping[str, Any], running: Sequence[MemberConfig] = (), reserved: Collection[str] = ()
) -> PoolConfig:
    """The pool of the file or of the flags; flags override the file."""
    from penstock.pool.setup.config import config_of_flags
    from penstock.pool.setup.config_file import read_pool_config

    members = {name: flags[name] for name in ("memory", "slab", "weight") if flags.get(name)}
    given = {
        one.field.name: one.read_all(flags[name]) for name, one in settings_of(NodeSettings).items() if name in flags
    }
    for name in ("listen", "metrics_listen"):
        if given.get(name) is not None:
            parse_address(given[name])
    if file is not None:
        if members:
            raise ValueError(f"--config is given together with --{next(iter(members))}; allowed: one or the other")
        return replace(read_pool_config(file, running, reserved), **given)
    sizes = [parse_bytes(text) for text in members.get("memory", ())]
    slabs = [parse_slab(text) for text in members.get("slab", ())]
    if not sizes and not slabs:
        raise ValueError("the pool has no member; give --config FILE, --memory SIZE or --slab PATH:SIZE")
    return config_of_flags(sizes, slabs, members.get("weight"), **given)


def _serve(config: PoolConfig, read: ReadConfig) -> None:
    inbox: Inbox = queue.SimpleQueue()
    if config.file is not None:  # already here: opening large members takes time, and SIGHUP would end the process
        signal.signal(signal.SIGHUP, lambda *_: inbox.put("reload"))
    serve_node(config, inbox, read, lambda live, _: _reload(live))


@contextlib.contextmanager
def _ended_by_its_threads() -> Iterator[None]:
    """A thread that fails ends the process; when the node is closed, no longer: others may use the process then."""
    before, threading.excepthook = threading.excepthook, _thread_failed
    try:
        yield
    finally:
        threading.excepthook = before


@_ended_by_its_threads()
def serve_node(
    config: PoolConfig,
    inbox: Inbox,
    read: ReadConfig,
    asked: Callable[[LiveConfig, Any], None],
    siblings: Sequence[int] = (),
) -> None:
    """Serve a pool until `inbox` says "stop", or a signal does. `asked` gets all else that `inbox` says, and the
    configuration, which `read` reads again. `siblings`: ports of the node's other processes. Raises ValueError, OSError
    or PoolError with one line."""
    from penstock.pool.net.node import PoolNode
    from penstock.pool.net.secret import Secret
    from penstock.pool.net.tls import PeerTls
    from penstock.pool.setup.open import open_pool
    from penstock.process.file_limit import raise_file_limit
    from penstock.process.startup_objects import freeze_startup_objects

    raise_file_limit()
    served = open_pool(config, serves=True)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: inbox.put("stop"))
        host, port = parse_address(config.listen)
        secret = Secret.read(config.secret_file) if config.secret_file else None
        pace, staging = config.pace_bytes_per_s, config.staging_bytes
        limits, tls = (config.connections, config.connections_per_address), PeerTls.of(config)
        one_sided = _one_sided(config)
        node = PoolNode(served, host, port, config.name, pace, staging, secret, *limits, tls, one_sided, siblings)
        try:
            members = ", ".join(
                f"{m.name} ({m.kind}, {format_bytes(m.capacity_bytes)}, {m.blocks} blocks)"
                for m in served.stat(1.0).members
            )
            with _metrics_of(config, served, node):
                print(f"pool node {config.name} ready on {format_address(*node.address)}: {members}", flush=True)
                freeze_startup_objects()
                _wait(_live(config, served, read), node, inbox, asked)
        finally:
            node.close(CLOSE_TIMEOUT_S)
    finally:
        served.close(CLOSE_TIMEOUT_S)


def _one_sided(config: PoolConfig) -> OneSidedAgent | None:
    """The agent for one-sided reads, where the configuration asks for it. Raises ConfigError."""
    if not config.rdma:
        return None
    from penstock.pool.net.open_agent import open_agent

    agent = open_agent(config.rdma_transport, config.rdma_device)
    if agent.transport == "shared memory":
        log.warning("rdma is asked for, and this host has no RDMA device: only clients of this host use it")
    if config.peer_tls_cert is not None:
        log.warning("blocks that clients read or write one-sided are not encrypted: TLS covers messages only")
    return agent


@contextlib.contextmanager
def _metrics_of(config: PoolConfig, served: NodeBackend, node: PoolNode) -> Iterator[None]:
    """Serves `/metrics` and `/health` while the node is served, where the config says so."""
    if config.metrics_listen is None:
        yield
        return
    from penstock.pool.setup.node_metrics import node_metrics
    from penstock.private_file import read_private
    from penstock.process.metrics_port import MetricsPort

    key = None
    if config.metrics_key_file is not None:
        key = read_private(config.metrics_key_file, METRICS_KEY_BYTES_MAX).strip()
        if not key:
            raise ValueError("metrics_key_file is empty; allowed: a key of at least one character")
    host, port = parse_address(config.metrics_listen)
    serving = MetricsPort(host, port, partial(node_metrics, node, served), partial(_ailing, node), key)
    try:
        print(f"metrics of pool node {config.name} on {format_address(*serving.address)}", flush=True)
        if key is None and not serving.loopback:
            log.warning("whoever reaches %s can read the metrics; --metrics-key-file asks for a key",
                        format_address(*serving.address))  # fmt: skip
        yield
    finally:
        serving.close()


def _ailing(node: PoolNode) -> str | None:
    """Why the node does not serve everybody; None while it does."""
    if not node.alive:
        return "a thread that every client needs has ended"
    if node.beginning_s > BEGIN_S_MAX:
        return f"a connection could not be started within {BEGIN_S_MAX:g} s: out of memory or threads"
    return None


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """End the node when one of its threads has failed: otherwise requests would wait for their deadlines. Blocks in
    memory are lost; blocks on SSDs are as after a crash."""
    name = failed.thread.name if failed.thread is not None else "a thread"
    with contextlib.suppress(Exception):
        traceback.print_exception(failed.exc_value)
    _end_now(f"{name} failed: {failed.exc_value!r}")


def _end_now(why: str) -> NoReturn:
    """End the process at once: a wait might need memory that is not available."""
    with contextlib.suppress(Exception):
        print(f"penstock pool: {why}; the node ends", file=sys.stderr, flush=True)
    os._exit(FAILED_STATUS)


def _live(config: PoolConfig, served: NodeBackend, read: ReadConfig) -> LiveConfig:
    from penstock.pool.local.local_pool import LocalPool
    from penstock.pool.setup.reload import LiveConfig
    from penstock.pool.union.union_pool import UnionPool

    local = served.own
    assert local is None or isinstance(local, LocalPool)
    return LiveConfig(config, local, served if isinstance(served, UnionPool) else None, read)


def _wait(live: LiveConfig, node: PoolNode, inbox: Inbox, asked: Callable[[LiveConfig, Any], None]) -> None:
    """Serve until a signal says stop."""
    while (what := _asked(inbox, node)) != "stop":
        asked(live, what)


def _reload(live: LiveConfig) -> None:
    """A file that cannot be applied changes nothing."""
    from penstock.pool.api import PoolError

    try:
        changes = ", ".join(live.reload()) or "nothing changed"
    except (ValueError, OSError, PoolError) as error:
        log.error("%s; the pool is unchanged", one_line(error))
    else:
        print(f"pool node {live.config.name} reloaded: {changes}", flush=True)


def _asked(inbox: Inbox, node: PoolNode) -> Any:
    """Wait for the next request by a signal. The system may deliver a signal to another thread (as it does right after
    SIGCONT), and Python handles it only when this thread runs: so this thread wakes up from time to time."""
    while True:
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=SIGNAL_POLL_S)
        if (why := _ailing(node)) is not None:
            _end_now(why)
