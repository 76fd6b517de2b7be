"""The optional parts of an installation: which packages each brings, and what to say without it."""

from __future__ import annotations

import importlib.util

from penstock.core.config import ConfigError

# By the extra's name in pyproject.toml: modules of it that Penstock or its users import.
EXTRAS = {
    "tokenizer": ("jinja2", "tokenizers", "transformers"),
    "engine": ("jinja2", "safetensors", "tokenizers", "torch", "transformers"),
    "plots": ("matplotlib",),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "nixl": ("nixl_cu12",),
    "verbs": ("ibverbs",),
    "events": ("zmq",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
}


class ExtraMissing(ConfigError):
    """What was asked for needs an extra of Penstock that is not installed; the message names it."""


def missing_modules(extra: str) -> list[str]:
    """Modules of an extra that cannot be found here; nothing is imported but their parents."""
    return [name for name in EXTRAS[extra] if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent
        return False


def require_extra(extra: str, what: str) -> None:
    """Raises ExtraMissing when an extra that `what` needs is not installed."""
    missing = missing_modules(extra)
    if missing:
        raise ExtraMissing(f"{what} needs {', '.join(missing)}, not installed here; pip install 'penstock[{extra}]'")
