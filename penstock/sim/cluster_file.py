"""One simulation as a TOML file: an engine or a cluster, timed faults, a workload, policies, a seed.

Bandwidths are bytes/s, sizes bytes. A wrong value is refused in one line that names its field.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.core.config import MODES, POLICIES, ConfigError, SchedulerConfig, check_range
from penstock.core.windows import FETCH_WINDOW_BYTES, FORMER_WINDOW, windows_of
from penstock.engine.profile import Profile, load_profile
from penstock.sim.cluster_shape import SYSTEMS, ClusterShape, System
from penstock.sim.engine_driver import PCIE
from penstock.sim.prefill_decode import Fault
from penstock.sim.served_model import Gpu, ServedModel, load_model
from penstock.workloads.generators import AGENT_TABLES, CALVO_DATASETS

DERIVED = ("block_bytes", "l1_pages", "l2_slots", "fetch_window_blocks")  # computed from the model and from sizes
HIGH = 1e15
Sharing = Literal["in order", "fair"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; unknown names are refused."""


class Device(_Table, frozen=True):
    """A memory or SSD of the pool; reading it also crosses the links `over`."""

    name: str
    bytes_per_s: float
    over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range(f"bytes_per_s of device {self.name}", self.bytes_per_s, 1, HIGH)


class LinkFault(_Table, frozen=True):
    """From `at_s` on, for `lasts_s`, a link or device runs at `factor` of its speed; with `loses`, its running
    transfers are lost."""

    at_s: float
    link: str
    lasts_s: float
    factor: float = 0.0
    loses: bool = False

    def __post_init__(self) -> None:
        check_range("at_s", self.at_s, 0, HIGH)
        check_range("lasts_s", self.lasts_s, 0, HIGH)
        check_range("factor", self.factor, 0, 1e3)


class EngineTable(_Table, frozen=True):
    """One engine and its pool. `scheduler` holds fields of `SchedulerConfig`; windows that it does not name follow from
    bytes (`core.windows`). Transfers share a link `in order` of their start, as on a device, or `fair`, as on a
    network."""

    profile: str
    device: tuple[Device, ...]
    weight_bytes: float
    gpu_memory_bytes: float = 80e9
    activation_bytes: float = 4e9
    host_memory_bytes: float = 128e9
    fetch_window_bytes: float = FETCH_WINDOW_BYTES
    links: dict[str, float] = {}
    scheduler: dict[str, str | int | float | bool] = {}
    sharing: Sharing = "in order"
    fault: tuple[LinkFault, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "weight_bytes", "gpu_memory_bytes", "activation_bytes", "host_memory_bytes", "fetch_window_bytes",
        ):  # fmt: skip
            check_range(name, getattr(self, name), 1, HIGH)
        for name, speed in self.links.items():
            check_range(f"links.{name}", speed, 1, HIGH)
        names = [*self.links, *(device.name for device in self.device)]
        if not self.device or len(set(names)) < len(names) or PCIE in names:
            raise ConfigError(f"device is {names}; allowed: at least one, unique names, none called {PCIE}")
        for asked in (*(link for device in self.device for link in device.over), *(f.link for f in self.fault)):
            if asked not in (*names, PCIE):
                raise ConfigError(f"link is {asked!r}; allowed: {', '.join((*names, PCIE))}")
        known = [field.name for field in fields(SchedulerConfig) if field.name not in DERIVED]
        for name in self.scheduler:
            if name not in known:
                allowed = "fetch_window_bytes of engine" if name == FORMER_WINDOW else ", ".join(known)
                raise ConfigError(f"scheduler.{name} is not a setting; allowed: {allowed}")
        for name, words in (("policy", POLICIES), ("mode", MODES)):
            if self.scheduler.get(name, words[0]) not in words:
                raise ConfigError(f"scheduler.{name} is {self.scheduler[name]!r}; allowed: {', '.join(words)}")
        self.config()

    @property
    def model(self) -> Profile:
        """The compute profile that `profile` names."""
        return load_profile(self.profile)

    def config(self) -> SchedulerConfig:
        """The scheduler core's configuration. Raises ConfigError, also if the model does not fit into GPU memory."""
        block_tokens = self.scheduler.get("block_tokens", 64)
        if not isinstance(block_tokens, int) or block_tokens < 1:
            raise ConfigError(f"scheduler.block_tokens is {block_tokens!r}; allowed: a whole number above 0")
        block_bytes = block_tokens * self.model.layers * self.model.layer_bytes_per_token
        room = self.gpu_memory_bytes - self.weight_bytes - self.activation_bytes
        if room < block_bytes:
            need = self.weight_bytes + self.activation_bytes + block_bytes
            raise ConfigError(
                f"gpu_memory_bytes is {self.gpu_memory_bytes:g}; allowed: at least {need:g}, for weights, activations "
                "and one block"
            )
        l2_slots = int(self.host_memory_bytes / block_bytes)
        given: dict[str, Any] = asdict(windows_of(int(self.fetch_window_bytes), block_bytes, l2_slots)) | self.scheduler
        given |= {
            "block_tokens": block_tokens, "block_bytes": block_bytes, "l1_pages": int(room / block_bytes),
            "l2_slots": l2_slots,
        }  # fmt: skip
        return msgspec.convert(given, SchedulerConfig)


class Cluster(_Table, frozen=True):
    """Prefill and decode nodes; `shape` holds fields of `ClusterShape`, `system` names the policies."""

    model: str
    shape: ClusterShape
    system: str = "split"
    fault: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ConfigError(f"system is {self.system!r}; allowed: {', '.join(SYSTEMS)}")
        nodes = self.shape.prefill_nodes + self.shape.decode_nodes
        for fault in self.fault:
            check_range("fault.node", fault.node, 0, nodes - 1)
            check_range("fault.at_s", fault.at_s, 0, HIGH)
        gpus = self.shape.gpus
        for group in (self.shape.prefill_group_nodes, self.shape.decode_group_nodes):
            self.served.kv_tokens(self.shape.gpu, gpus * group)

    @property
    def served(self) -> ServedModel:
        """The model that `model` names."""
        return load_model(self.model)

    @property
    def policies(self) -> System:
        """The policies that `system` names."""
        return SYSTEMS[self.system]


class CalvoLoad(_Table, frozen=True, tag="calvo", tag_field="kind"):
    """Single requests whose contexts are in the pool."""

    dataset: str = "icl"
    rate_per_s: float = 1.0
    requests: int | None = None
    hit_ratios: tuple[float, ...] = (1.0,)
    slo_ttft_s: float = 10.0

    def __post_init__(self) -> None:
        if self.dataset not in CALVO_DATASETS:
            raise ConfigError(f"dataset is {self.dataset!r}; allowed: {', '.join(CALVO_DATASETS)}")
        check_range("rate_per_s", self.rate_per_s, 1e-6, 1e9)
        check_range("requests", 1 if self.requests is None else self.requests, 1, 1e6)
        for ratio in self.hit_ratios or (-1.0,):
            check_range("hit_ratios", ratio, 0, 1)


class AgentLoad(_Table, frozen=True, tag="agents", tag_field="kind"):
    """DualPath's agents, all started at once or at a rate."""

    length: str = "32K"
    agents: int = 8
    rate_per_s: float | None = None
    token_divisor: int = 1
    turns_max: int | None = None
    slo_ttft_s: float = 10.0

    def __post_init__(self) -> None:
        if self.length not in AGENT_TABLES:
            raise ConfigError(f"length is {self.length!r}; allowed: {', '.join(AGENT_TABLES)}")
        for name, high in (("agents", 1e6), ("token_divisor", 1e4), ("rate_per_s", 1e6), ("turns_max", 1e6)):
            value = getattr(self, name)
            check_range(name, 1 if value is None else value, 1e-6 if name == "rate_per_s" else 1, high)


class TraceLoad(_Table, frozen=True, tag="trace", tag_field="kind"):
    """Recorded sessions or requests; `path` is relative to the file's folder."""

    path: str
    token_divisor: int = 1
    requests_max: int | None = None
    context_tokens_max: int = 65_536
    think_s_max: float = 5.0
    rate_per_s: float | None = None
    slo_ttft_s: float = 10.0

    def __post_init__(self) -> None:
        check_range("token_divisor", self.token_divisor, 1, 1e6)
        check_range("context_tokens_max", self.context_tokens_max, 1, 1e9)
        check_range("think_s_max", self.think_s_max, 0, 1e9)
        check_range("rate_per_s", 1 if self.rate_per_s is None else self.rate_per_s, 1e-6, 1e6)
        check_range("requests_max", 1 if self.requests_max is None else self.requests_max, 1, 1e6)


Workload = CalvoLoad | AgentLoad | TraceLoad


class Simulation(_Table, frozen=True):
    """The whole file: `[engine]` or `[cluster]`, and `[workload]`."""

    workload: Workload
    engine: EngineTable | None = None
    cluster: Cluster | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.engine is None) == (self.cluster is None):
            raise ConfigError("engine and cluster: exactly one of the tables [engine] and [cluster] is allowed")
        if self.cluster is not None:
            _fits_cluster(self.workload)
        check_range("seed", self.seed, 0, 2**31)

    def seeded(self, seed: int) -> Simulation:
        """The same with another seed."""
        return msgspec.structs.replace(self, seed=seed)


def _fits_cluster(workload: Workload) -> None:
    """A cluster accepts only whole recorded or generated sessions."""
    if isinstance(workload, CalvoLoad):
        raise ConfigError("workload.kind is 'calvo'; allowed with [cluster]: agents, trace")
    if workload.token_divisor != 1:
        raise ConfigError(f"workload.token_divisor is {workload.token_divisor}; allowed with [cluster]: 1")
    if isinstance(workload, TraceLoad) and workload.requests_max is not None:
        raise ConfigError(f"workload.requests_max is {workload.requests_max}; allowed with [cluster]: none")


def read_simulation(path: Path) -> Simulation:
    """Read a simulation from its file. Raises ConfigError with one line: the file, the field, the allowed values."""
    try:
        data = tomllib.loads(path.read_bytes().decode())
        _refuse_unknown(data)
        return msgspec.convert(data, Simulation)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _refuse_unknown(data: dict[str, Any]) -> None:
    """Refuses unknown names in dataclasses inside the file, which msgspec would ignore."""
    cluster = data.get("cluster")
    inside = cluster if isinstance(cluster, dict) else {}
    shape = inside.get("shape")
    _known("cluster.shape", shape, ClusterShape)
    _known("cluster.shape.gpu", shape.get("gpu") if isinstance(shape, dict) else None, Gpu)
    faults = inside.get("fault")
    for fault in faults if isinstance(faults, list) else ():
        _known("cluster.fault", fault, Fault)


def _known(where: str, given: object, kind: type) -> None:
    names = [field.name for field in fields(kind)]
    for name in given if isinstance(given, dict) else ():
        if name not in names:
            raise ConfigError(f"{where}.{name} is not a setting; allowed: {', '.join(names)}")
