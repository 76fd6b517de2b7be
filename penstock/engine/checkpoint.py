"""Verifies and loads a Hugging Face causal LM; determines its identity, end tokens and context length."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.engine import attention
from penstock.engine.checkpoint_folder import CheckpointError, LoadFormat, one_line, quiet_transformers, resolve_folder
from penstock.engine.weights_identity import WeightsChanged, states_of
from penstock.engine.weights_identity import weights_identity as weights_identity  # exported from here
from penstock.toml_file import read_bounded

_CONFIG_NAMES_WITHOUT_MEANING = ("_name_or_path", "transformers_version")  # differ between copies of one model
_JSON_BYTES_MAX = 64 << 20
_HEADER_BYTES_MAX = 100_000_000  # the limit of the safetensors library
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
SERVED_MODELS = "served are models whose every layer goes through transformers' AttentionInterface once"
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, with the properties that the engine needs."""

    model: Any
    config: Any  # the text config
    folder: Path
    identity: str
    eos_token_ids: frozenset[int]


def read_config(folder: Path) -> Any:
    """The configuration of a causal LM that Penstock can serve. Raises CheckpointError otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} is not usable: {one_line(error)}") from error
    served = AutoModelForCausalLM._model_mapping  # noqa: SLF001 (there is no public list of types with a causal LM)
    if getattr(config, "is_encoder_decoder", False) or type(config) not in served:
        raise CheckpointError(f"{folder}: model type {config.model_type!r} is not a causal language model")
    if getattr(config, "transformers_weights", None) is not None:
        raise CheckpointError(
            f"{folder}: transformers_weights is {config.transformers_weights!r}; allowed: none, with the weights in "
            "model.safetensors or the files of model.safetensors.index.json"
        )
    _refuse_unservable(folder, config.get_text_config())
    return config


def _refuse_unservable(folder: Path, config: Any) -> None:
    """Raise CheckpointError for models whose KV depends on more than the preceding tokens, or whose attention needs a
    mask."""
    foreign = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if foreign:
        raise CheckpointError(f"{folder}: layers {sorted(foreign)}; served are {sorted(_SERVED_LAYER_TYPES)}")
    if getattr(config, "attention_chunk_size", None):
        raise CheckpointError(f"{folder}: chunked attention (attention_chunk_size) is not served")
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # flat, or one record per layer type
    unstable = sorted(_BATCH_DEPENDENT_ROPE & {str(part.get("rope_type")) for part in parts})
    if unstable:
        raise CheckpointError(
            f"{folder}: rope type {unstable} depends on the length of the whole request, "
            "so its KV cannot be reused; served are fixed types (default, linear, yarn, llama3)"
        )


def weight_files(folder: Path) -> list[Path]:
    """Every safetensors file of a checkpoint; files that are certainly read are checked to be complete by their
    headers. All files are returned, because libraries differ when an index, a single file and others are in one folder:
    transformers reads the single file, vLLM those of the index or all. Raises CheckpointError."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # transformers would load the base model that it names, and the adapter
        raise CheckpointError(f"{adapter}: an adapter is not served; allowed: a checkpoint that it is merged into")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(read_bounded(index, _JSON_BYTES_MAX))["weight_map"].values()))
            if not all(_stays_inside(name) for name in names):
                raise ValueError("it names a file outside of its folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not a weight index: {one_line(error)}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; weights are read from safetensors files only")
        _check_safetensors(file)
    return list(dict.fromkeys([*files, *sorted(folder.glob("*.safetensors"))]))


def _stays_inside(name: object) -> bool:
    return isinstance(name, str) and not os.path.isabs(name) and ".." not in Path(name).parts


def _check_safetensors(file: Path) -> None:
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or header_bytes > min(size_bytes - 8, _HEADER_BYTES_MAX):
            raise CheckpointError(
                f"{file} is cut off or no safetensors file: {size_bytes} bytes, header {header_bytes}"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            needed_bytes = 8 + header_bytes + max(map(operator.index, ends), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{file} has a broken safetensors header: {one_line(error)}") from error
    if size_bytes != needed_bytes:
        raise CheckpointError(f"{file} is cut off or overlong: {size_bytes} bytes, its header names {needed_bytes}")


def config_identity(config: Any) -> str:
    """A hash of the configuration, without fields that differ between copies of one model."""
    record = {name: value for name, value in config.to_dict().items() if name not in _CONFIG_NAMES_WITHOUT_MEANING}
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def end_tokens(folder: Path, config: Any) -> frozenset[int]:
    """Ids after which generation ends: from the generation config if there is one, else from the config."""
    file = folder / "generation_config.json"
    found = None
    if file.is_file():
        try:
            found = json.loads(read_bounded(file, _JSON_BYTES_MAX)).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} is not usable: {one_line(error)}") from error
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        return frozenset()
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError(f"{folder}: eos_token_id is {found!r}; token ids are integers of at least 0")
    return frozenset(ids)


def load_model(
    source: str, load_format: LoadFormat, dtype: str, device: torch.device, seed: int, revision: str | None = None
) -> LoadedModel:
    """Build the model on `device` with Penstock's attention. `dummy` uses only the configuration, with random weights
    generated from `seed` on the device. Raises CheckpointError."""
    if load_format not in ("auto", "dummy"):
        raise CheckpointError(f"load format {load_format!r} is unknown; allowed are 'auto' and 'dummy'")
    import transformers

    folder = resolve_folder(source, load_format, revision)
    config = read_config(folder)
    torch_dtype = _torch_dtype(dtype, config.get_text_config())
    files = weight_files(folder) if load_format == "auto" else []
    config_part = config_identity(config)
    attention.register()
    # Random weights depend on the generator, which differs between devices and versions.
    weights = f"dummy={seed}|{device.type}|torch={torch.__version__}" if load_format == "dummy" else ""
    try:
        with quiet_transformers():
            if load_format == "dummy":
                model = _build_random(config, torch_dtype, device, seed)
            else:
                model, found = _load_identified(folder, config, torch_dtype, device, files)
                weights = f"weights={found}"
    except CheckpointError:
        raise
    except WeightsChanged as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:
        if attention.ATTENTION_NAME in str(error):
            raise CheckpointError(
                f"{folder}: {config.model_type!r} has attention of its own; {SERVED_MODELS}"
            ) from error
        raise CheckpointError(f"{folder}: transformers cannot build this model: {one_line(error)}") from error
    model.eval().requires_grad_(False)
    code = f"transformers={transformers.__version__}"  # version of the model's code: rotary embedding, norms, scaling
    identity = f"config={config_part}|dtype={torch_dtype}|{code}|{weights}"
    text_config = config.get_text_config()
    return LoadedModel(model, text_config, folder, identity, end_tokens(folder, text_config))


def _torch_dtype(name: str, config: Any) -> torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        declared = getattr(config, "dtype", None)
        return declared if declared in allowed.values() else torch.float32
    if name not in allowed:
        raise CheckpointError(f"dtype {name!r} is unknown; allowed are 'auto', {', '.join(map(repr, allowed))}")
    return allowed[name]


def _build_random(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.ATTENTION_NAME)


def _load_identified(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device, files: Sequence[Path]
) -> tuple[Any, str]:
    """The model, and the identity of exactly the bytes from which it was loaded; the files are hashed at the same
    time."""
    index = folder / "model.safetensors.index.json"
    read = [*files, index] if index.is_file() else files
    before = states_of(read)
    with ThreadPoolExecutor(1, "penstock-weights") as hashing:
        stopped = threading.Event()
        identity = hashing.submit(weights_identity, files, stopped=stopped)
        try:
            model = _load_weights(folder, config, dtype).to(device)
            _own_every_byte(model)
            found = identity.result()
        except BaseException:
            stopped.set()  # an error, or Ctrl-C, does not wait for the hashing
            raise
    if states_of(read) != before:
        raise WeightsChanged("the weights were written to while they were loaded; start again once they are whole")
    return model, found


def _own_every_byte(model: Any) -> None:
    """Copy tensors out of the mapped files: on the CPU, transformers' tensors are views of them, and a checkpoint that
    is overwritten would change the weights of a running model, or kill the process."""
    if any(tensor.device.type == "cpu" for tensor in model.parameters()):
        copies: dict[tuple[object, ...], torch.Tensor] = {}  # tied weights stay tied
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.device.type == "cpu":
                    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                    if place not in copies:
                        copies[place] = tensor.detach().clone()
                    tensor.data = copies[place]


def _load_weights(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention.ATTENTION_NAME,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(what) or ()))
        if found:
            raise CheckpointError(
                f"{folder}: {len(found)} {what.replace('_', ' ')} in the weights ({', '.join(found[:3])}, ...); "
                "the weights must be those of the model in config.json"
            )
    return model


def llama_3_1_8b_config() -> Any:
    """The geometry of Llama-3.1-8B (config only; its KV is 128 KiB per token in bfloat16)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072 + 8192,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
