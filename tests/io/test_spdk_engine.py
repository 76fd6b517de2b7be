"""The `spdk` engine and its shim: memory, splitting, errors, loss of the controller, threads, and how it opens."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.io import IoOp, aligned_buffer
from penstock.io.memory import address_of
from penstock.io.spdk import SpdkEngine, SpdkEnvironment, open_spdk
from penstock.io.spdk import engine as engine_module
from penstock.io.spdk.dma import CHUNK_BYTES
from tests.io import spdk_rig
from tests.io.block_io import outcomes, run
from tests.io.spdk_rig import StandIn

Opened = Callable[[SpdkEngine], SpdkEngine]

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def standin() -> Iterator[StandIn]:
    made = spdk_rig.standin()
    yield made
    for name in ("iommu", "no_dma", "no_register"):
        made.set_global(name, 0)
    assert made.offence() == ""


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Engines that are closed at the end."""
    engines: list[SpdkEngine] = []

    def keep(engine: SpdkEngine) -> SpdkEngine:
        engines.append(engine)
        return engine

    yield keep
    for engine in engines:
        engine.close(10)


def noise(length: int) -> memoryview:
    buffer = aligned_buffer(length)
    buffer[:] = os.urandom(length)
    return buffer


def chunk_aligned(length: int) -> memoryview:
    """Memory whose address is a multiple of 2 MiB."""
    memory = aligned_buffer(length + CHUNK_BYTES)
    skip = -address_of(memory) % CHUNK_BYTES
    return memory[skip : skip + length]


@pytest.mark.parametrize("transport", ["TCP", "PCIE", "VFIOUSER", "RDMA"])
def test_operations_go_out_in_pieces_of_the_drives_limit(standin: StandIn, opened: Opened, transport: str) -> None:
    drive = standin.drive(transport, transfer_bytes=(64 << 10) + 512)
    engine = opened(drive.open())
    source, target = noise(MIB + PAGE), aligned_buffer(MIB + PAGE)
    assert run(engine, IoOp("write", 3 * PAGE, source, "w")) == {"w": None}
    assert run(engine, IoOp("read", 3 * PAGE, target, "r")) == {"r": None}
    assert target == source
    assert drive.path.read_bytes()[3 * PAGE :][: len(source)] == source
    assert (drive.get("largest"), drive.get("writes"), drive.get("reads")) == (64 << 10, 17, 17)


def test_memory_of_a_drive_without_iommu_is_copied_and_a_note_says_so(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive("PCIE", size_bytes=48 * MIB, transfer_bytes=MIB)
    engine = opened(drive.open(depth=2))
    memory = chunk_aligned(24 * MIB)
    engine.register(memory)
    assert any("no IOMMU" in note for note in engine.notes) and standin.dma_regions(registered=True) == 0
    memory[:] = os.urandom(len(memory))
    before = bytes(memory)
    assert run(engine, IoOp("write", MIB, memory, "w")) == {"w": None}  # more pieces than there are buffers
    memory[:] = bytes(len(memory))
    assert run(engine, IoOp("read", MIB, memory, "r")) == {"r": None}
    assert memory == before and drive.get("direct") == 0


def test_registered_memory_is_used_directly_by_two_engines_until_both_closed(standin: StandIn, opened: Opened) -> None:
    standin.set_global("iommu", 1)
    drives = [standin.drive("PCIE", size_bytes=8 * MIB) for _ in range(2)]
    engines = [opened(drive.open()) for drive in drives]
    memory = chunk_aligned(6 * MIB)
    for engine in engines:
        engine.register(memory[PAGE:])  # two whole chunks lie inside
        engine.register(memory[PAGE:])
    assert standin.dma_regions(registered=True) == 2
    memory[:] = os.urandom(len(memory))
    before = bytes(memory)
    for drive, engine in zip(drives, engines, strict=True):
        inside = IoOp("write", 0, memory[2 * MIB : 6 * MIB], "inside")
        outside = IoOp("write", 4 * MIB, memory[MIB : 3 * MIB], "outside")
        assert run(engine, inside, outside) == {"inside": None, "outside": None}
        assert drive.get("direct") == 4 * MIB // (128 << 10)
    engines[0].close(5)
    assert standin.dma_regions(registered=True) == 2
    memory[:] = bytes(len(memory))
    assert run(engines[1], IoOp("read", 0, memory[2 * MIB : 6 * MIB], 1)) == {1: None}
    assert memory[4 * MIB :] == before[4 * MIB :]
    engines[1].close(5)
    assert standin.dma_regions(registered=True) == 0 and standin.dma_regions(registered=False) == 0


def test_memory_that_spdk_refuses_is_copied(standin: StandIn, opened: Opened) -> None:
    standin.set_global("iommu", 1)
    standin.set_global("no_register", 1)
    engine = opened(standin.drive("PCIE").open())
    memory = chunk_aligned(4 * MIB)
    engine.register(memory)
    assert any("refused 2 of 2" in note for note in engine.notes)
    assert run(engine, IoOp("write", 0, memory, 1)) == {1: None}


@pytest.mark.parametrize("transport", ["TCP", "PCIE"])
def test_an_nvme_error_fails_its_operation_once_and_no_other(standin: StandIn, opened: Opened, transport: str) -> None:
    drive = standin.drive(transport)
    engine = opened(drive.open())
    for name, value in {"fail_from": 2048, "fail_to": 2049, "sct": 2, "sc": 0x81}.items():
        drive.set(name, value)
    memory = aligned_buffer(6 * MIB)
    outcome = run(engine, IoOp("read", 0, memory[: 4 * MIB], "bad"), IoOp("read", 2 * MIB, memory[4 * MIB :], "good"))
    error = outcome["bad"]
    assert outcome["good"] is None and error is not None and error.errno == errno.EIO
    assert "MEDIA ERROR: UNRECOVERED READ ERROR (sct 0x2, sc 0x81)" in str(error) and drive.key in str(error)
    drive.set("fail_to", 0)
    assert run(engine, IoOp("read", 0, memory[: 4 * MIB], "again")) == {"again": None}


def test_a_drive_cut_short_is_an_error(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    engine = opened(drive.open())
    os.truncate(drive.path, MIB)
    error = run(engine, IoOp("read", MIB - PAGE, aligned_buffer(2 * PAGE), 1))[1]
    assert error is not None and error.errno == errno.EIO


@pytest.mark.parametrize("how", ["removed", "removed_admin"])
@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("transport", ["TCP", "PCIE"])
def test_a_lost_controller_ends_every_operation_with_an_error(
    standin: StandIn, opened: Opened, how: str, silent: int, transport: str
) -> None:
    drive = standin.drive(transport)
    engine = opened(drive.open(depth=4))
    drive.set("held")
    drive.set("silent", silent)
    memory = aligned_buffer(8 * MIB)
    engine.submit([IoOp("read", n * 2 * MIB, memory[n * 2 * MIB : (n + 1) * 2 * MIB], n) for n in range(3)])
    drive.until("reads", 16)
    drive.set(how)
    outcome = outcomes(engine)
    for error in outcome.values():
        assert error is not None and error.errno == errno.ENODEV and "the controller is lost" in str(error)
    assert len(outcome) == 3
    error = run(engine, IoOp("write", 0, memory[:PAGE], "late"))["late"]
    assert error is not None and error.errno == errno.ENODEV
    with pytest.raises(OSError, match="the controller is lost"):
        engine.sync()
    engine.close(5)
    for name in ("held", how, "silent"):
        drive.set(name, 0)
    again = opened(drive.open())
    assert run(again, IoOp("read", 0, memory[:PAGE], 1)) == {1: None}


def test_a_refusal_for_want_of_requests_is_only_a_delay(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    engine = opened(drive.open())
    drive.set("busy_submits", 40)
    source, target = noise(MIB), aligned_buffer(MIB)
    assert run(engine, IoOp("write", 0, source, 1)) == {1: None}
    drive.set("busy_submits", 3)
    engine.sync()
    assert run(engine, IoOp("read", 0, target, 2)) == {2: None}
    assert target == source and drive.get("busy_submits") == 0 and drive.get("flushes") == 1


def test_close_with_operations_that_never_end(standin: StandIn) -> None:
    drive = standin.drive()
    engine = drive.open(depth=2)
    drive.set("held")
    engine.submit([IoOp("write", 0, noise(PAGE), "stuck")])
    assert engine.poll(0.01) == []
    with pytest.raises(TimeoutError, match="1 operations"):
        engine.close(0.05)
    assert engine.in_flight() == 1
    drive.set("held", 0)
    engine.close(20)
    assert [(done.tag, done.error) for done in engine.poll(0)] == [("stuck", None)]
    engine.wake()
    with pytest.raises(ValueError, match="is closed"):
        engine.sync()


def test_wake_ends_a_poll_in_progress_or_the_next_one(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    engine = opened(drive.open())
    drive.set("held")
    engine.submit([IoOp("read", 0, aligned_buffer(PAGE), 1)])
    engine.wake()
    started_s = time.monotonic()
    assert engine.poll(200) == []
    woken = threading.Event()
    thread = threading.Thread(target=lambda: (engine.poll(200), woken.set()))
    thread.start()
    while not woken.wait(0.01):
        engine.wake()
    thread.join()
    assert time.monotonic() - started_s < 100
    drive.set("held", 0)
    assert outcomes(engine) == {1: None}


def test_sync_flushes_from_another_thread_while_polling(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    engine = opened(drive.open())
    drive.set("delay_us", 2000)
    thread = threading.Thread(target=engine.sync)
    engine.submit([IoOp("write", n * MIB, noise(MIB), n) for n in range(4)])
    thread.start()
    assert outcomes(engine) == dict.fromkeys(range(4))
    thread.join(20)
    assert not thread.is_alive() and drive.get("flushes") == 1


def test_sync_says_when_the_flush_fails_and_skips_a_drive_without_a_cache(
    standin: StandIn, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = standin.drive()
    engine = opened(drive.open())
    drive.set("flush_sc", 6)
    with pytest.raises(OSError, match="sc 0x6"):
        engine.sync()
    drive.set("flush_sc", 0)
    monkeypatch.setattr(engine_module, "SYNC_TIMEOUT_S", 0.05)
    drive.set("held")
    with pytest.raises(TimeoutError, match="did not end in time"):
        engine.sync()
    drive.set("held", 0)
    without = standin.drive()
    without.set("no_flush")
    opened(without.open()).sync()
    assert without.get("flushes") == 0


def test_the_admin_queue_is_polled_while_nothing_else_happens(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    opened(drive.open())
    drive.until("admin_polls", drive.get("admin_polls") + 5)


def test_a_polling_thread_on_a_core_of_its_own(standin: StandIn, opened: Opened) -> None:
    drive = standin.drive()
    engine = opened(drive.open(cpu=min(os.sched_getaffinity(0))))
    source, target = noise(2 * MIB), aligned_buffer(2 * MIB)
    assert run(engine, IoOp("write", 0, source, 1)) == {1: None}
    assert run(engine, IoOp("read", 0, target, 2)) == {2: None}
    assert target == source and not any("no core of its own" in note for note in engine.notes)


def test_two_engines_work_side_by_side_and_one_namespace_opens_once(standin: StandIn, opened: Opened) -> None:
    drives = [standin.drive("TCP"), standin.drive("PCIE")]
    engines = [opened(drive.open()) for drive in drives]
    with pytest.raises(BlockingIOError, match="open in this process"):
        drives[0].open()
    for round_number in range(20):
        for engine in engines:
            engine.submit([IoOp("write", round_number * PAGE, noise(PAGE), round_number)])
        for engine in engines:
            assert outcomes(engine) == {round_number: None}


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"namespaces": 0}, {}, "no active namespace 1"),
        ({"no_queue": 1}, {}, "no I/O queue pair"),
        ({}, {"metadata_bytes": 8}, "formatted with metadata"),
        ({}, {"lba_bytes": 520, "size_bytes": 520 * 8192}, "do not divide 4096"),
        ({}, {"transfer_bytes": 2048}, "less than 4096 bytes at once"),
    ],
)
def test_drives_that_do_not_do_are_refused_in_one_line(
    standin: StandIn, settings: dict[str, int], shape: dict[str, Any], message: str
) -> None:
    drive = standin.drive(**shape)
    for name, value in settings.items():
        drive.set(name, value)
    with pytest.raises(OSError, match=message) as caught:
        drive.open(capacity_bytes=MIB)
    assert drive.key in str(caught.value) and "\n" not in str(caught.value)


def test_too_small_absent_or_without_memory(standin: StandIn) -> None:
    with pytest.raises(OSError, match="has 8388608 bytes, fewer than the capacity of 16777216") as caught:
        standin.drive().open(capacity_bytes=16 * MIB)
    assert caught.value.errno == errno.ENOSPC
    gone = standin.drive()
    gone.path.unlink()
    with pytest.raises(OSError, match=r"Failed to connect to 127\.0\.0\.1"):
        gone.open(capacity_bytes=MIB)
    standin.set_global("no_dma", 1)
    with pytest.raises(OSError, match=r"vm\.nr_hugepages"):
        standin.drive("PCIE").open()
    assert standin.dma_regions(registered=False) == 0


def test_a_target_that_does_not_answer_is_given_up_and_can_be_opened_later(
    standin: StandIn, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = standin.drive()
    drive.set("connect_held")
    monkeypatch.setattr(engine_module, "OPEN_TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match="no answer within"):
        drive.open()
    drive.set("connect_held", 0)
    monkeypatch.undo()
    assert run(opened(drive.open()), IoOp("read", 0, aligned_buffer(PAGE), 1)) == {1: None}


def test_a_controller_that_does_not_detach_does_not_hold_close(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = standin.drive()
    engine = drive.open()
    drive.set("detach_held")
    monkeypatch.setattr(engine_module, "DETACH_TIMEOUT_S", 0.05)
    engine.close(1)
    drive.set("detach_held", 0)
    assert any("did not detach" in note for note in engine.notes)


def test_the_environment_of_the_process_serves_what_it_was_started_for(standin: StandIn, opened: Opened) -> None:
    opened(standin.drive().open())
    with pytest.raises(OSError, match=r"is for 0000:01:00\.0") as caught:
        open_spdk("0000:ff:00.0", 1, MIB, 1, standin.shim)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError, match="other options"):
        open_spdk("0000:01:00.0", 1, MIB, 1, standin.shim, environment=SpdkEnvironment(no_pci=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sda", 1, MIB, 1), "target is 'sda'"),
        (("trtype:TCP subnqn:x", 1, MIB, 1), "must be a PCIe address"),
        (("trtype:SCSI traddr:x", 1, MIB, 1), "must be a PCIe address"),
        (("0000:01:00.0", 0, MIB, 1), "namespace is 0"),
        (("0000:01:00.0", 1, MIB + 1, 1), "capacity_bytes is 1048577"),
        (("0000:01:00.0", 1, MIB, 257), "depth is 257"),
        (("0000:01:00.0", 1, MIB, 1, None, -1), "cpu is -1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_spdk(*arguments)


def test_environments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="pci_allowed is empty"):
        SpdkEnvironment()
    with pytest.raises(ValueError, match="pci_allowed has 'nvme0'"):
        SpdkEnvironment(pci_allowed=("nvme0",))
    with pytest.raises(ValueError, match="choose one"):
        SpdkEnvironment(no_pci=True, no_huge=True, hugepage_single_segments=True)


def test_a_real_target_that_dies_ends_every_operation_with_an_error(opened: Opened) -> None:
    """The last test of a run with a real SPDK: its target is gone then."""
    rig = spdk_rig.real()
    engine = opened(rig.open(64 * MIB, 16))
    memory = aligned_buffer(32 * MIB)
    ops = [IoOp("write", n * 2 * MIB, memory[n * 2 * MIB : (n + 1) * 2 * MIB], n) for n in range(16)]
    engine.submit(ops)
    rig.process.kill()
    rig.process.wait(10)
    outcome = outcomes(engine)
    assert len(outcome) == 16
    engine.submit(ops[:1])
    error = outcomes(engine)[0]
    assert error is not None and error.errno == errno.ENODEV
