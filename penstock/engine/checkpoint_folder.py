"""Where a Hugging Face checkpoint lies: a folder, or a hub id's snapshot. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from penstock.extras import require_extra

LoadFormat = Literal["auto", "dummy"]
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_HUB_TIMEOUT_S = 20.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class CheckpointError(ValueError):
    """The model cannot be served: one line with the problem, the place, and what is allowed."""


def resolve_folder(
    name: str, load_format: LoadFormat, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The local folder of a checkpoint: `name` itself, or a hub id's snapshot (fetched when not cached).

    `revision` (a branch, tag or commit; not given: the default branch) and `cache_dir` (a hub cache; not given: the
    user's) apply to hub ids only, not to folders. `dummy`: fetch no weights. Raises CheckpointError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; a Hugging Face checkpoint folder is needed")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a Hugging Face checkpoint folder or hub id is needed")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"model {name!r} is neither an existing folder nor a hub id (NAME or OWNER/NAME)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "tokenizer*", "*.jinja", "*.model"]
    if load_format == "auto":
        patterns.append("*.safetensors")
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, etag_timeout=_HUB_TIMEOUT_S
        )
    except Exception as error:
        which = f"{name!r} at revision {revision!r}" if revision else repr(name)
        raise CheckpointError(
            f"model {which} is no existing folder, and could not be loaded from the hub: {one_line(error)}"
        ) from error
    return Path(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and messages of transformers within the context; problems are raised as errors.

    Raises ExtraMissing without transformers.
    """
    require_extra("tokenizer", "a checkpoint")
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"  # or its import says that there is no torch
    try:
        from transformers.utils import logging
    finally:
        if before is None:
            del os.environ[_NO_ADVICE]

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
