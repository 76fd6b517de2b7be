"""What an adapter is to a key: the content that vLLM computes with, or nothing where that cannot be known."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.weights_identity import weights_identity
from penstock.vllm import adapters as module
from penstock.vllm.adapters import SETTLED_S, Adapters
from tests.waiting import wait_until

WAIT_S = 60.0


@dataclass
class Lora:
    """As much of a LoRARequest as is looked at."""

    lora_int_id: int
    lora_path: str
    lora_name: str = "a"
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


def train(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"lora_A": torch.full((8, 8), float(seed))}, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text('{"r": 8}')


class Clock:
    """Stands some time behind the files that were just written, so that they count as old, until it is moved back."""

    def __init__(self) -> None:
        self.ahead_s = 3 * SETTLED_S

    def __call__(self) -> float:
        return time.time() + self.ahead_s


def test_the_same_content_elsewhere_is_the_same_adapter_and_other_content_in_its_place_is_not(tmp_path: Path) -> None:
    train(tmp_path / "a", 1)
    train(tmp_path / "b", 1)
    first = Adapters(Clock()).identity(Lora(1, str(tmp_path / "a")))
    assert first is not None
    assert Adapters(Clock()).identity(Lora(7, str(tmp_path / "b"), "other name")) == first
    train(tmp_path / "a", 2)  # as large as before
    second = Adapters(Clock()).identity(Lora(1, str(tmp_path / "a")))
    assert second is not None and second != first
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 4}')
    assert Adapters(Clock()).identity(Lora(1, str(tmp_path / "a"))) not in (None, first, second)


def test_an_adapter_that_changes_while_vllm_has_it_is_refused_until_it_is_loaded_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "a", 1)
    known = Adapters(Clock())
    first = known.identity(Lora(1, str(tmp_path / "a")))
    assert first is not None and known.identity(Lora(1, str(tmp_path / "a"))) == first
    train(tmp_path / "a", 2)
    with caplog.at_level(logging.WARNING):
        assert [known.identity(Lora(1, str(tmp_path / "a"))) for _ in range(5)] == [None] * 5
    assert len(caplog.records) == 1 and "files changed" in caplog.records[0].getMessage()
    train(tmp_path / "a", 1)
    assert known.identity(Lora(1, str(tmp_path / "a"))) is None, "vLLM may have read either meanwhile"
    assert known.identity(Lora(1, str(tmp_path / "a"), load_inplace=True)) is None, "its own cache has KV of both"
    known.cache_emptied()
    assert known.identity(Lora(1, str(tmp_path / "a"), load_inplace=True)) == first, "vLLM reads it with this request"
    assert known.identity(Lora(1, str(tmp_path / "a"))) == first
    assert known.identity(Lora(1, str(tmp_path / "b"))) is None, "another folder under the same number"


def test_what_was_written_after_the_start_is_this_engines_own(tmp_path: Path) -> None:
    """vLLM may have been given the folder, and read it, before it was written anew."""
    clock = Clock()
    clock.ahead_s = 0.0
    engines = [Adapters(clock), Adapters(clock)]
    train(tmp_path / "a", 1)
    assert engines[0].identity(Lora(1, str(tmp_path / "a"))) is None, "it may still be written"
    clock.ahead_s = 3 * SETTLED_S
    path = str(tmp_path / "a")
    found = [engine.identity(Lora(number, path, f"a{number}")) for engine in engines for number in (1, 2)]
    assert None not in found and len(set(found)) == 4
    assert engines[0].identity(Lora(3, path, "a1")) is None, "vLLM may have read other files under this number"
    engines[0].cache_emptied()
    assert engines[0].identity(Lora(1, path, "a1")) == found[0]
    again = Adapters(clock).identity(Lora(1, str(tmp_path / "a")))
    assert again not in (None, *found), "after a restart it is known by its content"


def test_an_adapter_that_is_not_here_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "a", 1)
    (tmp_path / "a" / "adapter_config.json").unlink()
    known = Adapters(Clock())
    with caplog.at_level(logging.WARNING):
        for path in (str(tmp_path / "a"), str(tmp_path / "nowhere"), "nobody/nothing", "not a name"):
            assert known.identity(Lora(1, path)) is None
    assert "cannot be read" in caplog.text


def test_a_large_adapter_is_read_beside_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "a", 1)
    small = Adapters(Clock()).identity(Lora(1, str(tmp_path / "a")))
    monkeypatch.setattr(module, "INLINE_BYTES", 10)
    held, read = threading.Event(), weights_identity

    def slow(files: list[Path]) -> str:
        assert held.wait(WAIT_S) and threading.current_thread().name == "penstock-adapters"
        return read(files)

    monkeypatch.setattr(module, "weights_identity", slow)
    known = Adapters(Clock())
    assert known.identity(Lora(1, str(tmp_path / "a"))) is None, "requests go without the pool until it is read"
    held.set()
    wait_until(lambda: known.identity(Lora(1, str(tmp_path / "a"))) is not None, "the adapter is read")
    assert known.identity(Lora(1, str(tmp_path / "a"))) == small
    known.close()


def test_a_hub_name_is_what_the_hubs_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    train(tmp_path / "snapshot", 1)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: str(tmp_path / "snapshot" / file) if name == "owner/adapter" else None,
    )
    monkeypatch.chdir(tmp_path)
    assert Adapters(Clock()).identity(Lora(1, "owner/adapter")) == Adapters(Clock()).identity(Lora(1, "snapshot"))
    shutil.rmtree(tmp_path / "snapshot")
    assert not os.path.exists("snapshot") and Adapters(Clock()).identity(Lora(1, "owner/adapter")) is None


def test_what_vllms_own_cache_may_hold_of_another_content_is_refused_until_it_is_emptied(tmp_path: Path) -> None:
    """It goes by name and path, whatever the number is."""
    train(tmp_path / "a", 1)
    train(tmp_path / "v2", 2)
    (tmp_path / "now").symlink_to("a")
    known, path = Adapters(Clock()), str(tmp_path / "now")
    first = known.identity(Lora(1, path))
    assert first is not None and known.identity(Lora(2, path)) == first, "unloaded, and loaded again"
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("v2")
    assert known.identity(Lora(3, path)) is None, "another number, the same name"
    second = known.identity(Lora(4, path, "b"))
    assert second not in (None, first), "under another name vLLM's cache has nothing of it"
    assert known.identity(Lora(3, path)) is None
    known.cache_emptied()
    assert known.identity(Lora(3, path)) == second and known.identity(Lora(1, path)) is None
    assert known.identity(Lora(3, path)) is None, "what number 1 stands for is in the cache, too"


def test_the_way_in_which_the_files_are_read_is_part_of_it(tmp_path: Path) -> None:
    train(tmp_path / "a", 1)
    found = [Adapters(Clock()).identity(Lora(1, str(tmp_path / "a"), is_3d_lora_weight=how)) for how in (False, True)]
    assert None not in found and found[0] != found[1]


def test_an_unreadable_name_is_refused_and_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = Adapters(Clock())
    assert [known.identity(Lora(1, path)) for path in ("~nobody-here/a", "a\0b")] == [None, None]
    import huggingface_hub

    train(tmp_path / "snapshot", 1)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / "snapshot" / file))
    assert known.identity(Lora(2, "owner/adapter")) is not None
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert known.identity(Lora(3, "owner/adapter", "b")) is None, "vLLM looks for it elsewhere"
