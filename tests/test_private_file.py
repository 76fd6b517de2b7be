"""Files of one user alone. Other users are user ids that root can give files to, and become."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.pool.net.secret import Secret
from penstock.private_file import (
    NotPrivate,
    make_private,
    make_private_folder,
    narrow,
    open_own,
    read_private,
    replace_file,
)

STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which only root can")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("a secret of this test")
    path.chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def same_umask_after() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.fixture(params=[0o000, 0o077, 0o177, 0o777])
def any_umask(request: pytest.FixtureRequest) -> None:
    os.umask(request.param)


def test_a_secret_is_read_through_links_of_this_user(secret: Path) -> None:
    other = secret.parent / "folder"
    other.mkdir()
    (secret.parent / "link").symlink_to("secret")
    (other / "far").symlink_to("../link")
    (secret.parent / "whole").symlink_to(other.absolute())
    for name in ("secret", "link", "folder/far", "whole/far", "folder/../secret"):
        assert read_private(secret.parent / name, 100) == b"a secret of this test", name


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o601, 0o660, 0o644, 0o777])
def test_a_secret_to_which_others_have_access_is_refused(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(NotPrivate, match=f"others have access to it \\(mode {mode:o}\\); allowed: .*chmod 600"):
        read_private(secret, 100)


def test_what_is_no_secret_file_is_refused(secret: Path) -> None:
    with pytest.raises(OSError, match="more than the 10 bytes"):
        read_private(secret, 10)
    assert read_private(secret, 21) == b"a secret of this test"
    os.mkfifo(secret.parent / "fifo", 0o600)
    with pytest.raises(OSError, match="not a regular file"):  # and nobody waits for whoever would write to it
        read_private(secret.parent / "fifo", 100)
    with pytest.raises(OSError, match="not a regular file"):
        read_private(secret.parent, 100)
    with pytest.raises(FileNotFoundError):
        read_private(secret.parent / "absent", 100)
    (secret.parent / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        read_private(secret.parent / "round", 100)


@as_root
def test_files_and_links_of_another_user_are_refused(secret: Path) -> None:
    link = secret.parent / "link"
    link.symlink_to(secret)
    os.lchown(link, STRANGER, STRANGER)
    with pytest.raises(NotPrivate, match=f"a symlink on the way to it belongs to user {STRANGER}"):
        read_private(link, 100)
    folder = secret.parent / "folder"
    folder.symlink_to(secret.parent)
    os.lchown(folder, STRANGER, STRANGER)
    with pytest.raises(NotPrivate, match="a symlink on the way"):
        open_own(folder / "new", os.O_RDWR | os.O_CREAT)
    assert not (secret.parent / "new").exists()
    os.chown(secret, STRANGER, STRANGER)
    with pytest.raises(NotPrivate, match=f"it belongs to user {STRANGER}; allowed: a process"):
        read_private(secret, 100)


_AS_STRANGER = """
import os, sys
from pathlib import Path
from penstock.private_file import read_private
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(65534)
try:
    print(read_private(Path(sys.argv[1]), 100).decode())
except OSError as error:
    print(type(error).__name__, error.strerror)
"""


@as_root
@pytest.mark.parametrize(("mode", "answer"), [(0o640, "a secret of"), (0o644, "NotPrivate"), (0o660, "NotPrivate")])
def test_a_secret_of_root_may_be_read_by_the_services_group(folder_for_others: Path, mode: int, answer: str) -> None:
    secret = folder_for_others / "secret"
    secret.write_text("a secret of this test")
    os.chown(secret, 0, STRANGER)
    secret.chmod(mode)
    command = [sys.executable, "-P", "-c", _AS_STRANGER, str(secret), str(STRANGER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(answer), done


def test_what_is_made_is_made_new_and_private(tmp_path: Path, any_umask: None) -> None:
    os.close(make_private(tmp_path / "new"))
    assert mode_of(tmp_path / "new") == 0o600
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("new", "nowhere"):
        with pytest.raises(FileExistsError):
            make_private(tmp_path / name)
    assert not (tmp_path / "absent").exists()


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    os.umask(0)
    make_private_folder(tmp_path / "a" / "b" / "c")
    make_private_folder(tmp_path / "a" / "b" / "c")
    assert [mode_of(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_a_file_is_replaced_and_not_what_its_name_leads_to(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("somebody's")
    (tmp_path / "state").symlink_to(tmp_path / "other")
    replace_file(tmp_path / "state", b"ours")
    assert (tmp_path / "other").read_text() == "somebody's"
    assert (tmp_path / "state").read_bytes() == b"ours" and mode_of(tmp_path / "state") == 0o600
    replace_file(tmp_path / "figures", b"anybody's", mode=None)
    assert mode_of(tmp_path / "figures") == 0o644
    assert sorted(one.name for one in tmp_path.iterdir()) == ["figures", "other", "state"]


def test_what_is_wider_is_narrowed(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.touch()
    path.chmod(0o644)
    fd = open_own(path, os.O_RDWR)
    assert "mode 644" in str(narrow(fd, path))
    assert mode_of(path) == 0o600
    assert narrow(fd, path) is None
    os.close(fd)


@as_root
def test_what_belongs_to_another_user_is_not_narrowed(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.touch()
    os.chown(path, STRANGER, STRANGER)
    fd = open_own(path, os.O_RDWR)
    with pytest.raises(NotPrivate, match="belongs to user"):
        narrow(fd, path)
    os.close(fd)


def test_the_secret_of_a_cluster_is_private(secret: Path) -> None:
    Secret.read(secret)
    secret.chmod(0o644)
    with pytest.raises(ValueError, match=r"secret file .* cannot be read: others have access to it \(mode 644\)"):
        Secret.read(secret)
