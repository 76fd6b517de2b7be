"""A router gives engines the tenant of a request's key, never what a client says it is."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from penstock.cluster.engine.serve_flags import read_flags
from penstock.cluster.engine.serve_flags import server_settings as serve_settings
from penstock.cluster.router.router_flags import read_router_flags, server_settings
from penstock.core.config import ConfigError
from penstock.core.tenants import tenant_and_salt, tenant_of
from penstock.server.api_keys import TenantKeys
from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.server.settings import ServerSettings
from tests.cluster.router_rig import CountingHost, cluster


def key_file(folder: Path) -> Path:
    file = folder / "keys"
    file.write_text("key-a alice\nkey-b bob\n")
    file.chmod(0o600)
    return file


def test_engines_get_the_tenant_of_the_key(tmp_path: Path) -> None:
    settings = ServerSettings("m", tenant_keys=TenantKeys(key_file(tmp_path)), require_tenant=True, drain_timeout_s=0.5)
    with cluster() as c:
        host: CountingHost = c.engine("e")
        listener, ready = bind("127.0.0.1", 0), threading.Event()
        server = HttpServer(ServerApp(c.router, None, settings), listener, ready.set)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert ready.wait(30)
            with httpx.Client(base_url=url_of(listener), timeout=30) as client:
                for key, salt in (("key-a", None), ("key-a", "bob"), ("key-b", None)):
                    body = {"prompt": [7, 8], "max_tokens": 2} | ({"cache_salt": salt} if salt else {})
                    headers = {"authorization": f"Bearer {key}", "x-tenant": "mallory", "x-cache-salt": "mallory"}
                    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
                assert client.post("/v1/completions", json={"prompt": [7]}).status_code == 401
        finally:
            server.stop()
            thread.join(10)
        found = [placed.tenant for placed in host.placed]
    assert found == ["alice", tenant_and_salt("alice", "bob"), "bob"]
    assert [tenant_of(one) for one in found] == ["alice", "alice", "bob"]


def test_router_and_server_take_the_same_flags_of_who_may_ask(tmp_path: Path) -> None:
    given = {
        "model": "/srv/models/m",
        "api_keys": str(key_file(tmp_path)),
        "require_tenant": True,
        "hide_cached_tokens": True,
        "open_metrics": True,
        "allowed_host": ["penstock.example"],
    }
    for settings in (server_settings(read_router_flags(given, None)), serve_settings(read_flags(given, None))):
        assert settings.tenant_keys is not None and len(settings.tenant_keys) == 2
        assert (settings.require_tenant, settings.hide_cached_tokens, settings.open_metrics) == (True, True, True)
        assert settings.allowed_hosts == ("penstock.example",)
        assert (settings.model_name, settings.model_aliases) == ("m", ("/srv/models/m",))
    for wrong, message in (({"tls_cert": "a"}, "not given together"), ({"allowed_host": "a:1"}, "allowed_host is")):
        with pytest.raises(ConfigError, match=message):
            server_settings(read_router_flags(wrong, None))
