"""The flags that every command with an OpenAI-compatible API has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.command_line import flag

API, LIMITS = "API", "Limits and deadlines"

Host = Annotated[str | None, flag(API, "127.0.0.1", "Address to listen on.")]
Port = Annotated[int | None, flag(API, "8000", "Port to listen on; 0 takes any free one.")]
ApiKey = Annotated[str | None, flag(API, "none", "Key that clients must send (visible to other users).")]
ApiKeyFile = Annotated[str | None, flag(API, "none", "File that holds the key; it opens the live page too.", "FILE")]
ApiKeys = Annotated[str | None, flag(API, "none", "Keys of tenants: KEY TENANT on each line.", "FILE")]
RequireTenant = Annotated[
    bool | None,
    flag(API, "off", "Refuse requests without cache_salt or a tenant's key.", names=("--require-tenant",)),
]
HideCachedTokens = Annotated[
    bool | None, flag(API, "off", "Tell clients nothing of what was cached.", names=("--hide-cached-tokens",))
]
OpenMetrics = Annotated[bool | None, flag(API, "off", "/metrics needs no key.", names=("--open-metrics",))]
AllowedHost = Annotated[
    list[str] | None, flag(API, "loopback", "A further name clients may call this server; may be repeated.", "NAME")
]
TlsCert = Annotated[str | None, flag(API, "none", "Serve HTTPS with this certificate chain (PEM).", "FILE")]
TlsKey = Annotated[str | None, flag(API, "none", "Its key (PEM, without a passphrase).", "FILE")]
ServedModelName = Annotated[str | None, flag(API, "last part of MODEL", "Name of the model in the API.")]
CorsOrigin = Annotated[
    list[str] | None,
    flag(API, "none", "Web pages of this origin may use the API (* for all); may be repeated.", "ORIGIN"),
]
KeepAlive = Annotated[float | None, flag(LIMITS, "75", "How long an idle connection is kept.")]
Revision = Annotated[str | None, flag(API, "default branch", "Branch, tag or commit of a hub id.")]
RequestTimeout = Annotated[float | None, flag(LIMITS, "600", "A slower request is ended with a 504.")]
DrainTimeout = Annotated[float | None, flag(LIMITS, "10", "On SIGTERM, how long running requests may go on.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")]
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file with flags of the same names; the command line goes before it.")
]
