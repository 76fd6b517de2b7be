"""cluster.toml: a whole cluster as a list of processes, each a `penstock` command with its flags."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.core.config import ConfigError, check_range
from penstock.toml_file import read_toml

Kind = Literal["pool", "router", "engine"]
ENGINES_MAX = 4096
ENGINE_KINDS = ("penstock", "vllm")
DEFAULT_SECRET = "secret"  # noqa: S105 (the name of a file)
NODE_IP = "{node_ip}"  # in a value: replaced by the address of the host on which the process runs

# The lines with which processes report where they listen; others connect to the last group.
READY: dict[Kind, str] = {
    "pool": r"pool node .* ready on ([\w.\-\[\]:]+:\d+):",
    "router": r"listening on (http://[\w.\-\[\]:]+:\d+), engines on ([\w.\-\[\]:]+:\d+)",
    "engine": r"engine .* listening on (http://[\w.\-\[\]:]+:\d+)",
}


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process. `flags` of its command; a list repeats the flag. `listen_flag`: the flag in which port 0 is replaced
    by the real port after the first start, so that the process restarts at the same address. `ray`: options of its
    actor. `rest`: words that follow the flags. `python`: the interpreter that runs it; empty for this process's."""

    name: str
    kind: Kind
    arguments: tuple[str, ...]
    flags: Mapping[str, Any]
    listen_flag: str | None = None
    ray: Mapping[str, Any] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    python: str = ""

    def command(self, addresses: Mapping[str, list[str]]) -> list[str]:
        """The command line behind `penstock`; `addresses` of pools and of the router by flag name."""
        words = list(self.arguments)
        flags: dict[str, Any] = {**{k: v for k, v in addresses.items() if self.kind == "engine"}, **self.flags}
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            for one in value if isinstance(value, list) else [value]:
                if one is True:
                    words.append(flag)
                elif one is not False:
                    words += [flag, str(one)]
        return [*words, *self.rest]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: list[dict[str, Any]]
    model: str = ""
    secret_file: str | None = None
    peer_tls_cert: str | None = None
    peer_tls_key: str | None = None
    peer_tls_ca: str | None = None
    pool: list[dict[str, Any]] = []
    router: dict[str, Any] = {}
    serve: dict[str, Any] = {}
    fabric: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`processes` in start order. `secret_file` is None when certificates are used without a secret. `fabric`: the
    table that `penstock fabric` reads."""

    file: Path
    secret_file: Path | None
    processes: tuple[ProcessSpec, ...]
    fabric: Mapping[str, Any]

    def of(self, kind: Kind) -> list[ProcessSpec]:
        """The processes of one kind, in start order."""
        return [process for process in self.processes if process.kind == kind]


def read_cluster_config(file: Path) -> ClusterConfig:
    """The cluster that a TOML file describes. Relative paths in it start at its folder. Raises ConfigError: one line
    with file, place and what is allowed."""
    found = read_toml(file)
    try:
        raw = msgspec.convert({_name(key): value for key, value in found.items()}, _File)
        return _cluster(raw, file)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _cluster(raw: _File, file: Path) -> ClusterConfig:
    proof = _proof(raw, file.parent)
    model = _model(raw.model, file.parent)
    processes = [_pool(one, number, proof, file.parent) for number, one in enumerate(raw.pool)]
    processes.append(_router(raw.router, model, proof))
    for number, one in enumerate(raw.engine):
        processes += _engines(one, number, raw.serve, model, proof, file.parent)
    engines = [process for process in processes if process.kind == "engine"]
    if not engines:
        raise ConfigError("the cluster has no [[engine]]; allowed: at least one")
    if len(engines) > ENGINES_MAX:
        raise ConfigError(f"the cluster has {len(engines)} engines; allowed: at most {ENGINES_MAX}")
    roles = {str(process.flags.get("role", "mixed")) for process in engines}
    if roles in ({"prefill"}, {"decode"}):
        raise ConfigError(f"all engines have the role {roles.pop()}; allowed: prefill and decode, or mixed")
    names = [process.name for process in processes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two processes are named {name!r}; allowed: each name once")
    return ClusterConfig(file, proof.get("secret_file"), tuple(processes), raw.fabric)


def _proof(raw: _File, folder: Path) -> dict[str, Path]:
    """The flags with which all processes authenticate each other: certificates, a secret, or both. Raises
    ConfigError."""
    tls = {"peer_tls_cert": raw.peer_tls_cert, "peer_tls_key": raw.peer_tls_key, "peer_tls_ca": raw.peer_tls_ca}
    proof = {name: folder / given for name, given in tls.items() if given}
    if proof and len(proof) < len(tls):
        missing = next(name for name in tls if name not in proof)
        raise ConfigError(f"{next(iter(proof))} is given without {missing}; allowed: all of {', '.join(tls)}, or none")
    if raw.secret_file or not proof:
        proof["secret_file"] = folder / (raw.secret_file or DEFAULT_SECRET)
    return proof


def _model(given: str, folder: Path) -> tuple[str, ...]:
    """A folder relative to the file, or a hub id."""
    if not given:
        return ()
    return (str(folder / given),) if (folder / given).is_dir() else (given,)


def _pool(raw: dict[str, Any], number: int, proof: Mapping[str, Path], folder: Path) -> ProcessSpec:
    from penstock.pool.setup.pool_command import pool

    given, ray = _split(raw)
    given.setdefault("name", f"pool-{number}")
    given.setdefault("listen", "127.0.0.1:0")
    for key in ("config", "state"):
        if key in given:
            given[key] = str(folder / str(given[key]))
    _check_flags(f"[[pool]] {given['name']}", given, pool, {"context"})
    return ProcessSpec(given["name"], "pool", ("pool",), {**proof, **given}, "listen", ray)


def _router(raw: dict[str, Any], model: tuple[str, ...], proof: Mapping[str, Path]) -> ProcessSpec:
    from penstock.cluster.router.router_command import router

    given, ray = _split(raw)
    given.setdefault("cluster_listen", "127.0.0.1:0")
    _check_flags("[router]", given, router, set())
    return ProcessSpec("router", "router", ("router", *model), {**proof, **given}, "cluster_listen", ray)


def _engines(
    raw: dict[str, Any],
    number: int,
    common: dict[str, Any],
    model: tuple[str, ...],
    proof: Mapping[str, Path],
    folder: Path,
) -> list[ProcessSpec]:
    place = f"[[engine]] {number + 1}"
    kind = raw.get("engine", "penstock")
    if kind not in ENGINE_KINDS:
        raise ConfigError(f"{place}: engine is {kind!r}; allowed: {', '.join(ENGINE_KINDS)}")
    given, ray = _split({**common, **raw} if kind == "penstock" else raw)
    given.pop("engine", None)
    python = given.pop("python", "")
    if not isinstance(python, str) or (python and not Path(python).is_absolute()):
        raise ConfigError(f"{place}: python is {python!r}; allowed: the absolute path of an interpreter")
    count = given.pop("count", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise ConfigError(f"{place}: count is {count!r}; allowed: a number")
    check_range(f"{place}: count", count, 1, ENGINES_MAX)
    role = given.setdefault("role", "mixed")
    base = str(given.pop("name", f"{role}-{number}"))
    arguments: tuple[str, ...] = ("serve", *model)
    rest: tuple[str, ...] = ()
    if kind == "vllm":
        arguments, rest = _vllm_words(place, given, model)
    else:
        from penstock.cluster.engine.serve_command import serve

        _check_flags(place, given, serve, {"model", "router", "engine_name"})
    if "pool_key_file" in given:
        given["pool_key_file"] = str(folder / str(given["pool_key_file"]))
    names = [base] if count == 1 else [f"{base}-{i}" for i in range(count)]
    return [
        ProcessSpec(name, "engine", arguments, {**proof, "engine_name": name, **given}, None, ray, rest, python)
        for name in names
    ]


def _vllm_words(place: str, given: dict[str, Any], model: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words before and after the flags of an engine that is vLLM. Takes `vllm` out of the flags; raises
    ConfigError."""
    from penstock.cluster.vllm_agent.agent_command import vllm_engine

    rest = given.pop("vllm", [])
    if not isinstance(rest, list) or not all(isinstance(word, str) for word in rest):
        raise ConfigError(f"{place}: vllm is {rest!r}; allowed: a list of words, the flags of vllm serve")
    if not model:
        raise ConfigError(f"{place}: engine is 'vllm' in a cluster without model; allowed: with model only")
    _check_flags(place, given, vllm_engine, {"context", "router", "engine_name"})
    return ("vllm-engine", *model), tuple(rest)


def _split(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a table into flags and options for Ray."""
    given = {_name(key): value for key, value in raw.items()}
    ray = given.pop("ray", {})
    if not isinstance(ray, dict):
        raise ConfigError(f"ray is {ray!r}; allowed: a table of options of an actor")
    return given, ray


def _check_flags(place: str, given: Iterable[str], command: Any, refused: set[str]) -> None:
    allowed = set(inspect.signature(command).parameters) - refused
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{place}: {name!r} is not known; allowed: {', '.join(sorted(allowed))}")


def _name(key: str) -> str:
    return key.replace("-", "_")
