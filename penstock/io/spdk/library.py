"""The shim's ABI for Python (declared in `shim.h`): loads it, declares its records, raises its errors as OSError."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from penstock.private_file import NotPrivate, refuse_replaceable

ABI = 1
TEXT_BYTES = 240
READ, WRITE = 0, 1
DIRECT = 1
PCIE, VFIO_USER, TCP, RDMA, OTHER = range(5)

_TIMEOUT_S_MAX = 1e6


class Environment(ctypes.Structure):
    """`psp_environment`."""

    _fields_ = (
        ("cores", ctypes.c_char_p),
        ("memory_mib", ctypes.c_int32),
        ("no_pci", ctypes.c_uint32),
        ("no_huge", ctypes.c_uint32),
        ("hugepage_single_segments", ctypes.c_uint32),
        ("pci_allowed", ctypes.POINTER(ctypes.c_char_p)),
        ("pci_allowed_count", ctypes.c_uint32),
    )


class Target(ctypes.Structure):
    """`psp_target`."""

    _fields_ = (
        ("transport_id", ctypes.c_char_p),
        ("namespace_id", ctypes.c_uint32),
        ("cpu", ctypes.c_int32),
        ("depth", ctypes.c_uint32),
        ("bounce_bytes_max", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
    )


class Info(ctypes.Structure):
    """`psp_info`."""

    size_bytes: int
    lba_bytes: int
    piece_bytes: int
    transport: int
    iommu: int
    bounce_slots: int
    has_flush: int
    _fields_ = (
        ("size_bytes", ctypes.c_uint64),
        ("lba_bytes", ctypes.c_uint32),
        ("piece_bytes", ctypes.c_uint32),
        ("transport", ctypes.c_uint32),
        ("iommu", ctypes.c_uint32),
        ("bounce_slots", ctypes.c_uint32),
        ("has_flush", ctypes.c_uint32),
    )


class Op(ctypes.Structure):
    """`psp_op`."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("offset_bytes", ctypes.c_uint64),
        ("length_bytes", ctypes.c_uint64),
        ("buffer", ctypes.c_void_p),
        ("kind", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class Done(ctypes.Structure):
    """`psp_done`."""

    id: int
    error: int
    text: bytes
    _fields_ = (("id", ctypes.c_uint64), ("error", ctypes.c_int32), ("text", ctypes.c_char * TEXT_BYTES))


def _timeout_ns(timeout_s: float) -> int:
    return int(min(max(timeout_s, 0.0), _TIMEOUT_S_MAX) * 1e9)


class SpdkLibrary:
    """A loaded shim. Methods raise OSError with SPDK's reason as text."""

    def __init__(self, path: Path) -> None:
        """Load the shim at `path`. Raises OSError: absent, not loadable, built for another version of Penstock, or in a
        place to which another user can write."""
        self.path = path
        if not path.is_file():
            raise OSError(errno.ENOENT, "the SPDK shim is not built; run: penstock spdk build", str(path))
        try:
            self._dll = ctypes.CDLL(str(refuse_replaceable(path)))
        except NotPrivate:
            raise
        except OSError as error:
            text = f"the SPDK shim cannot be loaded ({error}); where SPDK was changed, run again: penstock spdk build"
            raise OSError(errno.ELIBACC, text, str(path)) from error
        self._check_abi()
        self._declare()
        self.built_against = str(self._dll.psp_built_against().decode(errors="replace"))

    def _check_abi(self) -> None:
        try:
            found = int(ctypes.CFUNCTYPE(ctypes.c_uint32)(("psp_abi", self._dll))())
        except AttributeError as error:
            raise OSError(
                errno.ELIBBAD, "this is not Penstock's SPDK shim: it has no psp_abi", str(self.path)
            ) from error
        if found != ABI:
            text = f"the SPDK shim has ABI {found}, this Penstock needs {ABI}; run again: penstock spdk build"
            raise OSError(errno.ELIBBAD, text, str(self.path))

    def _declare(self) -> None:
        text, size, handle, ns = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64
        signatures: dict[str, tuple[object, ...]] = {
            "psp_environment_start": (ctypes.POINTER(Environment), text, size),
            "psp_memory_register": (ctypes.c_void_p, ctypes.c_uint64),
            "psp_memory_unregister": (ctypes.c_void_p, ctypes.c_uint64),
            "psp_open": (ctypes.POINTER(Target), ctypes.POINTER(handle), ctypes.POINTER(Info), text, size),
            "psp_submit": (handle, ctypes.POINTER(Op), ctypes.c_uint32),
            "psp_poll": (handle, ctypes.POINTER(Done), ctypes.c_uint32, ns),
            "psp_wake": (handle,),
            "psp_flush": (handle, ns, text, size),
            "psp_close": (handle, ns),
            "psp_built_against": (),
        }
        for name, arguments in signatures.items():
            function = getattr(self._dll, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        self._dll.psp_wake.restype = None
        self._dll.psp_built_against.restype = ctypes.c_char_p

    def start_environment(
        self,
        cpu: int,
        memory_mib: int | None,
        no_pci: bool,
        no_huge: bool,
        hugepage_single_segments: bool,
        pci_allowed: Sequence[str],
    ) -> None:
        """Start SPDK's environment, which a process can do once."""
        drives = (ctypes.c_char_p * max(1, len(pci_allowed)))(*[address.encode() for address in pci_allowed])
        options = Environment(
            f"[{cpu}]".encode(),
            -1 if memory_mib is None else memory_mib,
            no_pci,
            no_huge,
            hugepage_single_segments,
            drives,
            len(pci_allowed),
        )
        error = ctypes.create_string_buffer(TEXT_BYTES)
        result = self._dll.psp_environment_start(ctypes.byref(options), error, TEXT_BYTES)
        if result != 0:
            raise self._failure(result, error, "SPDK's environment cannot start", str(self.path))

    def memory_register(self, address: int, length: int) -> int:
        """Register memory; returns 0, or the negative error number."""
        return int(self._dll.psp_memory_register(address, length))

    def memory_unregister(self, address: int, length: int) -> int:
        """Unregister memory; returns 0, or a negative error number."""
        return int(self._dll.psp_memory_unregister(address, length))

    def open(self, target: Target, name: str) -> tuple[ctypes.c_void_p, Info]:
        """Connect; `name` is the target's name in errors."""
        device, info = ctypes.c_void_p(), Info()
        error = ctypes.create_string_buffer(TEXT_BYTES)
        result = self._dll.psp_open(ctypes.byref(target), ctypes.byref(device), ctypes.byref(info), error, TEXT_BYTES)
        if result != 0:
            raise self._failure(result, error, "SPDK cannot open it", name)
        return device, info

    def submit(self, device: ctypes.c_void_p, ops: ctypes.Array[Op]) -> int:
        """Submit all of `ops` to the device's polling thread, or none; returns 0, or -EAGAIN when they exceed the
        depth."""
        return int(self._dll.psp_submit(device, ops, len(ops)))

    def poll(self, device: ctypes.c_void_p, done: ctypes.Array[Done], timeout_s: float) -> int:
        """Fill `done` with completions; returns how many."""
        return int(self._dll.psp_poll(device, done, len(done), _timeout_ns(timeout_s)))

    def wake(self, device: ctypes.c_void_p) -> None:
        """End a wait of `poll` on this device, from any thread."""
        self._dll.psp_wake(device)

    def flush(self, device: ctypes.c_void_p, timeout_s: float, name: str) -> None:
        """Make completed writes durable, within `timeout_s`."""
        error = ctypes.create_string_buffer(TEXT_BYTES)
        result = self._dll.psp_flush(device, _timeout_ns(timeout_s), error, TEXT_BYTES)
        if result != 0:
            raise self._failure(result, error, "flush", name)

    def close(self, device: ctypes.c_void_p, timeout_s: float) -> int:
        """Disconnect; returns 0, or the negative error number."""
        return int(self._dll.psp_close(device, _timeout_ns(timeout_s)))

    @staticmethod
    def _failure(result: int, text: ctypes.Array[ctypes.c_char], what: str, name: str) -> OSError:
        reason = text.value.decode(errors="replace") or os.strerror(-result)
        return OSError(-result, f"{what}: {reason}", name)


def default_library_path() -> Path:
    """Default path of the shim, for `penstock spdk build` and `open_spdk`."""
    return Path.home() / ".cache" / "penstock" / "spdk" / "libpenstock_spdk.so"
