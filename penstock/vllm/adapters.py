"""Identifies LoRA adapters by the content of their files, as far as vLLM is known to hold that content.

vLLM reads an adapter when it is added or first needed, keeps it under a number (`lora_int_id`), and may read it again
later. Its files may change meanwhile; then nothing outside vLLM shows with which content a request was computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.weights_identity import FileState, weights_identity
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm.identity import uses_modelscope

log = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

CONFIG_FILE = "adapter_config.json"
# vLLM takes the first that exists
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
ADAPTERS_MAX = 4096  # numbers remembered; about 1 KB each
NAMES_MAX = 1 << 16  # adapters whose KV vLLM's own cache may hold; about 300 bytes each
INLINE_BYTES = 64 << 20  # hashed at once; larger files on a thread, and requests until then do not use the pool
WAITING_MAX = 64
SETTLED_S = 2.0  # files younger than this may change again with the same time stamp
CLOSE_TIMEOUT_S = 2.0

Stamp = tuple[tuple[str, FileState], ...]  # changes with every file that is rewritten
# files, and the number under which vLLM read them if it may have read other content (else 0)
Content = tuple[int, Stamp]


@dataclass(slots=True)
class _Adapter:
    """The adapter that vLLM holds under a number. `identity` is None while its files are being read, and permanently
    once it is `lost`: its files changed, and vLLM may hold the old or the new content."""

    files: list[Path]
    stamp: Stamp
    certain: bool
    identity: str | None = None
    lost: bool = False


class Adapters:
    """vLLM's own cache identifies an adapter by name and path only: after its content changed, the cache still serves
    KV of the previous content. So requests with such an adapter have no identity until that cache has been reset.

    Threading: for vLLM's scheduler thread; large adapters are read on a separate thread.
    """

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._start_s = now_s()
        self._known: OrderedDict[int, _Adapter] = OrderedDict()
        self._cached: dict[tuple[str, str], Content | None] = {}  # adapter content in vLLM's own cache; None: mixed
        self._own = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._reader: GuardedWorker | None = None
        self._log = RateLimitedLog(log)

    def identity(self, adapter: Any) -> str | None:
        """A text that identifies what vLLM computes with a LoRARequest; None if it is not known (yet)."""
        files = adapter_files(adapter.lora_path)
        stamp = stamp_of(files)
        found = self._identity(adapter, files, stamp)
        if not self._fills_cache_with(adapter, self._content_of(adapter, stamp)) and found is not None:
            self._refuse(adapter, "vLLM's own cache may hold KV of what it was before, until reset_prefix_cache")
            return None
        return found

    def cache_emptied(self) -> None:
        """vLLM's own cache is empty now."""
        self._cached.clear()

    def _content_of(self, adapter: Any, stamp: Stamp) -> Content | None:
        """The content vLLM computes with now, derived from the content before; None if it cannot be determined."""
        if not stamp or adapter.load_inplace:  # vLLM reads the adapter with this request
            return (0, stamp) if stamp else None
        known = self._known.get(adapter.lora_int_id)
        if known is not None and (known.lost or known.stamp != stamp):
            return None
        certain = self._is_certain(adapter, stamp) if known is None else known.certain
        return (0 if certain else adapter.lora_int_id, stamp)

    def _is_certain(self, adapter: Any, stamp: Stamp) -> bool:
        """Whether vLLM read exactly these files: files that changed after vLLM's start may have been read before
        that."""
        return adapter.load_inplace or _changed_s(stamp) + SETTLED_S < self._start_s

    def _fills_cache_with(self, adapter: Any, content: Content | None) -> bool:
        """vLLM computes with `content` from now on; returns whether its own cache holds KV of this content only."""
        name = (adapter.lora_name, adapter.lora_path)
        if name not in self._cached and len(self._cached) >= NAMES_MAX:
            return False
        before = self._cached.setdefault(name, content)
        if before != content:
            self._cached[name] = None
        return content is not None and before == content

    def _identity(self, adapter: Any, files: list[Path], stamp: Stamp) -> str | None:
        known = self._known.get(adapter.lora_int_id)
        if not stamp:
            self._refuse(adapter, "its files cannot be read")
            return None
        if known is not None and not known.lost and known.stamp == stamp:
            self._known.move_to_end(adapter.lora_int_id)
            with self._lock:
                return known.identity
        if known is not None and not adapter.load_inplace:
            known.lost, known.identity = True, None
            self._refuse(adapter, "its files changed since vLLM first loaded it; load it under another name")
            return None
        if _changed_s(stamp) + SETTLED_S > self._now_s():
            self._refuse(adapter, f"its files are less than {SETTLED_S:g} s old, and may still change")
            return None
        return self._first(adapter, files, stamp)

    def close(self) -> None:
        """Stop reading adapters, within CLOSE_TIMEOUT_S seconds."""
        if self._reader is not None:
            self._reader.close(CLOSE_TIMEOUT_S)

    def _first(self, adapter: Any, files: list[Path], stamp: Stamp) -> str | None:
        if adapter.lora_int_id not in self._known and len(self._known) >= ADAPTERS_MAX:
            number, _ = self._known.popitem(last=False)
            log.warning("more than %d LoRA adapters: number %d is forgotten", ADAPTERS_MAX, number)
        certain = self._is_certain(adapter, stamp)  # otherwise only this process may find what it computes
        known = _Adapter(files, stamp, certain)
        self._known[adapter.lora_int_id] = known
        self._known.move_to_end(adapter.lora_int_id)
        prefix = "" if certain else f"{self._own}:{adapter.lora_int_id}:"
        if getattr(adapter, "is_3d_lora_weight", False):  # such a model reads the same files differently
            prefix = f"3d:{prefix}"
        if sum(state.size_bytes for _, state in stamp) <= INLINE_BYTES:
            self._read(adapter, known, prefix)
            return known.identity
        if self._reader is None:
            self._reader = GuardedWorker("penstock-adapters", WAITING_MAX)
        if not self._reader.put(lambda: self._read(adapter, known, prefix)):
            del self._known[adapter.lora_int_id]
        self._refuse(adapter, "it is still being read")
        return None

    def _read(self, adapter: Any, known: _Adapter, prefix: str) -> None:
        found = _content(known.files)
        if found is None or stamp_of(known.files) != known.stamp:
            known.lost = True
            self._refuse(adapter, "its files changed while they were read, or cannot be read")
            return
        with self._lock:
            known.identity = prefix + found

    def _refuse(self, adapter: Any, reason: str) -> None:
        self._log.warning(
            f"{adapter.lora_int_id}:{reason}",
            "requests with the LoRA adapter %r (%s) are computed without the pool: %s",
            adapter.lora_name,
            adapter.lora_path,
            reason,
        )


def adapter_files(path: str) -> list[Path]:
    """The files of an adapter that vLLM reads: configuration and weights; empty if they are not on this host."""
    folder = _folder(path)
    if folder is None:
        return []
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    return [] if weights is None else [folder / CONFIG_FILE, weights]


def _folder(path: str) -> Path | None:
    """The folder where vLLM finds an adapter (`vllm.lora.utils.get_adapter_absolute_path`); nothing is downloaded."""
    folder = Path(os.path.expanduser(path))  # pathlib's version raises for an unknown user
    if os.path.exists(folder) or folder.is_absolute() or path.startswith("~"):
        return folder
    if uses_modelscope():
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(Exception):  # any exception: the name comes from a client
        found = try_to_load_from_cache(path, CONFIG_FILE)
        if isinstance(found, str):
            return Path(found).parent
    return None


def stamp_of(files: Sequence[Path]) -> Stamp:
    """Empty if one of `files` is missing."""
    try:
        return tuple((str(file), FileState.of(file)) for file in files)
    except OSError:
        return ()


def _changed_s(stamp: Stamp) -> float:
    return max(state.changed_ns for _, state in stamp) / 1e9


def _content(files: Sequence[Path]) -> str | None:
    """Identity of configuration and weights; None if they cannot be read."""
    config, *weights = files
    try:
        return f"{hashlib.blake2b(config.read_bytes(), digest_size=16).hexdigest()}{weights_identity(weights)}"
    except (OSError, ValueError):
        return None
