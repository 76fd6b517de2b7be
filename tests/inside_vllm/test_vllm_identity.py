"""What every key begins with: it differs where KV differs, and where that cannot be known there is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.core.config import ConfigError
from penstock.vllm import compat
from penstock.vllm.identity import weight_files

SPEC = SimpleNamespace(block_size=32)
KV = SimpleNamespace(kv_cache_layout="LBHNC", kv_cache_groups=[], kv_tp_replicas=1)


def checkpoint(folder: Path, value: float = 0.0, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((64,), value)}, str(folder / name))
    return folder


def hf_config(**more: Any) -> Any:
    from transformers import Phi3Config

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 4096,
    }
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=100,
        pad_token_id=0,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        **({"rope_parameters": rope} | more),
    )


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def config(model: str | Path, load: dict[str, Any] | None = None, draft: Any = None, **more: Any) -> Any:
    """As much of a VllmConfig as is looked at."""
    options = {
        "model": str(model),
        "revision": None,
        "hf_config": hf_config(**PLAIN),
        "dtype": "bfloat16",
        "quantization": None,
        "seed": 0,
        "max_model_len": 4096,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**(options | more)),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(**({"load_format": "auto", "download_dir": None} | (load or {}))),
        speculative_config=draft,
    )


def identity(made: Any, model_id: str = "", layouts: tuple[str, ...] = ("l",)) -> str:
    return compat.model_identity(made, KV, list(layouts), model_id)


def test_a_revision_and_a_download_folder_are_where_the_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str | None, Any]] = []

    def snapshot(name: str, revision: str | None = None, cache_dir: Any = None, **more: Any) -> str:
        asked.append((revision, cache_dir))
        return str(checkpoint(tmp_path / str(revision), {"v1": 1.0}.get(str(revision), 2.0)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    known = [identity(config("org/model", revision=revision)) for revision in ("v1", "v2", None)]
    assert known[0] != known[1] == known[2]
    assert identity(config("org/model", {"download_dir": "/elsewhere"}, revision="v1")) == known[0]
    assert asked == [("v1", None), ("v2", None), (None, None), ("v1", "/elsewhere")]
    assert identity(config(checkpoint(tmp_path / "local", 1.0))) == known[0], "the same content in a folder"


def test_the_files_are_those_that_vllm_reads(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", name="model-1.safetensors")
    names = [checkpoint(folder, name=name).name for name in ("a", "b") for name in (f"{name}.safetensors",)]
    assert names and [file.name for file in weight_files(folder, "auto")] == [
        "a.safetensors",
        "b.safetensors",
        "model-1.safetensors",
    ], "without an index vLLM reads them all"
    index = {"weight_map": {"w": "a.safetensors", "v": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(folder, "hf")] == ["a.safetensors", "model-1.safetensors"]
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert [file.name for file in weight_files(folder, "npcache")] == ["pytorch_model.bin"]
    checkpoint(folder, name="consolidated.safetensors")
    assert [file.name for file in weight_files(folder, "auto")] == ["consolidated.safetensors"], "Mistral's own format"
    with pytest.raises(ConfigError, match=r"no weights that vLLM reads as 'pt' \(\*\.pt\); set model_id"):
        weight_files(folder, "pt")


@pytest.mark.parametrize("load_format", ["tensorizer", "ipc_cache", "a plugin's"])
def test_weights_that_lie_elsewhere_need_a_name(tmp_path: Path, load_format: str) -> None:
    made = config(checkpoint(tmp_path / "m"), {"load_format": load_format})
    with pytest.raises(ConfigError, match="set model_id"):
        identity(made)
    assert identity(made, "mine") != identity(made, "yours")
    streamed = config(checkpoint(tmp_path / "m"), {"load_format": "runai_streamer"}, model_weights="s3://bucket/m")
    with pytest.raises(ConfigError, match=r"s3://bucket/m.*set model_id"):
        identity(streamed)


def test_the_longest_context_chooses_the_factors_of_longrope(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")

    def of(length: int, **more: Any) -> str:
        return identity(config(folder, max_model_len=length, hf_config=hf_config(**more)))

    assert of(4096) == of(1024) != of(4097) == of(131072)
    assert of(4096, **PLAIN) == of(131072, **PLAIN)
    unknown = {"rope_parameters": {"rope_type": "new", "rope_theta": 10000.0}}
    assert identity(config(folder, max_model_len=1, hf_config=SimpleNamespace(to_dict=dict, **unknown))) != identity(
        config(folder, max_model_len=2, hf_config=SimpleNamespace(to_dict=dict, **unknown))
    ), "a kind that nobody looked at may depend on it"


def test_a_drafts_weights_are_part_of_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")

    def guessing(model: Path, method: str = "eagle") -> Any:
        return SimpleNamespace(
            method=method,
            num_speculative_tokens=2,
            draft_model_config=config(model).model_config,
            draft_load_config=None,
        )

    drafts = [checkpoint(tmp_path / f"draft{value}", value) for value in (1.0, 2.0)]
    known = [identity(config(folder, draft=guessing(draft))) for draft in drafts]
    mtp = identity(config(folder, draft=guessing(folder, "mtp")))
    assert len({*known, mtp, identity(config(folder))}) == 4
    assert identity(config(folder, draft=guessing(folder, "ngram"))) == identity(config(folder)), "it keeps no KV"
    checkpoint(drafts[0], 3.0)
    assert identity(config(folder, draft=guessing(drafts[0]))) != known[0]


def test_the_models_own_code_is_part_of_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    local = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    remote = {"auto_map": {"AutoModelForCausalLM": "org/code--modeling.Model"}}

    def of(auto_map: dict[str, Any], **more: Any) -> str:
        return identity(config(folder, trust_remote_code=True, hf_config=hf_config(**PLAIN, **auto_map), **more))

    (folder / "modeling.py").write_text("first = 1")
    first = of(local)
    (folder / "modeling.py").write_text("second = 2")
    assert of(local) != first
    with pytest.raises(ConfigError, match="another repository; give --code-revision"):
        of(remote, code_revision="main")
    assert of(remote, code_revision="a" * 40) != of(remote, code_revision="b" * 40)


def test_every_rank_holds_the_same_only_where_vllm_says_so_of_every_layer() -> None:
    def same(ranks: int, stages: int, replicas: int) -> bool:
        made = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=stages),
            model_config=SimpleNamespace(use_mla=True),
        )
        return compat.same_on_all_ranks(made, SimpleNamespace(kv_tp_replicas=replicas))

    assert same(4, 1, 4) and not same(4, 2, 4)
    assert not same(4, 1, 1), "an MLA model with a draft that has heads of its own"
    assert not same(4, 1, 2)


def test_with_tp_independent_the_degree_is_no_part_of_the_identity(tmp_path: Path) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

    made = config(checkpoint(tmp_path / "m"), get_total_num_kv_heads=lambda: 4)

    def of(ranks: int, heads: int, shards: int | None = None, independent: bool = True) -> str:
        made.parallel_config.tensor_parallel_size = ranks
        spec = FullAttentionSpec(
            block_size=16, num_kv_heads=heads, head_size=8, dtype=torch.float32, max_tp_shards=shards
        )
        cache = SimpleNamespace(kv_cache_layout="LBHNC", kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
        if independent:
            assert compat.ranks_of_one_share(made, cache) == max(1, ranks // (shards or 4))
        return compat.model_identity(made, cache, ["described"] * ranks, "", independent)

    assert of(1, 4) == of(2, 2) == of(4, 1) == of(8, 1)
    assert len({of(1, 4, None, False), of(2, 2, None, False), of(1, 4)}) == 3
    assert of(1, 1, 1) == of(4, 1, 1) != of(1, 4), "MLA: all ranks hold the same"
    for ranks, heads in ((3, 1), (2, 3)):
        with pytest.raises(ConfigError, match=f"{heads} KV heads on each of {ranks} ranks, of 4 in all"):
            of(ranks, heads)


def test_groups_whose_kv_no_prefix_names_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

    made = SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    )
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)

    def check(**more: Any) -> None:
        group = KVCacheGroupSpec(["l"], spec, **more)
        compat.check_model(made, SimpleNamespace(kv_cache_groups=[group]))

    check()
    with pytest.raises(ConfigError, match="a prefix does not determine"):
        check(enable_kv_transfer=False)
    made.model_config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="encoder"):
        check()


def picture(value: float, at: int = 10, name: str = "a" * 64, **more: Any) -> Any:
    """An image of a request, as vLLM's scheduler has it."""
    from vllm.multimodal.inputs import (
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        MultiModalSharedField,
        PlaceholderRange,
    )

    data = {"pixel_values": torch.full((3, 8, 8), value, dtype=torch.bfloat16), "grid": torch.tensor([1, 2, 2]), **more}
    field = MultiModalSharedField(batch_size=1)
    item = MultiModalKwargsItem({key: MultiModalFieldElem(data=one, field=field) for key, one in data.items()})
    return MultiModalFeatureSpec(item, "image", name, PlaceholderRange(offset=at, length=20), name)


def request(*media: Any, **more: Any) -> Any:
    options = {"prompt_embeds": None, "prompt_token_ids": [1], "all_token_ids": [1], "lora_request": None}
    return SimpleNamespace(**(options | {"mm_features": list(media), "cache_salt": None} | more))


def test_media_are_named_by_their_content_where_their_tokens_are() -> None:
    """Whatever vLLM or a client calls them."""
    from penstock.vllm.media import Media

    media, twice = Media(), picture(1.0)
    one, two = media.spans(request(twice)), media.spans(request(twice, picture(2.0, 40)))
    assert one is not None and two is not None and two[:1] == one
    assert (two[1].offset, two[1].length) == (40, 20) and two[1].name != one[0].name
    assert media.spans(request(picture(1.0, name="holiday.jpg"))) == one, "the same content under another name"
    others = [picture(2.0), picture(1.0, grid=torch.tensor([1, 4, 1])), picture(1.0, pixel_values=torch.ones(3, 8, 8))]
    names = {spans[0].name for spans in map(media.spans, map(request, others)) if spans}
    assert len(names) == 3 and one[0].name not in names, "the same name, other content"
    assert compat.salt_of(request(twice)) == compat.salt_of(request()), "no medium is in the root"


def test_media_whose_content_is_elsewhere_are_not_kept() -> None:
    from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, MultiModalSharedField

    from penstock.vllm.media import Media

    address = {"address": 4096, "monotonic_id": 1, "signature": [1, 2]}
    field = MultiModalSharedField(batch_size=1)
    for item in (
        None,
        MultiModalKwargsItem({key: MultiModalFieldElem(data=one, field=field) for key, one in address.items()}),
    ):
        feature = picture(1.0)
        feature.data = item
        assert Media().spans(request(picture(1.0), feature)) is None


def test_a_client_cannot_write_a_salt_that_reads_as_an_adapter() -> None:
    adapted = compat.salt_of(request(cache_salt="mine"), "content")
    for salt in (adapted, "mine", ""):
        assert compat.salt_of(request(cache_salt=salt)) != adapted
    given = [(salt, adapter) for salt in ("", "a", adapted) for adapter in (None, "x")]
    assert len({compat.salt_of(request(cache_salt=salt), adapter) for salt, adapter in given}) == len(given)


def test_names_that_vllm_looks_up_elsewhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_MODELSCOPE"):
        identity(config("org/model"))
    assert identity(config(checkpoint(tmp_path / "m"))), "a folder is what it is"


def test_input_that_tokens_do_not_say_is_not_kept() -> None:
    assert compat.is_storable(request())
    for change in ({"prompt_embeds": torch.zeros(1)}, {"prompt_token_ids": None}, {"resumable": True}):
        assert not compat.is_storable(request(**change)), change


def test_bytes_of_a_block_are_described_as_a_kernel_sees_them() -> None:
    from penstock.vllm.layout import KVRows, Layer, _meaning

    def described(cache: torch.Tensor) -> str:
        rows = torch.zeros(4, 128, dtype=torch.uint8)
        return KVRows([[Layer("l", rows, _meaning(cache))]]).describe()

    whole = torch.zeros(4, 2, 4, 4, dtype=torch.float32)
    others = [
        torch.zeros(8, 2, 2, 4, dtype=torch.float32),  # kernel blocks of half the size
        torch.zeros(4, 2, 4, 4, dtype=torch.int32),
        torch.zeros(4, 4, 2, 4, dtype=torch.float32).transpose(1, 2),  # tokens before heads
    ]
    assert len({described(whole), *map(described, others)}) == 4
    assert described(torch.zeros(9, 2, 4, 4)) == described(whole), "how many blocks there are is no matter"


def test_a_real_engines_identity_is_the_same_in_every_process(llama: Path, model: Callable[[str], Path]) -> None:
    """Nothing in it comes from addresses, hashes or the size of the cache."""
    from tests.inside_vllm.vllm_rig import MIB, running

    found = set()
    for size in (16 * MIB, 32 * MIB):
        with running(llama, {"memory": ["64MiB"]}, kv_cache_memory_bytes=size) as engine:
            found.add(engine.connector.side._identity)  # noqa: SLF001 (what the pool's keys are made of)
            assert "0x" not in engine.connector.side._identity  # noqa: SLF001 (what the pool's keys are made of)
    assert len(found) == 1
