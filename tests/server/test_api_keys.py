"""Who may ask for what: keys of tenants, the operator's key, names in Host, types of bodies, what is hidden."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.engine.serve_flags import read_flags
from penstock.core.config import ConfigError
from penstock.core.tenants import tenant_and_salt, tenant_of
from penstock.server.api_keys import TenantKeys
from penstock.server.api_settings import api_settings, served_name
from penstock.server.hosts import HostCheck
from penstock.server.settings import parse_host
from tests.server.raw_http import connect, head_of, read_answer
from tests.server.served import Served, Start
from tests.waiting import wait_until

P: dict[str, Any] = {"prompt": [70, 71], "max_tokens": 2}
PAGES = ("/", "/live", "/metrics", "/ui", "/nothing")


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def ask(served: Served, key: str | None, **body: Any) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return served.http.post("/v1/completions", json=P | body, headers=headers).status_code


# -- tenants ------------------------------------------------------------------------------------------------------


def test_a_key_s_tenant_is_outside_the_client_s_salt(start: Start, tmp_path: Path) -> None:
    keys = TenantKeys(key_file(tmp_path, '# ours\nkey-a alice\nkey-b alice\n\n"key-c" = "bob"\n'))
    served = start(tenant_keys=keys)
    assert [ask(served, key) for key in (None, "key", "key-a", "KEY-A", "alice")] == [401, 401, 200, 401, 401]
    assert ask(served, "key-b", cache_salt="bob") == 200
    assert ask(served, "key-c") == 200
    assert ask(served, "key-c", cache_salt="alice\0bob") == 400
    found = [request.tenant for request in served.engine.requests]
    assert found == ["alice", tenant_and_salt("alice", "bob"), "bob"] and len(set(found)) == 3
    assert [tenant_of(one) for one in found] == ["alice", "alice", "bob"]
    headers = {"authorization": "Bearer key-c", "x-tenant": "alice", "penstock.tenant": "alice"}
    assert served.http.post("/v1/completions", json=P, headers=headers).status_code == 200
    assert served.engine.requests[-1].tenant == "bob"


def test_two_keys_in_one_request_are_none(start: Start, tmp_path: Path) -> None:
    served = start(tenant_keys=TenantKeys(key_file(tmp_path, "key-a alice\nkey-b bob")))
    headers = [("authorization", "Bearer key-a"), ("authorization", "Bearer key-b")]
    assert served.http.post("/v1/completions", json=P, headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good-key-1 a\nthe-key-2", ":2: a line of 1 words"),
        ("the-key-1 a b", ":1: a line of 3 words"),
        ("good-key-1 a\n# x\nthe-key-2 bad/tenant", ":3: the tenant"),
        ("good-key-1 a\nthe-key\\2 b", ":2: the key is not usable"),
        ("the-key-é b", ":1: the key is not usable"),
        ("the-key-1 a\nthe-key-1 b", ":2: the key of line 1 comes again"),
        ("# nothing", "there is no key"),
        ("the-key-1 " + "a" * 129, ":1: the tenant"),
        ("the-key-1" * 60 + " a", ":1: the key is not usable"),
    ],
)
def test_a_bad_line_is_named_and_its_key_is_not(tmp_path: Path, text: str, message: str) -> None:
    file = key_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        TenantKeys(file)
    assert str(file) in str(caught.value) and message in str(caught.value) and "the-key" not in str(caught.value)


def test_files_of_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    for mode in (0o644, 0o604, 0o640):
        with pytest.raises(ConfigError, match="others have access"):
            TenantKeys(key_file(tmp_path, "key-a alice", mode))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        TenantKeys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match=":1: this is not UTF-8"):
        TenantKeys(tmp_path / "binary")


def test_keys_are_in_no_text_of_the_objects(tmp_path: Path) -> None:
    keys = TenantKeys(key_file(tmp_path, "key-a alice"))
    settings = api_settings(read_flags({"model": "m", "api_keys": str(keys.file)}, None), "m")
    assert "key-a" not in repr(settings) + repr(keys) + repr(vars(keys))
    assert len(keys) == 1 and keys.tenant(b"key-a") == "alice" and keys.tenant(b"key-b") is None


def test_a_changed_file_counts_and_a_broken_one_does_not(start: Start, tmp_path: Path, caplog: Any) -> None:
    file = key_file(tmp_path, "key-a alice")
    served = start(tenant_keys=TenantKeys(file))

    def replaced(text: str) -> None:
        aside = tmp_path / "aside"
        aside.write_text(text)
        aside.chmod(0o600)
        os.replace(aside, file)

    replaced("key-b bob")
    wait_until(lambda: ask(served, "key-b") == 200, "the new key is valid", look_every_s=0.05)
    assert ask(served, "key-b") == 200 and ask(served, "key-a") == 401
    replaced("key-c")
    wait_until(lambda: "a line of 1 words" in caplog.text, "the broken file is refused")
    assert "a line of 1 words" in caplog.text and "key-c" not in caplog.text
    assert ask(served, "key-b") == 200 and ask(served, "key-c") == 401


def test_a_tenant_may_be_required(start: Start, tmp_path: Path) -> None:
    served = start(require_tenant=True)
    refused = served.complete(**P)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "tenant_required"
    assert refused.json()["error"]["param"] == "cache_salt"
    assert served.complete(**P, cache_salt="").status_code == 400
    assert served.complete(**P, cache_salt="a").status_code == 200
    keyed = start(require_tenant=True, api_key="op", tenant_keys=TenantKeys(key_file(tmp_path, "key-a alice")))
    assert [ask(keyed, "key-a"), ask(keyed, "op"), ask(keyed, "op", cache_salt="x")] == [200, 400, 200]


# -- pages --------------------------------------------------------------------------------------------------------


def test_pages_and_metrics_need_the_operator_s_key(start: Start, tmp_path: Path) -> None:
    served = start(api_key="op", tenant_keys=TenantKeys(key_file(tmp_path, "key-a alice")))
    get = served.http.get
    assert get("/health").status_code == 200
    for page in PAGES:
        known = 404 if page in ("/ui", "/nothing") else 200
        refused = get(page)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith('Basic realm="penstock"')
        assert get(page, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert get(page, headers={"authorization": "Bearer key-a"}).status_code == 403
        assert get(page, headers={"authorization": "Bearer op"}).status_code == known
        assert get(page, auth=("anybody", "op")).status_code == known
        assert get(page, auth=("op", "")).status_code == 401
    assert served.http.post("/v1/completions", json=P, auth=("me", "op")).status_code == 401  # what browsers remember
    assert get("/v1/models").headers["www-authenticate"] == "Bearer"
    for broken in ("Basic", "Basic !", "Basic b3A=", "Basic " + "A" * 10_000, "Bearer", "op"):
        assert get("/live", headers={"authorization": broken}).status_code == 401


def test_without_an_operator_s_key_tenants_see_no_pages(start: Start, tmp_path: Path) -> None:
    served = start(tenant_keys=TenantKeys(key_file(tmp_path, "key-a alice")))
    for page in PAGES:
        assert served.http.get(page).status_code == 401
        assert served.http.get(page, headers={"authorization": "Bearer key-a"}).status_code == 403


def test_metrics_may_be_open(start: Start) -> None:
    served = start(api_key="op", open_metrics=True)
    assert served.http.get("/metrics").status_code == 200 and served.http.get("/live").status_code == 401


def test_the_pages_say_what_they_may_do(start: Start) -> None:
    served = start()
    page = served.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2 and " style=" not in page.text and " onclick" not in page.text
    assert page.text.count("<script") == 1 and page.text.count("<style") == 1
    for path in ("/", "/live", "/health", "/v1/models", "/nothing"):
        assert served.http.get(path).headers["x-content-type-options"] == "nosniff"


def test_nobody_is_sent_to_another_host(start: Start) -> None:
    served = start()
    for path in ("/live/", "/v1/models/", "/v1/completions/", "//evil.example/"):
        answer = served.http.get(path, follow_redirects=False)
        assert answer.status_code in (200, 404, 405) and "location" not in answer.headers


def test_what_is_cached_may_be_hidden(start: Start) -> None:
    shown, hidden = start(), start(hide_cached_tokens=True)
    assert shown.complete(**P).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert "prompt_tokens_details" not in hidden.complete(**P).json()["usage"]
    body = P | {"stream": True, "stream_options": {"include_usage": True}}
    assert "total_tokens" in hidden.complete(**body).text and "cached" not in hidden.complete(**body).text
    refused = hidden.complete(**P, return_timing=True)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "return_timing"
    for page in PAGES:
        assert hidden.http.get(page).status_code == 403
    client = hidden.openai()
    assert client.completions.create(model="tiny", **P).usage.prompt_tokens_details is None
    operator = start(hide_cached_tokens=True, api_key="op")
    assert operator.http.get("/live", auth=("me", "op")).status_code == 200


# -- Host and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("127.0.0.2", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:80@evil.example", 403),
        ("evil.example:8000", 403),
        ("10.0.0.1", 403),
        ("[::2]", 403),
        ("", 403),
        ("localhost, evil.example", 403),
        ("penstock.example", 403),
    ],
)
def test_a_loopback_server_is_for_names_of_this_machine(start: Start, host: str, status: int) -> None:
    served = start()
    for path in ("/health", "/live", "/v1/models"):
        with connect(served) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            assert read_answer(client)[0] == status


def test_more_names_may_be_allowed(start: Start) -> None:
    served = start(allowed_hosts=("penstock.example",))
    for host, status in (("penstock.example:8000", 200), ("Penstock.Example", 200), ("evil.example", 403)):
        assert served.http.get("/health", headers={"host": host}).status_code == status
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
        assert read_answer(client)[0] in (400, 403)
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert read_answer(client)[0] in (400, 403)


def test_a_server_for_other_machines_checks_names_that_are_given() -> None:
    anybody, named = HostCheck("0.0.0.0", ()), HostCheck("0.0.0.0", ("penstock.example",))
    for host, known in ((b"penstock.example", True), (b"localhost", True), (b"evil.example", False)):
        assert anybody.allows([(b"host", host)], "1.1") and named.allows([(b"host", host)], "1.1") == known
    assert HostCheck("::1", ()).allows([(b"host", b"[::1]:9")], "1.1")
    assert [parse_host(one) for one in ("A.example", "[::1]", "10.0.0.1")] == ["a.example", "::1", "10.0.0.1"]
    for wrong in ("http://a", "a:80", "a b", "", "*"):
        with pytest.raises(ConfigError, match="allowed_host is"):
            parse_host(wrong)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("multipart/form-data; boundary=a", 415),
        ("", 415),
    ],
)
def test_a_body_says_that_it_is_json(start: Start, given: str, status: int) -> None:
    """What a web page may send to another origin without asking is refused."""
    answer = start().http.post("/v1/completions", content=b'{"prompt": [70]}', headers={"content-type": given})
    assert answer.status_code == status
    if status == 415:
        assert answer.json()["error"]["code"] == "unsupported_media_type"
        assert ("curl" in answer.text) == ("form-urlencoded" in given or not given)


def test_packed_bodies_are_refused(start: Start) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = start().http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415 and "gzip" in answer.json()["error"]["message"]


def test_a_missing_type_is_refused(start: Start) -> None:
    with connect(start()) as client:
        head = head_of("POST", "/v1/completions", 16).replace(b"content-type: application/json\r\n", b"")
        client.sendall(head + b'{"prompt": [70]}')
        assert read_answer(client)[0] == 415


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/srv/models/llama-3", "llama-3"),
        ("/srv/models/llama-3/", "llama-3"),
        ("./llama-3", "llama-3"),
        ("models/big/llama-3", "llama-3"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("h100-llama-3.1-8b", "h100-llama-3.1-8b"),
        ("/etc/penstock/slow.toml", "slow"),
        ("/", "model"),
        ("", ""),
    ],
)
def test_no_folder_of_this_machine_is_a_model_s_name(model: str, name: str) -> None:
    assert served_name(model) == name


def test_the_model_as_given_is_understood(start: Start) -> None:
    settings = api_settings(read_flags({"model": "/srv/models/llama-3"}, None), "llama-3")
    assert (settings.model_name, settings.model_aliases) == ("llama-3", ("/srv/models/llama-3",))
    named = api_settings(read_flags({"model": "/srv/models/llama-3", "served_model_name": "m"}, None), "llama-3")
    assert (named.model_name, named.model_aliases) == ("m", ())
    served = start(model_aliases=("/srv/models/tiny",))
    answer = served.complete(**P, model="/srv/models/tiny")
    assert answer.status_code == 200 and answer.json()["model"] == "tiny"
    assert "/srv" not in served.http.get("/v1/models").text + served.complete(**P, model="other").text
