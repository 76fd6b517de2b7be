"""A page as a real browser shows it, without a screen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def shown_in_browser(url: str, folder: Path) -> str:
    """What the page's scripts made of it after some seconds, without the scripts. Takes a picture too, which has to be
    one. Skips the test where there is no browser."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    picture = folder / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--no-first-run", f"--user-data-dir={folder}/profile", "--window-size=1300,1000"]
    shown = ""
    for more in (["--dump-dom"], [f"--screenshot={picture}"]):
        ended = subprocess.run(
            [*command, "--virtual-time-budget=4000", *more, url], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        shown = shown or ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    return shown.partition("<script>")[0]
