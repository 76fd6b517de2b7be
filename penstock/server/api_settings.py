"""Flags shared by all commands with an OpenAI-compatible API, and the server settings that they give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from penstock.core.config import ConfigError
from penstock.core.settings import setting, taken_over
from penstock.engine.config import ModelSettings
from penstock.private_file import read_private
from penstock.server.api_keys import TenantKeys
from penstock.server.settings import ServerSettings, ServingRules
from penstock.server.tls import ServerTls
from penstock.server.tracing import check_tracing

KEY_FILE_BYTES_MAX = 64 << 10
DEFAULT_PORT = 8000
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class PageFlags:
    """The settings of every command that serves pages over HTTP."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int | None = setting(None, "Port to listen on; 0 takes any free one.", shown=str(DEFAULT_PORT))
    api_key: str | None = setting(None, "Key that clients must send (other users of this machine can see it).")
    api_key_file: str | None = setting(None, "File with the key; the live page needs it too.", "FILE")
    tls_cert: str | None = setting(None, "Serve HTTPS with this certificate chain (PEM).", "FILE")
    tls_key: str | None = setting(None, "Private key of --tls-cert (PEM, without a passphrase).", "FILE")
    log_level: LogLevel = setting("info", "debug, info, warning or error.")


@dataclass(frozen=True, kw_only=True)
class ApiFlags(PageFlags, ServingRules, ModelSettings):
    """The settings of every command with an OpenAI-compatible API."""

    api_keys: str | None = setting(None, "File with tenants' keys: KEY TENANT on each line.", "FILE")
    served_model_name: str | None = setting(None, "Name of the model in the API.", shown="last part of MODEL")


def api_settings(flags: ApiFlags, model_name: str, **more: Any) -> ServerSettings:
    """The settings of the HTTP server that these flags describe; reads the key and certificate files. `model_name` is
    used if no --served-model-name is given; then the full model name is accepted too. Raises ConfigError."""
    if flags.otlp_endpoint is not None:
        check_tracing(flags.otlp_endpoint)
    aliases = (flags.model,) if flags.served_model_name is None and flags.model not in ("", model_name) else ()
    return ServerSettings(
        model_name=flags.served_model_name or model_name,
        model_aliases=aliases,
        api_key=read_api_key(flags.api_key, flags.api_key_file),
        tenant_keys=TenantKeys(Path(flags.api_keys)) if flags.api_keys is not None else None,
        tls=_tls(flags.tls_cert, flags.tls_key),
        **taken_over(ServingRules, flags),
        **more,
    )


def served_name(model: str) -> str:
    """The model's name in the API without --served-model-name: a hub id, or the last part of a path, so that clients do
    not learn this machine's folder names."""
    path = Path(model)
    if not model or (not path.is_absolute() and model.count("/") == 1 and not path.exists() and model[0] not in ".~"):
        return model
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name.removesuffix(".toml") or "model"


def read_api_key(key: str | None, file: str | None) -> str | None:
    """The key, given directly or in a file. Raises ConfigError."""
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


def _tls(cert: str | None, key: str | None) -> ServerTls | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key are not given together; allowed: both, or none")
    return ServerTls(Path(cert), Path(key))
