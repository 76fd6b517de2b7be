"""`penstock spdk build`, loading what it made, and the environment that a first target starts."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.io.spdk import open_spdk
from penstock.io.spdk.build import BuildError, build
from penstock.io.spdk.command import app
from penstock.io.spdk.library import SpdkLibrary, default_library_path
from tests.io.spdk_rig import SOURCES, make_standin, skip_without_tools

MIB = 1 << 20


@pytest.fixture(scope="module")
def pkg_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_standin(tmp_path_factory.mktemp("standin") / "prefix")


@pytest.fixture(scope="module")
def shim(pkg_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(pkg_config, out=tmp_path_factory.mktemp("shim") / "shim.so").path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing in it, to which a test links what it wants; pkg-config finds nothing by itself."""
    made = tmp_path / "bin"
    made.mkdir()
    monkeypatch.setenv("PATH", str(made))
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    return made


def link(folder: Path, *commands: str) -> None:
    for command in commands:
        found = shutil.which(command, path="/usr/bin:/usr/local/bin:/bin")
        if found is None:
            pytest.skip(f"needs {command}")
        (folder / command).symlink_to(found)


@pytest.mark.slow
def test_it_builds_against_shared_libraries_and_says_against_what(pkg_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache/shim.so"
    answer = CliRunner().invoke(app, ["build", "--pkg-config-path", str(pkg_config), "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert f"built {out}" in answer.output
    assert f"against the stand-in of Penstock's tests, shared libraries in {pkg_config}" in answer.output
    assert "without spdk_sock_posix" in answer.output and "no_huge" not in answer.output
    assert SpdkLibrary(out).built_against == "the stand-in of Penstock's tests"
    assert [path.name for path in out.parent.iterdir()] == ["shim.so"]
    built = build(pkg_config, out=out)  # again, over the one that is loaded
    assert set(built.features) == {"PSP_HAS_NO_HUGE", "PSP_HAS_ENV_OPTS_SIZE"}


def test_nothing_of_spdk_is_in_the_shims_interface(shim: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    names = subprocess.run(["nm", "-D", "--defined-only", shim], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in names.splitlines()}
    assert exported and all(name.startswith("psp_") for name in exported)


@pytest.mark.slow
def test_the_shim_is_hardened(shim: Path, pkg_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where SPDK's flags, or those of the compiler's command, want less."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    for module in ("spdk_nvme", "spdk_env_dpdk"):
        text = (pkg_config / f"{module}.pc").read_text()
        less = "-O0 -fno-stack-protector -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0"
        (tmp_path / f"{module}.pc").write_text(text.replace("Cflags:", f"Cflags: {less}"))
    loosely = build(tmp_path, cc="cc -Wl,-z,lazy -Wl,-z,norelro -Wl,-z,execstack", out=tmp_path / "shim.so").path
    for path in (shim, loosely):
        show = ["readelf", "--wide", "--dynamic", "--program-headers", "--dyn-syms", str(path)]
        found = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        assert "GNU_RELRO" in found and "BIND_NOW" in found and "__stack_chk_fail" in found
        assert any(f"{name}_chk@" in found for name in ("__snprintf", "__memcpy", "__vsnprintf"))
        (stack,) = [line for line in found.splitlines() if "GNU_STACK" in line]
        assert " RW " in stack and "RWE" not in stack


@pytest.mark.slow
def test_the_shims_sources_have_no_warnings(pkg_config: Path, tmp_path: Path) -> None:
    built = build(pkg_config, cc="cc -Werror", out=tmp_path / "shim.so")
    assert built.path == tmp_path / "shim.so"


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_this_user_can_change_what_was_built(pkg_config: Path, tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        out = build(pkg_config, out=tmp_path / "a" / "b" / "shim.so").path
    finally:
        os.umask(old)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (out, *out.parents[:2])] == [0o755, 0o700, 0o700]
    SpdkLibrary(out)


@pytest.mark.slow
def test_a_shim_that_others_could_have_put_there_is_neither_built_nor_loaded(
    shim: Path, pkg_config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BuildError, match=r"shared: others can write to it \(mode 777\)"):
        build(pkg_config, out=folder / "shim.so")
    shutil.copy(shim, folder / "shim.so")
    with pytest.raises(OSError, match="others can write to it"):
        SpdkLibrary(folder / "shim.so")
    folder.chmod(0o755)
    SpdkLibrary(folder / "shim.so")
    (folder / "shim.so").chmod(0o775)
    with pytest.raises(OSError, match="others can write to it"):
        SpdkLibrary(folder / "shim.so")
    (folder / "shim.so").chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder / "shim.so", 65534, 65534)
        with pytest.raises(OSError, match="belongs to user 65534"):
            SpdkLibrary(folder / "shim.so")


@pytest.mark.slow
def test_it_builds_against_static_libraries(tmp_path: Path) -> None:
    pkg_config = make_standin(tmp_path / "prefix", static=True)
    built = build(pkg_config, out=tmp_path / "shim.so")
    assert built.linkage == "static" and built.built_against == "the stand-in of Penstock's tests"


@pytest.mark.slow
def test_an_older_spdk_has_fewer_options(tmp_path: Path) -> None:
    pkg_config = make_standin(tmp_path / "prefix", cflags="-DSTANDIN_OLD")
    out = tmp_path / "shim.so"
    answer = CliRunner().invoke(app, ["build", "--pkg-config-path", str(pkg_config), "--out", str(out)])
    assert answer.exit_code == 0 and "without no_huge" in answer.output
    with pytest.raises(OSError, match="has no option no_huge"):
        SpdkLibrary(out).start_environment(0, 64, True, True, False, ())


def test_the_default_place_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_library_path() == Path("/home/somebody/.cache/penstock/spdk/libpenstock_spdk.so")


def test_what_is_missing_is_said_in_one_line(only: Path, pkg_config: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no C compiler; install one"):
        build(pkg_config)
    with pytest.raises(BuildError, match="no C compiler 'icc'"):
        build(pkg_config, cc="icc")
    link(only, "cc")
    with pytest.raises(BuildError, match=r"no pkg-config; install it"):
        build(pkg_config)
    link(only, "pkg-config")
    with pytest.raises(BuildError, match="does not find spdk_nvme and spdk_env_dpdk"):
        build()
    with pytest.raises(BuildError, match="nowhere is not a folder"):
        build(tmp_path / "nowhere")
    answer = CliRunner().invoke(app, ["build"])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("penstock spdk build: pkg-config does not find") and answer.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_spdk_that_does_not_compile_is_said_with_the_compilers_words(pkg_config: Path, tmp_path: Path) -> None:
    include = tmp_path / "include"
    shutil.copytree(SOURCES / "include", include)
    header = include / "spdk/nvme.h"
    header.write_text(header.read_text().replace("spdk_nvme_ctrlr_get_ns", "spdk_nvme_ctrlr_get_namespace"))
    for module in ("spdk_nvme", "spdk_env_dpdk"):
        text = (pkg_config / f"{module}.pc").read_text()
        (tmp_path / f"{module}.pc").write_text(text.replace(str(SOURCES / "include"), str(include)))
    with pytest.raises(BuildError, match=r"failed.*spdk_nvme_ctrlr_get_ns"):
        build(tmp_path, out=tmp_path / "shim.so")
    assert not (tmp_path / "shim.so").exists()


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_said(pkg_config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot be stored at"):
        build(pkg_config, out=tmp_path / "file" / "shim.so")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("unsigned psp_abi(void) { return 99; }", "has ABI 99, this Penstock needs 1"),
        ("unsigned other(void) { return 1; }", "not Penstock's SPDK shim"),
        ("unsigned gone(void); unsigned psp_abi(void) { return gone(); }", "cannot be loaded"),
    ],
)
def test_a_library_that_is_not_the_shim_is_refused(source: str, message: str, tmp_path: Path) -> None:
    skip_without_tools()
    (tmp_path / "x.c").write_text(source)
    library = tmp_path / "x.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, tmp_path / "x.c"], check=True)
    with pytest.raises(OSError, match=message) as caught:
        open_spdk("0000:01:00.0", 1, MIB, 1, library)
    assert str(library) in str(caught.value)


def test_an_absent_shim_is_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run: penstock spdk build"):
        open_spdk("0000:01:00.0", 1, MIB, 1, tmp_path / "none.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(OSError, match="cannot be loaded"):
        open_spdk("0000:01:00.0", 1, MIB, 1, tmp_path / "text.so")
    answer = CliRunner().invoke(app, ["probe", "0000:01:00.0", "--library", str(tmp_path / "none.so")])
    assert answer.exit_code == 2 and "run: penstock spdk build" in answer.stderr


FIRST_OPEN = """
import ctypes, sys
from penstock.io.spdk import open_spdk
from penstock.io.spdk import environment
shim, standin, disk, target, setting, pages = sys.argv[1:]
environment.huge_pages_free = lambda: int(pages)
library = ctypes.CDLL(standin)
key = target.split(":", 3)[-1].split("subnqn:")[-1] if "subnqn" in target else target
library.standin_drive(key.encode(), disk.encode(), ctypes.c_uint64(1 << 20), 512, 65536, 0)
if setting:
    library.standin_set(b"", setting.encode(), ctypes.c_long(12))
library.standin_environment.restype = ctypes.c_char_p
try:
    engine = open_spdk(target, 1, 1 << 20, 1, __import__("pathlib").Path(shim))
    print(library.standin_environment().decode(), "|", engine.notes)
    for other in ("0000:07:00.0", "trtype:VFIOUSER traddr:/x subnqn:x"):
        try:
            open_spdk(other, 1, 1 << 20, 1, __import__("pathlib").Path(shim))
        except OSError as error:
            print(error)
    engine.close(1)
except OSError as error:
    print(error)
"""
TCP = "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:1 subnqn:one"


@pytest.mark.parametrize(
    ("target", "setting", "pages", "wanted"),
    [
        ("0000:5e:00.0", "", 0, ["no_pci=0 single=0 no_huge=0 allow=0000:5e:00.0", "Failed to connect to 0000:07:00.0",
                                 "lacks hugepage_single_segments"]),
        (TCP, "", 9, ["mem=-1 no_pci=1 single=0 no_huge=0", "was started without PCIe"]),
        (TCP, "", 0, ["mem=256 no_pci=1 single=0 no_huge=1", "no free huge pages", "was started without PCIe"]),
        ("trtype:VFIOUSER traddr:/run/x subnqn:one", "", 0, ["no_pci=1 single=1 no_huge=0"]),
        (TCP, "env_error", 0, ["SPDK's environment cannot start: Failed to initialize DPDK (Cannot allocate memory)"]),
        ("0000:5e:00.0", "no_dma", 0, ["no memory for DMA: reserve huge pages"]),
    ],
)  # fmt: skip
def test_the_first_target_decides_how_the_environment_starts(
    pkg_config: Path, shim: Path, tmp_path: Path, target: str, setting: str, pages: int, wanted: list[str]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    arguments = [shim, pkg_config / "libspdk_nvme.so", disk, target, setting, str(pages)]
    command = [sys.executable, "-c", FIRST_OPEN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for text in wanted:
        assert text in done.stdout
