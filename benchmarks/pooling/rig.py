"""The paper's machine at a stated scale: models, devices with their bandwidths, and pools over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from benchmarks.pool_fill import fill_pool
from benchmarks.pooling.paced_engines import FilePerChunkEngine, MemoryEngine
from penstock.bench.documents import BLOCK_TOKENS, Document
from penstock.bench.pool_raw import DEPTH
from penstock.core.keys import BlockKey, root_key
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock, prefix_position, tenant_tag
from penstock.engine.profile import Profile, load_profile
from penstock.io.api import BlockEngine
from penstock.io.open import open_engine
from penstock.io.paced import PacedEngine
from penstock.pacing import PaceClock
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.device import DeviceMember, open_device_member
from penstock.pool.members.header import HEADER_BYTES

MEMORY_BYTES_PER_S = 12e9
SSD_BYTES_PER_S = 14e9
UPLOAD_BYTES_PER_S = 55e9
"""Not in the paper. One thread copies about 12 GB/s from a memory module; an NVMe drive on PCIe 5.0 x4 reads 14 GB/s; a
GPU takes 55 GB/s of pinned memory over PCIe 5.0 x16, slightly more than all four devices provide."""
PAPER_BLOCKED_S = 13.8  # of its baseline on Qwen3-30B-A3B at 128K: the only baseline time that the paper prints
PAPER_KERNEL_SHARE = 0.84  # of the baseline's SSD retrieval time
BYTES_DIVISOR = 64
QUESTION_TOKENS = 100

Kind = Literal["memory", "ssd", "files"]


@dataclass(frozen=True, slots=True)
class Model:
    """`time_factor`: how much slower than the paper's machine its TTFTs run; short loads need more."""

    name: str
    profile: str
    time_factor: float
    gain_goals: dict[str, float]  # by baseline: TTFT of the baseline over ours, at 128K
    blocked_goals: dict[str, float]  # by baseline: compute time blocked on I/O over ours, at 128K

    def scaled(self, time_factor: float) -> Profile:
        """KV bytes / 64, times x `time_factor`, with this machine's upload link."""
        whole = replace(load_profile(self.profile), upload_bytes_per_s=UPLOAD_BYTES_PER_S, max_context_tokens=1 << 18)
        return whole.scaled(BYTES_DIVISOR, time_factor)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV of one token."""
        profile = load_profile(self.profile)
        return profile.layers * profile.layer_bytes_per_token

    @property
    def block_bytes(self) -> int:
        """Bytes of KV of one scaled block."""
        return BLOCK_TOKENS * self.bytes_per_token // BYTES_DIVISOR


MODELS = {
    model.name: model
    for model in (
        Model(
            "llama",
            "h100-llama-3.1-8b",
            1.5,
            {"serial": 2.9, "layerwise": 2.6, "async": 2.1},
            {"serial": 7.8, "layerwise": 2.7, "async": 1.7},
        ),
        Model(
            "gpt_oss",
            "h100-gpt-oss-20b",
            3.0,
            {"serial": 4.1, "layerwise": 3.7, "async": 3.3},
            {"serial": 23.2, "layerwise": 19.9, "async": 19.2},
        ),
        Model(
            "qwen3",
            "h100-qwen3-30b-a3b",
            1.5,
            {"serial": 3.7, "layerwise": 3.5, "async": 3.1},
            {"serial": 17.9},
        ),
    )
}
CONTEXTS = {"16k": 1 << 14, "32k": 1 << 15, "64k": 1 << 16, "128k": 1 << 17}


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the paper's machine: `bytes_per_s` is unscaled; with `files` it is an SSD with one file per chunk,
    whose bandwidth includes the time in the kernel's filesystem."""

    kind: Kind
    bytes_per_s: float
    weight: float
    room: float = 1.1  # capacity, as a share of the document


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the document is spread over the devices, and whether they are read one at a time."""

    name: str
    devices: tuple[Device, ...]
    serial: bool = False

    @property
    def bytes_per_s(self) -> float:
        """The sum of the bandwidths: the bound of a pooled read."""
        return sum(device.bytes_per_s for device in self.devices)


def file_bytes_per_s(kernel_s_per_gb: float) -> float:
    """An SSD with one file per chunk: each byte takes time in the device, then in the kernel's filesystem."""
    return 1.0 / (1.0 / SSD_BYTES_PER_S + kernel_s_per_gb / 1e9)


def pooled(memory: float = MEMORY_BYTES_PER_S, ssd: float = SSD_BYTES_PER_S, kind: Kind = "ssd") -> Arrangement:
    """2 memories and 2 SSDs, shares by bandwidth."""
    devices = (Device("memory", memory, memory),) * 2 + (Device(kind, ssd, ssd),) * 2
    return Arrangement("pooled" if kind == "ssd" else "pooling-alone", devices)


def memory_share(memory: float = MEMORY_BYTES_PER_S) -> float:
    """Share of a document that the baseline's memory holds: as much as one memory module of the pooled arrangement."""
    return memory / pooled(memory).bytes_per_s


def serial_s_per_byte(kernel_s_per_gb: float, memory: float = MEMORY_BYTES_PER_S) -> float:
    """Loading time of the serial baseline: one memory, then one SSD behind a file per chunk, then the upload."""
    share = memory_share(memory)
    return share / memory + (1 - share) / file_bytes_per_s(kernel_s_per_gb) + 1 / UPLOAD_BYTES_PER_S


def paper_kernel_s_per_gb() -> float:
    """The kernel filesystem's time per byte with which the serial baseline takes the time that the paper prints."""
    whole = PAPER_BLOCKED_S / (MODELS["qwen3"].bytes_per_token * CONTEXTS["128k"])
    share = memory_share()
    without = serial_s_per_byte(0.0)
    return (whole - without) / (1 - share) * 1e9


def memory_first(name: str, ssd: float, kind: Kind, memory_share: float, serial: bool) -> Arrangement:
    """One memory until it is full, the rest on one SSD."""
    memory = Device("memory", MEMORY_BYTES_PER_S, 1.0, memory_share)
    return Arrangement(name, (memory, Device(kind, ssd, 1e-9)), serial)


def document_root(profile: Profile, block_tokens: int = BLOCK_TOKENS) -> BlockKey:
    """The root key of blocks for an engine with a modelled runner of this profile."""
    from penstock.engine.modelled_runner import ModelledRunner

    runner = ModelledRunner(profile, block_tokens)
    return root_key(runner.layout.fingerprint(runner.model_id), "")


@dataclass(slots=True)
class Rig:
    """An open pool over paced devices. `pace(False)` lets them run at full speed, to fill them."""

    pool: LocalPool
    paced: list[PacedEngine]
    files: list[FilePerChunkEngine]
    clocks: list[PaceClock]
    speeds: list[float] = field(default_factory=list)

    def pace(self, on: bool) -> None:
        """Let the devices run at their stated rates, or at full speed."""
        for engine, speed in zip(self.paced, self.speeds, strict=True):
            engine.bytes_per_s = speed if on else 0.0

    def drop_page_cache(self) -> None:
        """Drop files from the page cache."""
        for engine in self.files:
            engine.drop_page_cache()


@contextlib.contextmanager
def open_rig(
    arrangement: Arrangement, folder: Path, block_bytes: int, blocks: int, time_factor: float
) -> Iterator[Rig]:
    """The arrangement's devices with room for `blocks`, at 1/64 of their bandwidth over `time_factor`."""
    extent = staging_bytes(block_bytes)
    shared = PaceClock()
    rig = Rig(None, [], [], [])  # type: ignore[arg-type]  # the pool follows
    members: list[DeviceMember] = []
    for number, device in enumerate(arrangement.devices):
        capacity = HEADER_BYTES + max(1, int(blocks * device.room)) * extent
        place = folder / f"{arrangement.name}-{number}"
        place.mkdir()
        inner = _engine(device, place, capacity, rig)
        engine = PacedEngine(inner, 0.0, shared if arrangement.serial else None)
        rig.paced.append(engine)
        rig.clocks.append(engine.clock)
        rig.speeds.append(device.bytes_per_s / BYTES_DIVISOR / time_factor)
        name = f"{device.kind}:{number}"
        members.append(open_device_member(name, str(place), engine, place / "slab.db"))
    rig.pool = LocalPool(members, [device.weight for device in arrangement.devices])
    try:
        yield rig
    finally:
        rig.pace(False)
        rig.pool.close(10.0)


def _engine(device: Device, place: Path, capacity: int, rig: Rig) -> BlockEngine:
    if device.kind == "memory":
        return MemoryEngine(capacity, DEPTH)
    if device.kind == "files":
        files = FilePerChunkEngine(place, capacity, DEPTH)
        rig.files.append(files)
        return files
    return open_engine(place / "slab", capacity, DEPTH)


def fill(rig: Rig, documents: Sequence[Document], block_bytes: int, tenant: str = "") -> None:
    """Write every block of the documents, unpaced. Raises the first PoolError, or TimeoutError without progress."""
    tag = tenant_tag(tenant)
    rig.pace(False)
    try:
        fill_pool(
            rig.pool,
            (
                NewBlock(key, one.chain.parent_of(index), block_bytes, prefix_position(one.keys[0], index), tag)
                for one in documents
                for index, key in enumerate(one.keys)
            ),
            block_bytes,
        )
    finally:
        rig.pace(True)
