"""Reads a TOML file that a user wrote."""

from __future__ import annotations

import errno
import tomllib
from pathlib import Path
from typing import Any

from penstock.core.config import ConfigError

TOML_BYTES_MAX = 1 << 20


def read_toml(file: Path) -> dict[str, Any]:
    """Raises ConfigError: one line with the file."""
    try:
        return parse_toml(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None


def parse_toml(file: Path) -> dict[str, Any]:
    """Raises OSError, also where the file has more than TOML_BYTES_MAX bytes, and ValueError for what is no TOML."""
    try:
        return tomllib.loads(read_bounded(file, TOML_BYTES_MAX).decode())
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_bounded(file: Path, bytes_max: int) -> bytes:
    """The content of a file. Raises OSError, also where it has more than that many bytes."""
    with file.open("rb") as stream:
        content = stream.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, f"it has more than the {bytes_max} bytes that are allowed", str(file))
    return content
