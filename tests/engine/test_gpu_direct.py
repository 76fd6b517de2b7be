"""An engine whose blocks of pool nodes land in its device's memory, past the host's: same tokens, also when blocks are
damaged there or at the node, when the device cannot verify, and when the node is killed under a read. The device is the
CPU; all but the calls of CUDA's driver is as with a GPU."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.config import ConfigError
from penstock.device.accelerator import Accelerator, Cpu, DeviceError
from penstock.engine import build
from penstock.engine.api import GenerationRequest
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.engine import new_request_id
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.engine.upload_source import DeviceBlock
from penstock.extras import EXTRAS
from penstock.io.device_memory import DeviceMemory
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import memory_attachment, ways
from penstock.pool.net.nixl_agent import NixlAgent, NixlTransfer
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Operation, Span
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.asking import WAIT_S, Answer, prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, WatchedRunner, serving
from tests.engine.test_kv_over_nodes import Node
from tests.pool.net.one_sided_rig import NIXL, counted

pytestmark = NIXL
BLOCKS = 18
PROMPT = prompt_of(401, BLOCKS * BLOCK + 5)
MIB = 1 << 20


class Watched(Cpu):
    """A device that remembers its memory for cards, and can be told to fail."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.landing: list[DeviceMemory] = []
        self.fails = False
        self.verified = 0

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        self.landing.append(super().allocate_landing(size_bytes))
        return self.landing[-1]

    def free_landing(self, memory: DeviceMemory) -> None:
        self.landing.remove(memory)
        super().free_landing(memory)

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        if self.fails:
            raise DeviceError("the device is lost (injected)")
        self.verified += len(addresses)
        return super().checksums(addresses, seeds, size_bytes)


class Sources(WatchedRunner):
    """Where blocks are uploaded from."""

    def __init__(self, inner: HFRunner) -> None:
        super().__init__(inner)
        self.of_device = self.of_host = 0

    def start_upload(self, blocks: Any, followed: bool = True) -> Any:
        on_device = sum(isinstance(source, DeviceBlock) for source, _ in blocks)
        self.of_device += on_device
        self.of_host += len(blocks) - on_device
        return super().start_upload(blocks, followed)


class Served:
    """A pool node of this process, and its client."""

    def __init__(self) -> None:
        self.local = open_local_pool([32 * MIB], [])
        self.node = PoolNode(self.local, "127.0.0.1", 0, one_sided=NixlAgent())
        self.pool = RemotePool(*self.node.address)

    def close(self) -> None:
        self.pool.close(5.0)
        self.node.close(5.0)
        self.local.close(5.0)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def fill(runner: HFRunner, pool: RemotePool, want: list[int]) -> None:
    """The prompt's blocks are in the pool; nothing of them in L1 afterwards."""
    with serving(runner, pool) as rig:
        assert rig.ask(PROMPT).tokens == want


def attached(address: str) -> None:
    wait_until(lambda: ", into device memory" in ways.states()[address], "the way to the device")


def test_the_same_tokens_and_no_byte_in_the_hosts_staging_memory(
    llama: HFRunner, computed: Callable[..., list[int]], served: Served
) -> None:
    want, size = computed(PROMPT), llama.layout.full_block_bytes
    fill(llama, served.pool, want)
    device, runner = Watched(), Sources(llama)
    with counted() as read, serving(runner, served.pool, lands_on=device) as rig:
        attached(served.pool.place)
        answer = rig.ask(PROMPT)
        assert answer.tokens == want and answer.report.loaded_bytes == BLOCKS * size
        assert not answer.report.load_failures
    assert read == {"messages": 0, "one-sided": 0, "device": BLOCKS * size}
    assert (runner.of_device, runner.of_host) == (BLOCKS, 0) and device.verified == BLOCKS, "each was verified"


def test_blocks_of_this_process_and_other_prompts_share_the_slots(
    llama: HFRunner, computed: Callable[..., list[int]], served: Served
) -> None:
    """More blocks than slots: a slot takes blocks that landed, blocks that did not, and blocks on their way out."""
    prompts = [prompt_of(410 + at, 9 * BLOCK + 3) for at in range(4)]
    wants = [computed(prompt) for prompt in prompts]
    with serving(llama, served.pool) as rig:
        for prompt, want in zip(prompts[:3], wants[:3], strict=True):
            assert rig.ask(prompt).tokens == want
    device, runner = Watched(), Sources(llama)
    with serving(runner, served.pool, lands_on=device, l2_slots=5, l1_pages=32) as rig:
        attached(served.pool.place)
        for turn in range(2):
            asked = [rig.start(prompt) for prompt in prompts]
            for answer, want in zip(asked, wants, strict=True):
                assert answer.wait().finish_reason == "length" and answer.tokens == want
            if not turn:
                device.fails = True  # from now on all come in messages, or one-sided into the host's memory
    assert runner.of_device and runner.of_host


def test_blocks_that_are_damaged_on_the_device_come_again(
    llama: HFRunner, computed: Callable[..., list[int]], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, size = computed(PROMPT), llama.layout.full_block_bytes

    class Spoiling(NixlAgent):
        """What lands first of each transfer is damaged."""

        def begin(
            self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
        ) -> NixlTransfer:
            found = super().begin(operation, peer, spans, local)
            if local is None or spans[0][2] != size:
                return found
            wait_until(found.ended, "the transfer's end")
            ctypes.memset(spans[0][0] + 100, 0xA5, 8)
            return found

    fill(llama, served.pool, want)
    monkeypatch.setattr(memory_attachment, "open_agent", lambda kind: Spoiling())
    again = RemotePool(*served.node.address)
    try:
        with counted() as read, serving(llama, again, lands_on=Watched()) as rig:
            attached(again.place)
            answer = rig.ask(PROMPT)
            assert answer.tokens == want and answer.report.loaded_bytes == BLOCKS * size
            assert not answer.report.load_failures, "in messages they were whole"
        assert read["messages"] > 0
    finally:
        again.close(5.0)


def damage(pool: LocalPool) -> None:
    """A byte of every block in the memory member."""
    (memory,) = pool.host_buffers()
    for at in range(1000, len(memory), 4096):
        memory[at] ^= 0xFF


def test_blocks_that_are_damaged_at_the_node_are_computed_again(
    llama: HFRunner, computed: Callable[..., list[int]], served: Served
) -> None:
    want = computed(PROMPT)
    fill(llama, served.pool, want)
    damage(served.local)
    runner = Sources(llama)
    with serving(runner, served.pool, lands_on=Watched()) as rig:
        attached(served.pool.place)
        answer = rig.ask(PROMPT)
        assert answer.tokens == want
        assert answer.report.load_failures and set(answer.report.load_failures) <= {"checksum", "missing"}
    assert runner.of_device == runner.of_host == 0


def test_a_device_that_cannot_verify_leaves_blocks_to_the_host(
    llama: HFRunner, computed: Callable[..., list[int]], served: Served
) -> None:
    want, size = computed(PROMPT), llama.layout.full_block_bytes
    fill(llama, served.pool, want)
    device, runner = Watched(), Sources(llama)
    device.fails = True
    with counted() as read, serving(runner, served.pool, lands_on=device) as rig:
        attached(served.pool.place)
        answer = rig.ask(PROMPT)
        assert answer.tokens == want and answer.report.loaded_bytes == BLOCKS * size
    assert "device" not in read and (runner.of_device, runner.of_host) == (0, BLOCKS)


@pytest.mark.slow
def test_a_node_killed_under_a_read(
    llama: HFRunner, computed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks whose transfers had not ended are computed; those that landed before are used."""
    want, size = computed(PROMPT), llama.layout.full_block_bytes
    node = Node(rdma=True)
    started: list[int] = []

    class Killing(NixlAgent):
        def begin(
            self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
        ) -> NixlTransfer:
            if local is not None and spans[0][2] == size:
                started.append(len(spans))
                if len(started) == 2:
                    node.send(signal.SIGKILL)
                    node.process.wait(10)
            return super().begin(operation, peer, spans, local)

    monkeypatch.setattr(memory_attachment, "open_agent", lambda kind: Killing())
    host, port = node.address.rsplit(":", 1)
    pool = RemotePool(host, int(port))
    try:
        fill(llama, pool, want)
        with serving(llama, pool, lands_on=Watched(), fetch_window_blocks=2) as rig:
            attached(pool.place)
            answer = rig.ask(PROMPT)
            assert answer.tokens == want
            assert answer.report.load_failures and set(answer.report.load_failures) <= {"network", "deadline"}
        assert len(started) >= 2
    finally:
        pool.close(5.0)
        node.close()


def config_of(folder: Path, *pool: str, **more: Any) -> EngineConfig:
    given: dict[str, Any] = {
        "block_tokens": BLOCK,
        "dtype": "float32",
        "device": "cpu",
        "kv_memory_bytes": 8 * MIB,
    } | more
    return EngineConfig(model=str(folder), pool=pool, staging_bytes=4 * MIB, gpu_direct=True, **given)


@pytest.mark.slow
def test_build_engine_with_gpu_direct(
    tiny: Callable[[str], Path], computed: Callable[..., list[int]], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: the second one loads. The memory is given back in the end."""
    freed: list[int] = []
    free = Cpu.free_landing
    monkeypatch.setattr(Cpu, "free_landing", lambda self, memory: (freed.append(memory.size_bytes), free(self, memory)))
    for loads in (False, True):
        running = build_engine(config_of(tiny("llama"), served.pool.place))
        try:
            if loads:
                attached(served.pool.place)
            answer = Answer()
            sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            with counted() as read:
                running.engine.submit(GenerationRequest(new_request_id(), PROMPT, sampling), answer)
                assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
            assert running.engine.wait_idle(WAIT_S)
            assert bool(read.get("device")) == loads
        finally:
            running.close(5.0)
        assert len(freed) == 1 + loads, "the memory is given back"


def test_gpu_direct_says_what_is_missing(
    tiny: Callable[[str], Path], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    for settings, why in (
        ({}, "without pool nodes; allowed: with pool, or pool_config"),
        ({"executor": "modelled"}, "with executor 'modelled', which has no device; allowed: real"),
        ({"pool_key_file": "key"}, "together with pool_key_file; allowed: one or the other"),
    ):
        with pytest.raises(ConfigError, match=f"gpu_direct is set {why}"):
            config_of(folder, *([served.pool.place] if "pool_key_file" in settings else []), **settings)

    def none(self: Accelerator, size_bytes: int) -> DeviceMemory:
        raise DeviceError("device 0 does not support GPUDirect RDMA")

    with monkeypatch.context() as patched:
        patched.setattr(Cpu, "allocate_landing", none)
        with pytest.raises(ConfigError, match="blocks cannot land on cpu: device 0 does not support GPUDirect RDMA"):
            build_engine(config_of(folder, served.pool.place))
    monkeypatch.setattr(build, "missing_modules", EXTRAS.__getitem__)
    with pytest.raises(ConfigError, match=r"nixl_cu12, ibverbs are not installed; allowed: with penstock\[nixl\]"):
        build_engine(config_of(folder, served.pool.place))
