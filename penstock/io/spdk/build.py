"""Compiles the shim against the user's own SPDK, found through pkg-config, and loads the result."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from penstock.io.spdk.library import SpdkLibrary, default_library_path
from penstock.private_file import NotPrivate, make_private_folder, refuse_writable, replace_file

SOURCES = ("shim_environment.c", "shim_transfer.c", "shim_thread.c", "shim_device.c")
HEADERS = ("shim.h", "shim_common.h", "shim_device.h")
NEEDED = ("spdk_nvme", "spdk_env_dpdk")
WANTED = ("spdk_sock_posix",)  # NVMe/TCP has no sockets without it
_COMPILE_TIMEOUT_S = 300.0
_HARDENED = (  # after the flags of SPDK and of the user, so that theirs do not override them
    "-O2", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-fno-strict-overflow",
    "-Wall", "-Wextra", "-Wformat", "-Werror=format-security", "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types", "-Werror=int-conversion",
)  # fmt: skip
_LINKED = ("-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack")
_OPTIONAL = (
    "-fstack-clash-protection",
    "-fcf-protection=full",
    "-mbranch-protection=standard",
)  # if the processor supports them
_FEATURES = {
    "PSP_HAS_NO_HUGE": "#include <spdk/env.h>\nvoid f(struct spdk_env_opts *o) { o->no_huge = 1; }\n",
    "PSP_HAS_ENV_OPTS_SIZE": "#include <spdk/env.h>\nvoid f(struct spdk_env_opts *o) { o->opts_size = 1; }\n",
}


class BuildError(RuntimeError):
    """The shim could not be built; the text says what is missing, and how to get it."""


@dataclass(frozen=True, slots=True)
class Built:
    """A shim that was built and can be loaded. `features`: those of SPDK that it uses; `linkage`: shared or static."""

    path: Path
    built_against: str
    linkage: str
    libraries_in: tuple[Path, ...]
    features: tuple[str, ...]
    has_tcp: bool


def build(pkg_config_path: Path | None = None, cc: str | None = None, out: Path | None = None) -> Built:
    """Build the shim into `out` (by default the user's cache folder, where `open_spdk` finds it). Raises BuildError."""
    compiler = _compiler(cc)
    modules = _modules(pkg_config_path)
    cflags = _pkg_config(pkg_config_path, "--cflags", *modules)
    folders = tuple(Path(flag[2:]) for flag in _pkg_config(pkg_config_path, "--libs-only-L", *modules))
    is_shared = not folders or any((folder / "libspdk_nvme.so").exists() for folder in folders)
    libs = _shared_libs(pkg_config_path, modules) if is_shared else _static_libs(pkg_config_path, modules)
    target = default_library_path() if out is None else out
    with tempfile.TemporaryDirectory(prefix="penstock-spdk-") as name:
        folder = Path(name)
        _unpack_sources(folder)
        features = [feature for feature, code in _FEATURES.items() if _compiles(compiler, cflags, code, folder)]
        result = folder / "libpenstock_spdk.so"
        rpaths = [f"-Wl,-rpath,{path}" for path in folders]
        command = [
            *compiler, "-std=gnu11", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden",
            *(f"-D{feature}" for feature in features), *cflags, *_HARDENED,
            *(flag for flag in _OPTIONAL if _compiles(compiler, ["-Werror", flag], "int f;\n", folder)),
            "-o", str(result), *(str(folder / source) for source in SOURCES), *rpaths, *libs, *_LINKED,
        ]  # fmt: skip
        _run(command, "compiling the shim against this SPDK failed")
        result.chmod(0o755)
        try:
            library = SpdkLibrary(result)
        except OSError as error:
            raise BuildError(f"the shim was built but does not load: {error.strerror}") from error
        _install(result, target)
    linkage = "shared" if is_shared else "static"
    return Built(target, library.built_against, linkage, folders, tuple(features), WANTED[0] in modules)


def _compiler(cc: str | None) -> list[str]:
    names = [cc] if cc else ["cc", "gcc", "clang"]
    for name in names:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    if cc:
        raise BuildError(f"there is no C compiler {cc!r}; name one that exists with --cc")
    raise BuildError("there is no C compiler; install one (Debian: apt install gcc libc6-dev), or name it with --cc")


def _modules(path: Path | None) -> list[str]:
    if shutil.which("pkg-config") is None:
        raise BuildError("there is no pkg-config; install it (Debian: apt install pkg-config)")
    if path is not None and not path.is_dir():
        raise BuildError(f"--pkg-config-path {path} is not a folder; name the one that holds spdk_nvme.pc")
    missing = [module for module in NEEDED if not _exists(path, module)]
    if missing:
        raise BuildError(
            f"pkg-config does not find {' and '.join(missing)}; build SPDK (./configure --with-shared && make && make "
            "install) and name its lib/pkgconfig folder with --pkg-config-path"
        )
    return [*NEEDED, *(module for module in WANTED if _exists(path, module))]


def _environment(path: Path | None) -> dict[str, str]:
    found = dict(os.environ)
    if path is not None:
        found["PKG_CONFIG_PATH"] = ":".join(filter(None, [str(path.resolve()), found.get("PKG_CONFIG_PATH")]))
    return found


def _exists(path: Path | None, module: str) -> bool:
    command = ["pkg-config", "--exists", module]
    return subprocess.run(command, env=_environment(path), capture_output=True, timeout=30).returncode == 0


def _pkg_config(path: Path | None, *arguments: str) -> list[str]:
    command = ["pkg-config", *arguments]
    done = subprocess.run(command, env=_environment(path), capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed: {_last_line(done.stderr)}")
    return shlex.split(done.stdout)


def _shared_libs(path: Path | None, modules: list[str]) -> list[str]:
    """Linker flags for shared libraries. SPDK's parts register themselves when loaded, so the linker must not drop
    unused ones."""
    return ["-Wl,--no-as-needed", *_pkg_config(path, "--libs", *modules), "-Wl,--as-needed"]


def _static_libs(path: Path | None, modules: list[str]) -> list[str]:
    libs = _pkg_config(path, "--libs", "--static", *modules)
    system = _pkg_config(path, "--libs", "--static", "spdk_syslibs") if _exists(path, "spdk_syslibs") else []
    return ["-Wl,--whole-archive", *libs, "-Wl,--no-whole-archive", *system]


def _unpack_sources(folder: Path) -> None:
    for name in (*SOURCES, *HEADERS):
        (folder / name).write_bytes(resources.files("penstock.io.spdk").joinpath(name).read_bytes())


def _compiles(compiler: list[str], cflags: list[str], code: str, folder: Path) -> bool:
    probe = folder / "probe.c"
    probe.write_text(code)
    command = [*compiler, "-std=gnu11", "-fsyntax-only", *cflags, str(probe)]
    return subprocess.run(command, capture_output=True, timeout=_COMPILE_TIMEOUT_S).returncode == 0


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{what}: no end within {_COMPILE_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise BuildError(f"{what}: {_error_line(done.stderr)}; the command was: {shlex.join(command)}")


def _error_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if "error" in line or "undefined" in line]
    return lines[0] if lines else _last_line(output)


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def _install(result: Path, target: Path) -> None:
    """Install into a folder to which only this user can write. The file is replaced atomically: a process that has
    loaded the old one is not affected."""
    try:
        make_private_folder(target.parent)
        refuse_writable(os.stat(target.parent), target.parent)
        replace_file(target, result.read_bytes(), mode=0o755)
    except NotPrivate as error:
        raise BuildError(f"the shim is not stored at {target}: {error.filename}: {error.strerror}") from error
    except OSError as error:
        raise BuildError(f"the shim cannot be stored at {target}: {error.strerror}") from error
