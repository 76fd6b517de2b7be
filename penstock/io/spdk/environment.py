"""SPDK's environment: started once per process, with the options that the first target needs or the caller sets."""

from __future__ import annotations

import errno
import os
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.io.spdk.library import SpdkLibrary

_PCI_ADDRESS = re.compile(r"^[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]$")
_FIELD = re.compile(r"^(\w+)[:=](\S+)$")
_TRANSPORTS = ("PCIE", "TCP", "RDMA", "VFIOUSER")
_MEMORY_MIB_WITHOUT_HUGE = 256


@dataclass(frozen=True, slots=True)
class SpdkTarget:
    """A PCIe drive or fabric target: `transport_id` in SPDK's form, `address` of a PCIe drive."""

    name: str
    transport: str
    transport_id: str
    address: str | None

    @staticmethod
    def parse(text: str) -> SpdkTarget:
        """Parse `0000:5e:00.0` or `trtype:TCP adrfam:IPv4 traddr:... trsvcid:... subnqn:...`. Raises ValueError."""
        if _PCI_ADDRESS.match(text):
            return SpdkTarget(text, "PCIE", f"trtype:PCIe traddr:{text}", text.lower())
        found = [_FIELD.match(word) for word in text.split()]
        fields = {match[1].lower(): match[2] for match in found if match}
        transport = fields.get("trtype", "").upper()
        if not found or None in found or transport not in _TRANSPORTS or "traddr" not in fields:
            raise ValueError(
                f"target is {text!r}; it must be a PCIe address such as 0000:5e:00.0, or of the form "
                "'trtype:TCP adrfam:IPv4 traddr:HOST trsvcid:PORT subnqn:NAME' or 'trtype:VFIOUSER traddr:FOLDER'"
            )
        if transport == "PCIE":
            return SpdkTarget.parse(fields["traddr"])
        return SpdkTarget(text, transport, " ".join(text.split()), None)


@dataclass(frozen=True, slots=True)
class SpdkEnvironment:
    """Options of the environment. `pci_allowed` names every PCIe drive that this process will open, as DPDK would
    otherwise probe all devices of the host; `no_pci` uses no PCIe at all. `no_huge` uses ordinary memory instead of
    huge pages (only for fabrics over TCP). `cpu` is a parameter that DPDK requires, not the polling threads' core."""

    pci_allowed: tuple[str, ...] = ()
    no_pci: bool = False
    no_huge: bool = False
    hugepage_single_segments: bool = False
    memory_mib: int | None = None
    cpu: int | None = None

    def __post_init__(self) -> None:
        for address in self.pci_allowed:
            if not _PCI_ADDRESS.match(address):
                raise ValueError(f"pci_allowed has {address!r}; it must be a PCIe address such as 0000:5e:00.0")
        if not self.no_pci and not self.pci_allowed:
            raise ValueError("pci_allowed is empty; name the drives, or set no_pci")
        if self.no_huge and self.hugepage_single_segments:
            raise ValueError("no_huge and hugepage_single_segments are both set; choose one")

    @staticmethod
    def for_target(target: SpdkTarget) -> tuple[SpdkEnvironment, str | None]:
        """The environment that `target` needs, and a note if this host does not allow the best options."""
        if target.address is not None:
            return SpdkEnvironment(pci_allowed=(target.address,)), None
        if target.transport == "VFIOUSER":
            return SpdkEnvironment(no_pci=True, hugepage_single_segments=True), None
        if target.transport == "TCP" and huge_pages_free() == 0:
            return SpdkEnvironment(no_pci=True, no_huge=True), "no free huge pages: SPDK works in ordinary memory"
        return SpdkEnvironment(no_pci=True), None


_lock = threading.Lock()
_started: SpdkEnvironment | None = None
_is_given = False  # set by the caller, so that only the drives in its list are allowed


def ensure_environment(library: SpdkLibrary, target: SpdkTarget, wanted: SpdkEnvironment | None) -> list[str]:
    """Start the environment for `target`, or check that the running one can serve it; returns notes for the user.

    Raises OSError where it cannot start, or runs with options that exclude `target`.
    """
    global _started, _is_given
    with _lock:
        if _started is not None:
            if wanted is not None and replace(wanted, memory_mib=_started.memory_mib) != _started:
                text = f"SPDK's environment runs with other options: {_started}"
                raise OSError(errno.EALREADY, text, target.name)
            _check_serves(_started, target, _is_given)
            return []
        options, note = SpdkEnvironment.for_target(target) if wanted is None else (wanted, None)
        _check_serves(options, target, wanted is not None)
        memory_mib = options.memory_mib
        if options.no_huge and memory_mib is None:
            memory_mib = _MEMORY_MIB_WITHOUT_HUGE
        library.start_environment(
            min(os.sched_getaffinity(0)) if options.cpu is None else options.cpu,
            memory_mib,
            options.no_pci,
            options.no_huge,
            options.hugepage_single_segments,
            options.pci_allowed,
        )
        _started = replace(options, memory_mib=memory_mib)
        _is_given = wanted is not None
        return [note] if note else []


def _check_serves(running: SpdkEnvironment, target: SpdkTarget, is_fence: bool) -> None:
    """Raise OSError unless the running environment can serve `target`. Drives outside the allow-list can be attached
    later by name, unless the caller set the list (`is_fence`)."""
    reason, number = None, errno.ENOTSUP
    if target.address is not None and running.no_pci:
        reason = "was started without PCIe"
    elif target.address is not None and is_fence and target.address not in [a.lower() for a in running.pci_allowed]:
        reason, number = f"is for {', '.join(running.pci_allowed)} only", errno.EPERM
    elif target.transport == "VFIOUSER" and not running.hugepage_single_segments:
        reason = "lacks hugepage_single_segments, which vfio-user needs"
    elif target.transport != "TCP" and running.no_huge:
        reason = "has no huge pages, which only TCP can do without"
    if reason:
        advice = "give one SpdkEnvironment that serves all targets at the first open of this process"
        raise OSError(number, f"SPDK's environment {reason}; {advice}", target.name)


def huge_pages_free() -> int:
    """Free huge pages of the host; 0 where it has none."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("HugePages_Free:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
