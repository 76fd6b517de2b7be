"""A Kubernetes Secret as the kubelet lays it out, read by the user that the chart's pods run as."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import with_tests

USER = 10001  # of deploy/helm and deploy/container


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_secret_of_root_and_the_pods_group_is_read(folder_for_others: Path) -> None:
    volume = folder_for_others / "secrets"
    behind = volume / "..2026_01_01"
    behind.mkdir(parents=True)
    (volume / "..data").symlink_to(behind.name)
    for name in ("secret", "poolKey", "apiKey"):
        (behind / name).write_text(f"{7:064x}")
        (behind / name).chmod(0o440)
        os.chown(behind / name, 0, USER)
        (volume / name).symlink_to(f"..data/{name}")
    for folder in (volume, behind):
        os.chown(folder, 0, USER)
        folder.chmod(0o3777 if folder == volume else 0o2755)
    program = """
import os, sys
from pathlib import Path
from penstock.pool.mac import PoolKey
from penstock.pool.net.secret import Secret
from penstock.server.api_settings import read_api_key
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
folder = Path(sys.argv[1])
keys = Secret.read(folder / "secret"), PoolKey.read(folder / "poolKey")
print(*map(bool, keys), len(read_api_key(None, str(folder / "apiKey"))))
"""
    command = [sys.executable, "-c", program, str(volume), str(USER)]
    done = subprocess.run(command, capture_output=True, text=True, env=with_tests(), timeout=60)
    assert done.stdout == "True True 64\n", done.stderr
    (behind / "secret").chmod(0o444)
    done = subprocess.run(command, capture_output=True, text=True, env=with_tests(), timeout=60)
    assert "others have access to it" in done.stderr
