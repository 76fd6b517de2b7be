"""Checkpoints: what is refused, with which words, and what the identity of a model covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, BloomConfig, FalconConfig, LlamaConfig, T5Config

from penstock.engine.checkpoint import llama_3_1_8b_config
from penstock.engine.checkpoint_folder import CheckpointError
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import Chunk, SamplingParams
from penstock.testing.tiny_models import build_demo_checkpoint, build_tiny, build_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def garbage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 20)


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def missing_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_type(folder: Path) -> None:
    change_config(folder, model_type="no_such_model")


def encoder_decoder(folder: Path) -> None:
    T5Config(d_model=16, num_layers=1).save_pretrained(folder)


def dynamic_rope(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def linear_layers(folder: Path) -> None:
    change_config(folder, layer_types=["linear_attention"] * 4)


def bad_end_token(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (cut_off, "cut off or overlong"),
        (drop_weights, r"model.safetensors is missing; weights are read from safetensors files only"),
        (garbage_header, "broken safetensors header"),
        (no_header, "cut off or no safetensors file"),
        (missing_tensor, r"1 missing keys in the weights \(model.layers.2.mlp.up_proj.weight"),
        (wrong_shape, "transformers cannot build this model|mismatched keys"),
        (broken_index, "is not a weight index"),
        (missing_shard, "model-00001.safetensors is missing"),
        (not_json, "config.json is not usable"),
        (no_config, "has no config.json"),
        (unknown_type, "no_such_model"),
        (encoder_decoder, "'t5' is not a causal language model"),
        (dynamic_rope, "cannot be reused"),
        (linear_layers, "served are|not usable"),
        (bad_end_token, "eos_token_id is 'end'"),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(fault: Callable[[Path], None], message: str, copy: Path) -> None:
    fault(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        HFRunner(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    ],
)
def test_models_whose_attention_bypasses_the_interface_are_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="AttentionInterface"):
        HFRunner(str(tmp_path), device="cpu", load_format="dummy", max_context_tokens=64)


def test_bidirectional_models_are_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not causal"):
        HFRunner(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [("/no/such/folder", "neither an existing folder nor a hub id"), ("../a b", "neither"), ("", "has no|neither")],
)
def test_unknown_models(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        HFRunner(source, device="cpu")


def test_options_out_of_range_are_refused(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="the model allows at most 2048"):
        HFRunner(str(tiny), device="cpu", max_context_tokens=4096)
    with pytest.raises(CheckpointError, match="at least 1"):
        HFRunner(str(tiny), device="cpu", max_context_tokens=0)
    with pytest.raises(CheckpointError, match="allowed are 'auto', 'float32'"):
        HFRunner(str(tiny), device="cpu", dtype="int8")
    with pytest.raises(CheckpointError, match="allowed are 'auto', 'cpu', 'cuda', 'cuda:1' and so on"):
        HFRunner(str(tiny), device="tpu")
    with pytest.raises(CheckpointError, match="allowed are 'auto' and 'dummy'"):
        HFRunner(str(tiny), device="cpu", load_format="bin")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="finds no CUDA device"):
            HFRunner(str(tiny), device="cuda")


def test_identity_covers_config_weights_and_precision_but_not_the_place(tiny: Path, copy: Path) -> None:
    original = HFRunner(str(tiny), device="cpu").model_id
    assert HFRunner(str(copy), device="cpu").model_id == original
    assert HFRunner(str(copy), device="cpu", dtype="bfloat16").model_id != original
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][5] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert HFRunner(str(copy), device="cpu").model_id != original
    shutil.copy(tiny / "model.safetensors", file)
    assert HFRunner(str(copy), device="cpu").model_id == original
    change_config(copy, rms_norm_eps=0.5)
    assert HFRunner(str(copy), device="cpu").model_id != original


def test_dummy_weights_need_a_config_only_and_follow_the_seed(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, eos_token_id=[5, 6],
    ).save_pretrained(tmp_path)  # fmt: skip
    chunk = Chunk("r", list(range(40)), 0, [0, 1, 2], SamplingParams(temperature=0.0))
    found = []
    for seed in (0, 0, 1):
        runner = HFRunner(str(tmp_path), block_tokens=16, device="cpu", load_format="dummy", seed=seed)
        runner.allocate(3)
        block = memoryview(bytearray(runner.layout.full_block_bytes))
        runner.run([chunk])
        runner.download(0, block)
        found.append((runner.model_id, bytes(block)))
    assert found[0] == found[1] and found[0][0] != found[2][0] and found[0][1] != found[2][1]
    assert runner.eos_token_ids == frozenset({5, 6})


def test_the_tokenizer_speaks_chat_and_round_trips(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    messages = [{"role": "user", "content": "Does water flow? Ünïcode: 水"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = tokenizer.decode(ids)
    assert text == "<|bos|><|user|>Does water flow? Ünïcode: 水<|eos|><|assistant|>"
    assert tokenizer.eos_token_id == 1 and max(ids) < len(tokenizer) <= 384
    with pytest.raises(ValueError, match="vocabulary is 100"):
        build_tokenizer(100)
    with pytest.raises(ValueError, match="allowed are llama"):
        build_tiny("gpt2", tiny)


def test_the_demo_checkpoint_runs(tmp_path: Path) -> None:
    runner = HFRunner(str(build_demo_checkpoint(tmp_path)), device="cpu")
    assert runner.max_context_tokens == 32768 and runner.vocab_size == 2048
    assert runner.layout.layers == 6
    runner.allocate(2)
    assert runner.run([Chunk("r", [0, 9, 10], 0, [1], SamplingParams(temperature=0.0))])[0] is not None


def test_the_bench_geometry_is_that_of_llama_3_1_8b() -> None:
    config = llama_3_1_8b_config()
    assert 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 == 128 * 1024
