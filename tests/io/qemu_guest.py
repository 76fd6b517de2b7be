"""A small Linux guest with emulated NVMe drives: QEMU without KVM, Debian's kernel, this Python in an initramfs.

Needs `qemu-system-x86_64` (Debian: qemu-system-x86) and a kernel with NVMe built in, which Debian's cloud kernel has.
It is looked for as vmlinuz-*-cloud-amd64 in /boot and in out/guest-kernel/boot; there, unpacked, not installed:

    apt-get download linux-image-6.1.0-NN-cloud-amd64 && dpkg -x linux-image-*.deb out/guest-kernel
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = (Path("/boot"), REPOSITORY / "out" / "guest-kernel" / "boot")
QEMU = "qemu-system-x86_64"
DISTRIBUTIONS = ("numpy", "pytest", "pluggy", "iniconfig", "packaging", "pygments", "msgspec", "xxhash")
_UNUSED_STDLIB = {
    "test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "pydoc_data", "distutils",
}  # fmt: skip
_UNUSED_SUFFIXES = (".opt-1.pyc", ".opt-2.pyc", ".pyi", ".a", ".h", ".c", ".f90")
_MEMORY_MIB = 1024

# Runs as process 1: gives the guest its filesystems and modules, prepares it, runs the command, says how it ended, and
# stops the machine.
_INIT = """\
import ctypes, json, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/run")):
    libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None)
os.mkdir("/dev/shm")
wanted = json.load(open("/guest.json"))
out = os.open("/dev/ttyS1", os.O_WRONLY)
for path in wanted["modules"]:
    fd = os.open(path, os.O_RDONLY)
    if libc.syscall(313, fd, b"", 0):  # finit_module
        os.write(out, f"{path}: {os.strerror(ctypes.get_errno())}\\n".encode())
    os.close(fd)
for command in wanted["setup"]:
    if subprocess.run(command, env=wanted["env"], stdout=out, stderr=out).returncode:
        os.write(out, f"{command} failed\\n".encode())
try:
    status = subprocess.run(wanted["command"], cwd="/guest", env=wanted["env"], stdout=out, stderr=out).returncode
except Exception as error:
    os.write(out, repr(error).encode())
    status = -1
os.write(out, f"\\nguest: exit {status}\\n".encode())
libc.tcdrain(out)
libc.reboot(0x4321FEDC)
"""


class GuestError(RuntimeError):
    """The guest did not run its command to the end, or not with 0. `printed` is what the command had printed."""

    def __init__(self, text: str, printed: str) -> None:
        super().__init__(text)
        self.printed = printed


@dataclass(frozen=True)
class Drive:
    """An emulated drive with its own controller, found in the guest by `serial`. `backing` are QEMU's options of the
    image's driver, `namespace` those of the device `nvme-ns`, `controller` those of the device `nvme`."""

    serial: str
    image: Path
    namespace: str = ""
    controller: str = ""
    backing: str = "driver=raw,file.driver=file,file.filename={image},cache.no-flush=on"

    def arguments(self) -> list[str]:
        backing = self.backing.format(image=self.image)
        controller = f"nvme,id=c-{self.serial},serial={self.serial}" + (self.controller and f",{self.controller}")
        namespace = f"nvme-ns,bus=c-{self.serial},drive=d-{self.serial}" + (self.namespace and f",{self.namespace}")
        blockdev = f"node-name=d-{self.serial},{backing}"
        return ["-blockdev", blockdev, "-device", controller, "-device", namespace]


@dataclass(frozen=True)
class Machine:
    """What a guest has besides this Python: a `kernel`, `modules` that are loaded in order, further files and symbolic
    links by their places in it, commands that prepare it, environment variables."""

    kernel: Path
    modules: Sequence[Path] = ()
    contents: Mapping[str, Path] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[Sequence[str]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    memory_mib: int = _MEMORY_MIB


def missing_qemu() -> str | None:
    """Why no guest of any kind can be run here; None when one can."""
    if shutil.which(QEMU) is None:
        return f"needs {QEMU} (Debian: qemu-system-x86)"
    if os.uname().machine != "x86_64":
        return "the guest is an x86-64 machine that runs this Python"
    return None


def missing() -> str | None:
    """Why no guest with drives can be run here; None when one can."""
    if reason := missing_qemu():
        return reason
    if kernel() is None:
        places = " or ".join(map(str, KERNELS))
        return f"needs a kernel vmlinuz-*-cloud-amd64 in {places} (Debian: linux-image-*-cloud-amd64)"
    return None


def kernel() -> Path | None:
    """The newest cloud kernel's image."""
    return newest(image for place in KERNELS for image in place.glob("vmlinuz-*-cloud-amd64"))


def cloud_kernel() -> Path:
    """As `kernel`, where it is known to be there."""
    found = kernel()
    assert found is not None
    return found


def newest(images: Iterable[Path]) -> Path | None:
    """The image of the highest version."""
    return max(images, key=lambda image: [int(number) for number in re.findall(r"\d+", image.name)], default=None)


def run_guest(
    folder: Path,
    command: Sequence[str],
    drives: Sequence[Drive],
    files: Iterable[Path],
    timeout_s: float,
    extra_arguments: Sequence[str] = (),
    machine: Machine | None = None,
) -> str:
    """Run this Python with arguments `command` in a fresh guest, in a folder that holds `files` (of the repository, by
    their paths in it, whole folders too); returns what it printed. `machine`: None: with the cloud kernel. Raises
    GuestError when it did not end with 0."""
    machine = machine or Machine(cloud_kernel())
    image, results, console = folder / "initramfs", folder / "results", folder / "console"
    python = Path(sys.executable).resolve()
    wanted = {
        "command": [str(python), *command],
        "env": {
            "PYTHONPATH": "/guest:/guest/site",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/tmp",
            "PATH": "/bin",
            **machine.environment,
        },
        "modules": [f"/modules/{path.name}" for path in machine.modules],
        "setup": machine.setup,
    }
    contents = {**machine.contents, **{f"/modules/{path.name}": path for path in machine.modules}}
    write_initramfs(image, python, wanted, files, contents, machine.links)
    arguments = [
        QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(machine.memory_mib), "-M", "q35",
        "-nodefaults", "-display", "none", "-no-reboot", "-kernel", str(machine.kernel), "-initrd", str(image),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on no_timer_check",
        "-serial", f"file:{console}", "-serial", f"file:{results}", *extra_arguments,
        *(argument for drive in drives for argument in drive.arguments()),
    ]  # fmt: skip
    qemu = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = qemu.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        said = f"not done within {timeout_s} s".encode()
    finally:
        if qemu.poll() is None:
            qemu.send_signal(signal.SIGKILL)
            qemu.wait()
    text = results.read_text(errors="replace").replace("\r", "") if results.exists() else ""
    if not text.endswith("\nguest: exit 0\n"):
        boot = console.read_text(errors="replace")[-2000:] if console.exists() else ""
        raise GuestError(f"{said.decode(errors='replace')}\n{text[-4000:]}\n--- console ---\n{boot}", text)
    return text.removesuffix("\nguest: exit 0\n")


def write_initramfs(
    image: Path,
    python: Path,
    wanted: object,
    files: Iterable[Path],
    further: Mapping[str, Path],
    links: Mapping[str, str],
) -> None:
    """An archive (cpio, newc) that the kernel unpacks into memory: this Python, a few packages, files, and /init.
    `further` files and `links` are by their places there."""
    with image.open("wb") as out:
        archive = _Archive(out)
        archive.add("/init", stat.S_IFREG | 0o755, f"#!{python} -ISB\n{_INIT}".encode())
        archive.add("/guest.json", stat.S_IFREG | 0o644, json.dumps(wanted).encode())
        archive.add("/dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
        for place in ("/proc", "/sys", "/tmp", "/run"):
            archive.add(place, stat.S_IFDIR | 0o755, b"")
        for place, target in links.items():
            archive.add(place, stat.S_IFLNK | 0o777, target.encode())
        contents = {**further, str(python): python}
        stdlib = Path(sysconfig.get_path("stdlib"))
        for path in _tree(stdlib):
            contents[str(path)] = path
        for name in DISTRIBUTIONS:
            contents.update(distribution(name))
        for given in files:
            for path in _tree(given.resolve()) if given.is_dir() else [given.resolve()]:
                contents[f"/guest/{path.relative_to(REPOSITORY)}"] = path
        binaries = [path for path in contents.values() if path == python or ".so" in path.name]
        contents.update(libraries([path for path in binaries if path not in set(further.values())]))
        for name, path in contents.items():
            archive.add_file(name, path)
        archive.end()


class _Archive:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._count = 0
        self._folders: set[str] = set()

    def add(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0), mtime_s: int = 0) -> None:
        for parent in reversed(Path(name).parents):
            if str(parent) not in self._folders and str(parent) != "/":
                self._folders.add(str(parent))
                self.add(str(parent), stat.S_IFDIR | 0o755, b"")
        if stat.S_ISDIR(mode):
            self._folders.add(name)
        self._count += 1
        path = name.lstrip("/").encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, mtime_s, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        for part in (header, content):
            self._out.write(part + bytes(-len(part) % 4))

    def add_file(self, name: str, path: Path) -> None:
        found = path.stat()
        mode = stat.S_IFREG | (0o755 if found.st_mode & 0o111 else 0o644)
        self.add(name, mode, path.read_bytes(), mtime_s=int(found.st_mtime))

    def end(self) -> None:
        self.add("TRAILER!!!", 0, b"")


def _is_used(path: Path) -> bool:
    return not path.name.endswith(_UNUSED_SUFFIXES) and path.is_file()


def _tree(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _UNUSED_STDLIB and not name.startswith("config-")]
        for name in names:
            if _is_used(Path(place) / name):
                yield Path(place) / name


def distribution(name: str) -> dict[str, Path]:
    """Files of an installed package by their places in the guest."""
    found = {}
    for part in importlib.metadata.files(name) or ():
        path = Path(str(part.locate()))
        if ".." not in part.parts and not {"tests", "f2py", "include"} & set(part.parts) and _is_used(path):
            found[f"/guest/site/{part}"] = path
    return found


def libraries(binaries: Sequence[Path]) -> dict[str, Path]:
    """Shared libraries of the system by their places in the guest: all in /lib, the loader also where it must be."""
    said = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    found: dict[str, Path] = {}
    for line in said.splitlines():
        match = re.match(r"\s+(?:\S+ => )?(/\S+) \(0x", line)
        if match and ".libs/" not in match[1]:
            path = Path(match[1])
            found[f"/lib/{path.name}"] = path
            if path.name.startswith("ld-linux"):
                found[str(path)] = path
    return found
