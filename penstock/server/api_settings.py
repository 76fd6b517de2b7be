"""What the commands with an OpenAI-compatible API share: their flags, and the HTTP server that these describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from penstock.core.config import ConfigError
from penstock.private_file import read_private
from penstock.server.api_keys import TenantKeys
from penstock.server.hosts import read_host
from penstock.server.settings import ServerSettings
from penstock.server.tls import ServerTls

KEY_FILE_BYTES_MAX = 64 << 10


class ApiFlags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Flags of one name and default in `serve` and `router`."""

    model: str = ""
    host: str = "127.0.0.1"
    api_key: str | None = None
    api_key_file: str | None = None
    api_keys: str | None = None
    require_tenant: bool = False
    hide_cached_tokens: bool = False
    open_metrics: bool = False
    allowed_host: str | list[str] | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origin: str | list[str] | None = None
    served_model_name: str | None = None
    revision: str | None = None
    keep_alive_s: float = 75.0
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 10.0
    log_level: str = "info"


def api_settings(flags: ApiFlags, model_name: str, **more: Any) -> ServerSettings:
    """The HTTP server these flags describe; reads its files of keys and certificates. `model_name` counts where none is
    given; then the model as given is understood too. Raises ConfigError."""
    aliases = (flags.model,) if flags.served_model_name is None and flags.model not in ("", model_name) else ()
    return ServerSettings(
        model_name=flags.served_model_name or model_name,
        model_aliases=aliases,
        api_key=read_api_key(flags.api_key, flags.api_key_file),
        tenant_keys=TenantKeys(Path(flags.api_keys)) if flags.api_keys is not None else None,
        require_tenant=flags.require_tenant,
        hide_cached_tokens=flags.hide_cached_tokens,
        open_metrics=flags.open_metrics,
        allowed_hosts=read_hosts(flags.allowed_host),
        tls=_tls(flags.tls_cert, flags.tls_key),
        keep_alive_s=flags.keep_alive_s,
        cors_origins=read_origins(flags.cors_origin),
        request_timeout_s=flags.request_timeout_s,
        drain_timeout_s=flags.drain_timeout_s,
        **more,
    )


def served_name(model: str) -> str:
    """What clients call a model without --served-model-name: a hub id, or the last part of a path, which tells nobody
    how this machine's folders are named."""
    path = Path(model)
    if not model or (not path.is_absolute() and model.count("/") == 1 and not path.exists() and model[0] not in ".~"):
        return model
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name.removesuffix(".toml") or "model"


def listed(value: str | list[str] | None) -> list[str]:
    """A flag that may be repeated."""
    return [] if value is None else [value] if isinstance(value, str) else value


def read_api_key(key: str | None, file: str | None) -> str | None:
    """The key itself, or that of a file. Raises ConfigError."""
    if key is not None and file is not None:
        raise ConfigError("api_key is set together with api_key_file; allowed: one of them")
    if file is not None:
        try:
            key = read_private(Path(file), KEY_FILE_BYTES_MAX).decode().strip()
        except OSError as error:
            raise ConfigError(f"api_key_file {file} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"api_key_file {file} cannot be read: {error}") from None
    if key is not None and not key.strip():
        raise ConfigError("api_key is empty; allowed: at least one character")
    return key


def read_origins(given: str | list[str] | None) -> tuple[str, ...]:
    """Origins of web pages, as browsers send them. Raises ConfigError."""
    origins = tuple(listed(given))
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
            raise ConfigError(f"cors_origin is {origin!r}; allowed: * or an origin such as https://example.org:8443")
    return origins


def read_hosts(given: str | list[str] | None) -> tuple[str, ...]:
    """Names of this server, as they stand in `Host`. Raises ConfigError."""
    found = []
    for text in listed(given):
        name = read_host(text)
        if name is None or name != text.strip().lower().strip("[]").rstrip("."):
            raise ConfigError(f"allowed_host is {text!r}; allowed: a host name or address without a port")
        found.append(name)
    return tuple(found)


def _tls(cert: str | None, key: str | None) -> ServerTls | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key are not given together; allowed: both, or none")
    return ServerTls(Path(cert), Path(key))
