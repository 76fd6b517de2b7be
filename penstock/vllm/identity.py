"""Identifies how a vLLM computes KV, as a text: equal texts mean equal KV. What cannot be identified is refused."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.core.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Formats whose files are in the model's folder, and the files that vLLM reads: the first pattern that matches
_FORMATS: dict[str, tuple[str, ...]] = {
    "auto": ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "mistral": ("consolidated*.safetensors",),
    "npcache": ("*.bin",),
    "pt": ("*.pt",),
} | dict.fromkeys(
    ("safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "runai_streamer_sharded", "sharded_state"),
    ("*.safetensors",),
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Kinds of rotary embedding whose angles follow from position and configuration alone
_FIXED_ROPE = frozenset({"default", "linear", "yarn", "llama3", "mrope", "deepseek_yarn", "deepseek_llama_scaling"})
_WITHOUT_KV = ("ngram", "suffix", "medusa", "mlp_speculator")  # speculation methods without KV of their own
_MEDIA = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_only",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "language_model_only",
    "video_pruning_rate",
    "video_pruning_method",
)
_MODEL = ("model_impl", "model_class_overrides", "quantization_config", "disable_sliding_window")
_ADAPTERS = (
    "lora_dtype",
    "target_modules",
    "default_mm_loras",
    "enable_tower_connector_lora",
    "enable_mixed_moe_lora_format",
    "enable_moe_shared_loras",
)
_ENVIRONMENT = ("VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", "VLLM_BATCH_INVARIANT")  # same shapes, other bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADVICE = "set model_id in kv_connector_extra_config to a text that no other weights use"


def model_identity(
    config: VllmConfig, kv_cache: KVCacheConfig, layouts: Sequence[str], model_id: str, tp_independent: bool = False
) -> str:
    """A text that differs whenever the bytes of a block would mean something else: it covers the weights, what computes
    with them, and vLLM's layout of the result. `model_id`, if given, replaces the weights and the model's own code.
    With `tp_independent` it is the same for every degree of tensor parallelism. Raises ConfigError if weights or code
    cannot be identified."""
    import vllm

    from penstock.engine.checkpoint import config_identity

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    record = {
        "vllm": vllm.__version__,
        "weights": model_id or _weights(model, config.load_config),
        "code": "" if model_id else _code(model),
        "draft": _draft(config, model_id),
        "config": config_identity(model.hf_config),
        "rope": _rope(model),
        "model": _fields(model, _MODEL),
        "media": _media(model),
        "adapters": _fields(getattr(config, "lora_config", None), _ADAPTERS),
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "kv_dtype_skipped": list(getattr(cache, "kv_cache_dtype_skip_layers", ())),
        "kv_sharing_fast_prefill": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "quantization": str(model.quantization),
        "tensor_parallel": "any" if tp_independent else parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "kv_layout": str(kv_cache.kv_cache_layout),
        "groups": [
            [type(spec).__name__, str(spec), list(group.layer_names)]
            for group in kv_cache.kv_cache_groups
            for spec in [_whole(config, group.kv_cache_spec) if tp_independent else group.kv_cache_spec]
        ],
        "workers": sorted(set(layouts)) if tp_independent else list(layouts),
        "environment": {name: os.environ.get(name, "") for name in _ENVIRONMENT},
    }
    return msgspec.json.encode(record, order="sorted").decode()


def _whole(config: VllmConfig, spec: Any) -> Any:
    """A group's specification as it is without tensor parallelism."""
    if hasattr(spec, "kv_cache_specs"):
        return replace(spec, kv_cache_specs={name: _whole(config, one) for name, one in spec.kv_cache_specs.items()})
    ranks = config.parallel_config.tensor_parallel_size
    return replace(spec, num_kv_heads=spec.num_kv_heads * min(ranks, head_shards(config, spec)))


def head_shards(config: VllmConfig, spec: Any) -> int:
    """Into how many shares the heads of a layer can be cut at most: all its KV heads, or 1 where every rank holds the
    same (MLA). Raises ConfigError where that is not known, or ranks do not share them equally."""
    ranks = config.parallel_config.tensor_parallel_size
    heads: int = spec.max_tp_shards or config.model_config.get_total_num_kv_heads()
    known = spec.max_tp_shards is not None or spec.num_kv_heads * min(ranks, heads) == heads
    if not known or (heads % ranks and ranks % heads):
        raise ConfigError(
            f"tp_independent is set, and a layer has {spec.num_kv_heads} KV heads on each of {ranks} ranks, of {heads} "
            "in all; allowed: an equal share of the model's heads on each rank"
        )
    return heads


def _fields(part: object, names: Sequence[str]) -> dict[str, str]:
    return {} if part is None else {name: str(getattr(part, name, None)) for name in names}


def _weights(model: Any, load: Any) -> str:
    """The content of the files that vLLM loaded."""
    from penstock.engine.weights_identity import weights_identity

    if load.load_format == "dummy":
        import torch

        return f"dummy:{model.seed}:{'cuda' if torch.cuda.is_available() else 'cpu'}:{torch.__version__}"
    elsewhere: str = getattr(model, "model_weights", None) or ""
    if elsewhere or load.load_format not in _FORMATS:
        what = elsewhere or f"load format {load.load_format!r}"
        raise ConfigError(f"the weights of {model.model} cannot be identified ({what}); {_ADVICE}")
    files = weight_files(folder_of(model, load), load.load_format)
    try:
        found = weights_identity(files)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the weights of {model.model} cannot be read ({error}); {_ADVICE}") from None
    special = load.load_format in ("sharded_state", "runai_streamer_sharded")
    return f"{found}:{getattr(load, 'model_loader_extra_config', None)}" if special else found


def folder_of(model: Any, load: Any) -> Path:
    """The folder of the files that vLLM loaded: the model's folder, or its snapshot in vLLM's hub cache at vLLM's
    revision. Raises ConfigError."""
    from penstock.engine.checkpoint_folder import resolve_folder

    folder = Path(model.model)
    if folder.is_dir():
        return folder
    if uses_modelscope():
        raise ConfigError(
            f"the weights of {model.model} cannot be identified (VLLM_USE_MODELSCOPE fetches them elsewhere); "
            f"name their folder instead, or {_ADVICE}"
        )
    try:
        cache = getattr(load, "download_dir", None)
        return resolve_folder(model.model, "auto", revision=getattr(model, "revision", None), cache_dir=cache)
    except Exception as error:  # noqa: BLE001 (the hub's client raises many kinds; all mean that there is no folder)
        raise ConfigError(f"the weights of {model.model} cannot be identified ({error}); {_ADVICE}") from None


def uses_modelscope() -> bool:
    """Whether vLLM downloads from ModelScope, where a name may mean other files than in the hub cache."""
    return os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")


def weight_files(folder: Path, load_format: str) -> list[Path]:
    """The files of a folder that vLLM reads in a format. Raises ConfigError if there are none."""
    for pattern in _FORMATS[load_format]:
        found = sorted(folder.glob(pattern))
        if found:
            return _indexed(folder, found) if pattern.endswith(".safetensors") else found
    wanted = ", ".join(_FORMATS[load_format])
    raise ConfigError(f"{folder} has no weights that vLLM reads as {load_format!r} ({wanted}); {_ADVICE}")


def _indexed(folder: Path, files: list[Path]) -> list[Path]:
    """Of several safetensors files, those in their index, as vLLM does; all of them without an index."""
    consolidated = files[0].name.startswith("consolidated")
    index = folder / ("consolidated.safetensors.index.json" if consolidated else "model.safetensors.index.json")
    try:
        names = set(msgspec.json.decode(index.read_bytes())["weight_map"].values())
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return files
    return [file for file in files if file.name in names] or files


def _code(model: Any) -> str:
    """The model's own Python code, if vLLM was allowed to run it."""
    if not getattr(model, "trust_remote_code", False):
        return ""
    auto_map = getattr(model.hf_config, "auto_map", None) or {}
    if not auto_map:
        return ""
    revision = str(getattr(model, "code_revision", None) or "")
    fixed = bool(_COMMIT.fullmatch(revision))
    if any("--" in str(name) for name in auto_map.values()) and not fixed:
        raise ConfigError(
            f"the code of {model.model} lies in another repository; "
            f"give --code-revision a commit of 40 digits, or {_ADVICE}"
        )
    folder = Path(model.model)
    if folder.is_dir():
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(folder.rglob("*.py")):
            data = file.read_bytes()
            digest.update(f"{file.relative_to(folder)};{len(data)};".encode() + data)
        return f"{revision if fixed else ''}:{digest.hexdigest()}"
    commit = revision if fixed else getattr(model.hf_config, "_commit_hash", None)
    if not commit or (revision and not fixed):
        raise ConfigError(
            f"the code of {model.model} cannot be identified; give --code-revision a commit of 40 digits, or {_ADVICE}"
        )
    return str(commit)


def _rope(model: Any) -> list[list[Any]]:
    """What the rotary embedding derives from vLLM's longest allowed context, beyond the model's configuration."""
    found = []
    for source in (model.hf_config, getattr(model, "hf_text_config", None)):
        rope = getattr(source, "rope_parameters", None) or getattr(source, "rope_scaling", None) or {}
        for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
            kind = str(part.get("rope_type") or part.get("type") or "default")
            if kind in _FIXED_ROPE:
                continue
            bound = part.get("original_max_position_embeddings")
            bound = bound or getattr(source, "original_max_position_embeddings", None)
            of_length = kind == "longrope" and isinstance(bound, int)
            entry = [kind, model.max_model_len > bound if of_length else model.max_model_len]
            if entry not in found:
                found.append(entry)
    return found


def _media(model: Any) -> dict[str, str]:
    """How media become embeddings, beyond the weights: options, and the processor's files."""
    options = getattr(model, "multimodal_config", None)
    if options is None:
        return {}
    found = _fields(options, _MEDIA)
    folder = Path(model.model)
    if not folder.is_dir():
        found["commit"] = str(getattr(model.hf_config, "_commit_hash", None))
        return found
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            found[name] = hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
    return found


def _draft(config: VllmConfig, model_id: str) -> list[str]:
    """The draft model of speculative decoding, whose KV is in the same blocks; `model_id` also replaces its weights."""
    from penstock.engine.checkpoint import config_identity

    guesses = getattr(config, "speculative_config", None)
    method = str(getattr(guesses, "method", None))
    if guesses is None or method.startswith(_WITHOUT_KV):
        return []
    draft, model = guesses.draft_model_config, config.model_config
    found = [method, str(guesses.num_speculative_tokens)]
    if draft is None:
        return found
    load = getattr(guesses, "draft_load_config", None) or config.load_config
    same = (draft.model, getattr(draft, "revision", None)) == (model.model, getattr(model, "revision", None))
    weights = "the model's" if same or model_id else _weights(draft, load)
    return [*found, weights, config_identity(draft.hf_config), str(draft.quantization), str(draft.dtype)]
