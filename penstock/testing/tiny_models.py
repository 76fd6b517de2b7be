"""Small checkpoints with random weights and a real tokenizer, for tests and the demo; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

BOS, EOS = "<|bos|>", "<|eos|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY_VOCABULARY = 384
DEMO_VOCABULARY = 2048


def _training_text() -> Iterator[str]:
    """English text and code available in every Python: the language reference of `help()`."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def build_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` ids, with bos, eos and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 256 + 2 + len(_ROLES):
        raise ValueError(f"vocabulary is {vocabulary}; bytes and special tokens need {256 + 2 + len(_ROLES)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _common(vocabulary: int, max_context_tokens: int) -> dict[str, Any]:
    """Weights wide enough that greedy tokens vary, in a model small enough to build at once."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": max_context_tokens,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _llama(common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**common)


def _qwen3(common: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**common)


def _qwen3_moe(common: dict[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)


def _gpt_oss(common: dict[str, Any]) -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **common,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _deepseek_v3(common: dict[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    multi_head = common | {"num_key_value_heads": common["num_attention_heads"]}
    multi_head.pop("head_dim")
    return DeepseekV3Config(
        **multi_head,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        n_group=2,
        topk_group=2,
        first_k_dense_replace=1,
    )


_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny_config(max_context_tokens: int, head_dim: int = 16) -> dict[str, Any]:
    """Configuration common to all tiny checkpoints, for an architecture that is not among ARCHITECTURES."""
    return _common(TINY_VOCABULARY, max_context_tokens) | {"head_dim": head_dim}


def save_random(config: Any, folder: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a checkpoint of any configuration with the tiny vocabulary; returns the folder."""
    return _save(config, build_tokenizer(TINY_VOCABULARY), folder, seed, dtype)


def _save(config: Any, tokenizer: Any, folder: Path, seed: int, dtype: str) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from penstock.engine.checkpoint_folder import quiet_transformers

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny(
    architecture: str,
    folder: Path,
    *,
    seed: int = 0,
    max_context_tokens: int = 2048,
    dtype: str = "float32",
    head_dim: int = 16,
) -> Path:
    """Write a checkpoint of one of ARCHITECTURES (under 1 MB of weights each) into `folder`; returns the folder.

    vLLM's CPU attention takes a `head_dim` of 32 or more.
    """
    if architecture not in _CONFIGS:
        raise ValueError(f"architecture is {architecture!r}; allowed are {', '.join(ARCHITECTURES)}")
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    config = _CONFIGS[architecture](_common(len(tokenizer), max_context_tokens) | {"head_dim": head_dim})
    return _save(config, tokenizer, folder, seed, dtype)


def build_demo_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write the demo's Llama: 6 layers of width 256 with grouped heads, 32K context; returns the folder.

    On two CPU cores its prefill takes far longer than loading the same KV, and 2K tokens still prefill in a second.
    """
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.08,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    build_llama(folder, DEMO_VOCABULARY, 32768, sizes, seed=seed)
    return folder


def build_llama(
    folder: Path, vocabulary: int, max_context_tokens: int, sizes: Mapping[str, Any], *, seed: int = 0
) -> int:
    """Write a Llama in float32 with these sizes (names of its config) into `folder`; returns how many ids it has."""
    tokenizer = build_tokenizer(vocabulary)
    _save(_llama(_common(len(tokenizer), max_context_tokens) | dict(sizes)), tokenizer, folder, seed, "float32")
    return len(tokenizer)
