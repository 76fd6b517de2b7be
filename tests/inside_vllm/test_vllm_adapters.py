"""LoRA adapters that are trained again in the same folder: KV follows the content that vLLM computed it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.vllm import adapters
from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, VllmEngine, prompt_of, running

PROMPT = prompt_of(600, BLOCK * 6 + 9)
LOADABLE = 6 * BLOCK
FLAGS = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


def train(model: Path, folder: Path, seed: int) -> None:
    config = json.loads((model / "config.json").read_text())
    hidden, width = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name in ("k_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}."
            tensors[key + "lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.3
            tensors[key + "lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.3
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    record = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    more = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(record | more))


def ask(engine: VllmEngine, folder: Path, number: int = 1, in_place: bool = False) -> tuple[list[int], int]:
    """The answer, and how many tokens came from the pool."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    before = engine.counts()
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    adapter = LoRARequest("summaries", number, str(folder), load_inplace=in_place)
    (answer,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False, lora_request=adapter)
    return list(answer.outputs[0].token_ids), (engine.counts() - before).external


@pytest.fixture(scope="module")
def truth(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """What stock vLLM answers, by training."""
    found = {}
    with running(llama, None, enable_prefix_caching=False, **FLAGS) as engine:
        for seed in (1, 2):
            folder = tmp_path_factory.mktemp(f"adapter{seed}")
            train(llama, folder, seed)
            found[seed] = ask(engine, folder, seed)[0]
    assert found[1] != found[2]
    return found


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as complete at once: nobody writes to them beside the test."""
    monkeypatch.setattr(adapters, "SETTLED_S", 0.0)


def test_an_adapter_that_was_trained_again_in_its_folder_is_another_one(
    llama: Path, truth: dict[int, list[int]], tmp_path: Path, pool_process: Callable[..., PoolProcess]
) -> None:
    pool = pool_process("--memory", "64MiB")
    folder = tmp_path / "adapter"
    for seed, loaded in ((1, 0), (1, LOADABLE), (2, 0), (1, LOADABLE)):
        train(llama, folder, seed)
        with running(llama, {"pool": pool.address}, **FLAGS) as engine:
            assert ask(engine, folder) == (truth[seed], loaded)
            engine.forget()


def test_an_adapter_that_changes_while_vllm_holds_it_stays_out_of_the_pool(
    llama: Path, truth: dict[int, list[int]], tmp_path: Path, pool_process: Callable[..., PoolProcess]
) -> None:
    """vLLM goes on with what it has in memory, until it is told to load it in place."""
    pool = pool_process("--memory", "64MiB")
    folder = tmp_path / "adapter"
    train(llama, folder, 1)
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        assert ask(engine, folder) == (truth[1], 0)
        engine.forget()
        train(llama, folder, 2)
        assert ask(engine, folder) == (truth[1], 0), "computed, with the adapter in memory"
        engine.forget()
        assert ask(engine, folder, in_place=True) == (truth[2], 0)
        engine.forget()
        assert ask(engine, folder) == (truth[2], LOADABLE)
        engine.forget()
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        assert ask(engine, folder) == (truth[2], LOADABLE)


def test_an_adapter_that_was_replaced_before_its_first_request_is_not_shared(
    llama: Path, truth: dict[int, list[int]], tmp_path: Path, pool_process: Callable[..., PoolProcess]
) -> None:
    """vLLM read it when it was added; its files say something else by the time a request comes."""
    from vllm.lora.request import LoRARequest

    pool = pool_process("--memory", "64MiB")
    folder = tmp_path / "adapter"
    train(llama, folder, 1)
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        engine.llm.llm_engine.add_lora(LoRARequest("summaries", 1, str(folder)))
        train(llama, folder, 2)
        assert ask(engine, folder) == (truth[1], 0)
        engine.forget()
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        assert ask(engine, folder) == (truth[2], 0)


def test_kv_of_the_content_before_never_gets_under_the_keys_of_the_new_one(
    llama: Path, truth: dict[int, list[int]], tmp_path: Path, pool_process: Callable[..., PoolProcess]
) -> None:
    """vLLM's own cache knows an adapter by name and path, and says nothing when its content changes; a reset helps."""
    pool = pool_process("--memory", "64MiB")
    folder = tmp_path / "adapter"
    train(llama, folder, 1)
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        assert ask(engine, folder) == (truth[1], 0)
        train(llama, folder, 2)
        for number, in_place in ((1, True), (2, False)):
            assert ask(engine, folder, number, in_place)[1] == 0
        engine.forget()
        assert ask(engine, folder, in_place=True) == (truth[2], 0)
        engine.forget()
        assert ask(engine, folder, in_place=True) == (truth[2], LOADABLE)
        engine.forget()
    with running(llama, {"pool": pool.address}, **FLAGS) as engine:
        assert ask(engine, folder) == (truth[2], LOADABLE)
