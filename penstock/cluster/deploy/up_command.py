"""`penstock up`: starts a whole cluster from one file, as processes of this host or on a Ray cluster."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.command_line import refuse
from penstock.private_file import make_private

FAILED = 1


def up(
    config: Annotated[
        Path,
        typer.Argument(help="The cluster, as TOML (keys: docs/how-to/run-a-cluster.md).", metavar="CLUSTER.TOML"),
    ],
    on: Annotated[str, typer.Option(help="local: processes of this machine; ray: actors of a Ray cluster.")] = "local",
    ray_address: Annotated[
        str, typer.Option(help="Ray cluster to use; auto: the one that this machine belongs to.")
    ] = "auto",
    ready_s: Annotated[float, typer.Option(help="How long everything may take to get ready.")] = 300.0,
) -> None:
    """Start a whole cluster, start again what dies, and end it in order on SIGTERM or SIGINT."""
    from penstock.cluster.deploy.cluster_config import read_cluster_config
    from penstock.core.config import ConfigError, check_range
    from penstock.process.supervised import StartFailed

    try:
        if on not in ("local", "ray"):
            raise ConfigError(f"on is {on!r}; allowed: local, ray")
        check_range("ready_s", ready_s, 1, 86400)
        cluster = read_cluster_config(config)
        if cluster.secret_file is not None:
            _make_secret(cluster.secret_file)
        supervisor = _supervisor(cluster, on, ray_address)
    except (ValueError, OSError) as error:
        refuse("penstock up", error)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stopping.set())
    try:
        supervisor.start(ready_s)
        if not supervisor.stopping.is_set():
            print(f"penstock: cluster of {config} is up: {supervisor.url}", flush=True)
        supervisor.run()
    except StartFailed as error:
        refuse("penstock up", error, FAILED)
    finally:
        supervisor.stop()


def _supervisor(cluster: Any, on: str, ray_address: str) -> Any:
    """Raises ValueError or OSError."""
    printer = _Printer()
    if on == "ray":
        from penstock.cluster.deploy.on_ray import RaySupervisor

        return RaySupervisor(cluster.processes, printer, ray_address)
    from penstock.cluster.deploy.supervisor import Supervisor

    return Supervisor(cluster.processes, printer)


class _Printer:
    """Prints whole lines of several processes, with their names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, name: str, line: str) -> None:
        with self._lock:
            print(f"{name} | {line}", file=sys.stderr, flush=True)


def _make_secret(path: Path) -> None:
    """Create a secret for this cluster, if there is none."""
    try:
        handle = make_private(path)
    except FileExistsError:
        return
    with open(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
