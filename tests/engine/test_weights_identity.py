"""The identity of weights: every byte counts, nothing else does, and no shortcut is taken for a file that changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine import checkpoint, weights_identity
from penstock.engine.checkpoint import load_model
from penstock.engine.checkpoint_folder import CheckpointError, resolve_folder
from penstock.engine.remembered_digests import ENTRIES_MAX, RememberedDigests
from penstock.engine.weights_identity import FileState, WeightsChanged
from penstock.testing.tiny_models import build_tiny

MIB = 1 << 20
CPU = torch.device("cpu")
OLD_S = 3600.0
identity = weights_identity.weights_identity


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; returns the file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "penstock" / "weights.json"


@pytest.fixture
def now_is_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour has gone by since the files were made (their ctime cannot be set back)."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + int(OLD_S * 1e9))


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read, as they are."""
    names: list[str] = []
    real = weights_identity._sha256  # noqa: SLF001 (a fault is put in here)

    def seen(file: Path, progress: Any) -> str:
        names.append(file.name)
        return real(file, progress)

    monkeypatch.setattr(weights_identity, "_sha256", seen)
    return names


def weights(folder: Path, *sizes: int, seed: int = 1) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"model-{number:05}.safetensors" for number in range(len(sizes))]
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        file.write_bytes(random.Random(seed * 100 + number).randbytes(size))
    return files


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def test_any_changed_byte_changes_the_identity(tmp_path: Path) -> None:
    files = weights(tmp_path, 9 * MIB + 13, 70_000)
    first, places = identity(files), random.Random(3)
    sizes = [file.stat().st_size for file in files]
    trials = [(0, 0), (0, sizes[0] - 1), (1, sizes[1] - 1), *((0, places.randrange(sizes[0])) for _ in range(12))]
    for number, at in trials:
        flip(files[number], at)
        assert identity(files) != first, f"byte {at} of file {number}"
        flip(files[number], at)
    assert identity(files) == first


def test_paths_names_and_order_do_not_count(tmp_path: Path) -> None:
    files = weights(tmp_path / "a", 100_000, 200_000)
    copy = Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    others = [copy / file.name for file in files]
    assert identity(files) == identity(others) == identity(others[::-1])
    others[0].rename(copy / "zzz.safetensors")
    assert identity([others[1], copy / "zzz.safetensors"]) == identity(files)
    assert identity(files[:1]) != identity(files) != identity([files[0], files[0]])


def test_what_was_hashed_is_remembered_until_the_file_changes(
    tmp_path: Path, cache: Path, now_is_later: None, read_files: list[str]
) -> None:
    files = weights(tmp_path / "a", 50_000, 50_000)
    first = identity(files)
    assert len(read_files) == 2 and cache.stat().st_mode & 0o777 == 0o600
    assert cache.parent.stat().st_mode & 0o777 == 0o700
    assert identity(files) == first and len(read_files) == 2
    before = files[0].stat()
    flip(files[0], 40_000)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync --times or a careless tool leaves it
    assert identity(files) != first and read_files[2:] == [files[0].name]
    replaced = tmp_path / "new"
    replaced.write_bytes(files[1].read_bytes())
    replaced.replace(files[1])
    identity(files)
    assert read_files[3:] == [files[1].name], "another inode is another file"


def test_a_file_of_the_last_moments_is_not_remembered(tmp_path: Path, cache: Path, read_files: list[str]) -> None:
    """It could change again within one tick of its timestamps (git's racy index)."""
    files = weights(tmp_path / "a", 50_000)
    assert identity(files) == identity(files) and len(read_files) == 2 and not cache.exists()


def test_a_file_that_was_remembered_and_is_of_the_last_moments_is_hashed(tmp_path: Path, read_files: list[str]) -> None:
    (file,) = weights(tmp_path / "a", 50_000)
    memory = RememberedDigests.of_user()
    as_it_is = weights_identity._key(FileState.of(file))  # noqa: SLF001 (a wrong entry is put in)
    memory.remember({str(file): (as_it_is, "0" * 64)})
    identity([file])
    assert read_files == [file.name]


def garbage(file: Path) -> None:
    file.write_bytes(b"\xff\x00 no json")


def other_digest(file: Path) -> None:
    record = json.loads(file.read_text())
    for entry in record["files"].values():
        entry[1] = "0" * 64
    file.write_text(json.dumps(record))


def open_to_others(file: Path) -> None:
    other_digest(file)
    file.chmod(0o644)


def a_link(file: Path) -> None:
    other = file.with_name("elsewhere")
    file.rename(other)
    file.symlink_to(other)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder_of_all(file: Path) -> None:
    file.parent.chmod(0o777)


def other_shapes(file: Path) -> None:
    file.write_text(json.dumps({"version": "penstock digests 1", "files": {"/x": 3, "/y": [[1], 2, 3], "/z": [[]]}}))


@pytest.mark.parametrize(
    "harm",
    [garbage, other_digest, open_to_others, a_link, a_folder, a_fifo, folder_of_all, other_shapes],
)
def test_a_harmed_cache_costs_time_only(
    harm: Callable[[Path], None], tmp_path: Path, cache: Path, now_is_later: None, read_files: list[str]
) -> None:
    files = weights(tmp_path / "a", 50_000)
    first = identity(files)
    harm(cache)
    assert identity(files) == first and len(read_files) == 2
    assert identity(files) == first


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now_is_later: None
) -> None:
    files = weights(tmp_path / "a", 50_000)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert identity(files) == identity(files)


def test_the_cache_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    memory = RememberedDigests(tmp_path / "own" / "weights.json")
    for begin in range(0, ENTRIES_MAX + 200, 1000):
        memory.remember({f"/m/{n}": ((1, n), f"{n:064x}") for n in range(begin, min(begin + 1000, ENTRIES_MAX + 200))})
    again = RememberedDigests(tmp_path / "own" / "weights.json")
    assert again.digest("/m/0", (1, 0)) is None and again.digest("/m/4000", (1, 4000)) == f"{4000:064x}"
    assert again.digest("/m/4000", (1, 4001)) is None


def test_processes_that_write_at_once_leave_a_whole_cache(tmp_path: Path) -> None:
    path = tmp_path / "own" / "weights.json"

    def write(part: int) -> None:
        for n in range(20):
            RememberedDigests(path).remember({f"/{part}/{n}": ((part, n), f"{part * 100 + n:064x}")})

    threads = [threading.Thread(target=write, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = json.loads(path.read_text())
    assert 20 <= len(record["files"]) <= 120
    assert [other.name for other in path.parent.iterdir()] == ["weights.json"]


# --- hub caches ---


def hub(folder: Path, content: bytes, name: str | None = None) -> tuple[Path, Path]:
    """A snapshot's file and its blob, as huggingface_hub lays them out."""
    blob = folder / "models--own--tiny" / "blobs" / (name or hashlib.sha256(content).hexdigest())
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    return link_to(blob, "a" * 40), blob


def link_to(blob: Path, revision: str) -> Path:
    file = blob.parent.parent / "snapshots" / revision / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.symlink_to(Path("../../blobs") / blob.name)
    return file


def test_a_hub_snapshot_is_known_by_its_name_and_agrees_with_a_folder(
    tmp_path: Path, now_is_later: None, read_files: list[str]
) -> None:
    content = random.Random(5).randbytes(80_000)
    file, _ = hub(tmp_path / "hub", content)
    named = identity([file])
    assert not read_files
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(content)
    assert identity([plain]) == named and read_files == [plain.name]


def test_a_blob_that_was_changed_in_place_is_hashed(tmp_path: Path, now_is_later: None, read_files: list[str]) -> None:
    """`save_file` into a snapshot writes through the link, and the blob keeps its name."""
    file, blob = hub(tmp_path / "hub", random.Random(5).randbytes(80_000))
    first = identity([file])
    wait_for_a_tick(tmp_path)
    flip(file, 7)
    assert identity([file]) != first and read_files
    link_to(blob, "b" * 40)  # another revision with the same file: the older link still tells
    assert identity([blob.parent.parent / "snapshots" / ("b" * 40) / "model.safetensors"]) != first


def wait_for_a_tick(folder: Path) -> None:
    """Until a file made now has another time than one made before."""
    (folder / "tick").touch()
    first = (folder / "tick").stat().st_mtime_ns
    while (folder / "tick").stat().st_mtime_ns == first:
        (folder / "tick").touch()


def test_a_blob_of_the_last_moments_is_hashed(tmp_path: Path, read_files: list[str]) -> None:
    file, _ = hub(tmp_path / "hub", b"x" * 1000)
    identity([file])
    assert read_files


@pytest.mark.parametrize("where", ["sha1", "no cache", "other model", "no link"])
def test_other_names_are_not_taken_for_content(
    where: str, tmp_path: Path, now_is_later: None, read_files: list[str]
) -> None:
    lie = "0" * 64
    if where == "sha1":
        file, _ = hub(tmp_path / "hub", b"x" * 1000, "0" * 40)
    elif where == "no link":
        _, file = hub(tmp_path / "hub", b"x" * 1000, lie)
    elif where == "other model":
        _, blob = hub(tmp_path / "hub", b"x" * 1000, lie)
        file = tmp_path / "hub" / "models--own--other" / "snapshots" / "main" / "model.safetensors"
        file.parent.mkdir(parents=True)
        file.symlink_to(blob)
    else:
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / lie).write_bytes(b"x" * 1000)
        file = tmp_path / "model.safetensors"
        file.symlink_to(tmp_path / "blobs" / lie)
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * 1000)
    assert identity([file]) == identity([plain]) and len(read_files) == 2


def test_a_revision_is_the_snapshot_that_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--own--tiny"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for name, commit in commits.items():
        build_tiny("llama", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)

    def resolved(revision: str | None) -> str:
        return resolve_folder("own/tiny", "auto", revision, tmp_path / "hub").name

    assert resolved(None) == resolved("main") == commits["main"]
    assert resolved("v2") == resolved(commits["v2"]) == commits["v2"]
    with pytest.raises(CheckpointError, match="'own/tiny' at revision 'v3' is no existing folder"):
        resolved("v3")
    with pytest.raises(CheckpointError, match="could not be loaded from the hub"):
        resolve_folder("own/tiny", "auto", None, tmp_path / "other")


# --- files that change ---


def test_a_file_that_is_written_to_while_it_is_hashed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = weights(tmp_path / "a", 50_000)
    real = weights_identity._sha256  # noqa: SLF001 (a fault is put in here)

    def meanwhile(path: Path, progress: Any) -> str:
        digest = real(path, progress)
        wait_for_a_tick(tmp_path)
        flip(path, 3)
        return digest

    monkeypatch.setattr(weights_identity, "_sha256", meanwhile)
    with pytest.raises(WeightsChanged, match="written to while it was read"):
        identity([file])


def test_long_hashing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights_identity, "PROGRESS_AFTER_S", -1.0)
    with caplog.at_level(logging.INFO):
        identity(weights(tmp_path / "a", 9 * MIB, 5 * MIB))
    lines = [record.message for record in caplog.records if "hashing the weights" in record.message]
    assert len(lines) == 1 and "% of 0.0 GB" in lines[0]


# --- models ---


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path, one_thread: None) -> Path:
    return build_tiny("llama", tmp_path / "llama")


def test_one_tensor_changed_in_place_is_another_model(tiny: Path) -> None:
    first = load_model(str(tiny), "auto", "auto", CPU, 0).identity
    file = tiny / "model.safetensors"
    for at in range(file.stat().st_size - 40_000, file.stat().st_size, 9_999):
        flip(file, at)
        assert load_model(str(tiny), "auto", "auto", CPU, 0).identity != first
        flip(file, at)
    assert load_model(str(tiny), "auto", "auto", CPU, 0).identity == first


def test_a_checkpoint_that_is_replaced_in_place_does_not_change_a_model_that_runs(tiny: Path) -> None:
    model = load_model(str(tiny), "auto", "auto", CPU, 0).model
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    file = tiny / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(200_000)
        stream.write(bytes(file.stat().st_size - 200_000))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    with file.open("r+b") as stream:
        stream.truncate(0)  # a mapped file that is cut ends the process that reads it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_weights_that_are_written_to_while_they_are_loaded_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint._load_weights  # noqa: SLF001 (a fault is put in here)

    def meanwhile(*arguments: Any) -> Any:
        model = real(*arguments)
        wait_for_a_tick(tmp_path)
        flip(tiny / "model.safetensors", (tiny / "model.safetensors").stat().st_size - 5)
        return model

    monkeypatch.setattr(checkpoint, "_load_weights", meanwhile)
    with pytest.raises(CheckpointError, match="written to while"):
        load_model(str(tiny), "auto", "auto", CPU, 0)


def test_every_file_that_a_reader_may_take_counts(tiny: Path) -> None:
    """Beside a single file an index is not read by transformers, but it was the one that was hashed."""
    shutil.copy(tiny / "model.safetensors", tiny / "shard.safetensors")
    record = {"metadata": {}, "weight_map": {"model.norm.weight": "shard.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(record))
    first = load_model(str(tiny), "auto", "auto", CPU, 0).identity
    for name in ("model.safetensors", "shard.safetensors"):
        flip(tiny / name, (tiny / name).stat().st_size - 5)
        changed = load_model(str(tiny), "auto", "auto", CPU, 0).identity
        assert changed != first
        first = changed


def test_weights_under_a_name_of_the_configurations_own_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "other.safetensors")
    file = tiny / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"transformers_weights is 'other\.safetensors'"):
        load_model(str(tiny), "auto", "auto", CPU, 0)


def test_an_error_while_loading_ends_the_hashing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, began = threading.Event(), threading.Event()
    real = weights_identity._Progress.add  # noqa: SLF001 (a fault is put in here)

    def slowly(self: Any, moved_bytes: int) -> None:
        began.set()
        try:
            assert self.stopped.wait(60.0)
            real(self, moved_bytes)
        except BaseException:
            ended.set()
            raise

    def failing(*arguments: Any) -> Any:
        assert began.wait(60.0)
        raise ValueError("a broken model")

    monkeypatch.setattr(weights_identity._Progress, "add", slowly)  # noqa: SLF001 (a fault is put in here)
    monkeypatch.setattr(checkpoint, "_load_weights", failing)
    with pytest.raises(CheckpointError, match="a broken model"):
        load_model(str(tiny), "auto", "auto", CPU, 0)
    assert ended.is_set()


def test_an_adapter_is_refused(tiny: Path) -> None:
    (tiny / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="an adapter is not served"):
        load_model(str(tiny), "auto", "auto", CPU, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"rms_norm_eps": 1e-4},
        {"dtype": "bfloat16"},
        {"hidden_act": "gelu"},
    ],
)
def test_what_kv_depends_on_in_the_configuration_counts(change: dict[str, object], tiny: Path) -> None:
    first = load_model(str(tiny), "auto", "auto", CPU, 0).identity
    file = tiny / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert load_model(str(tiny), "auto", "auto", CPU, 0).identity != first


def test_files_that_kv_does_not_depend_on_do_not_count(tiny: Path) -> None:
    first = load_model(str(tiny), "auto", "auto", CPU, 0).identity
    (tiny / "README.md").write_text("a tiny model")
    (tiny / "generation_config.json").write_text('{"eos_token_id": 3}')
    (tiny / "tokenizer_config.json").write_text("{}")
    assert load_model(str(tiny), "auto", "auto", CPU, 0).identity == first


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_of_the_request_is_refused_in_its_old_spelling_too(
    kind: str, tiny: Path
) -> None:
    file = tiny / "config.json"
    record = json.loads(file.read_text())
    record.pop("rope_parameters", None)
    half = record["head_dim"] // 2 if record.get("head_dim") else 8
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half} if kind == "longrope" else {}
    record["rope_scaling"] = {"type": kind, "factor": 2.0, **factors}
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="cannot be reused"):
        load_model(str(tiny), "dummy", "auto", CPU, 0)
