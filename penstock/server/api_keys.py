"""API keys: the operator's key, which gives access to everything, and tenants' keys, read from a file that may change.

KEY-1  A key is stored as a keyed digest, compared in constant time, and never appears in a log line, an error or a
       repr.
KEY-2  A key file with any error is rejected as a whole; the keys read before stay valid.

Verification: tests/server/test_api_keys.py.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import ConfigError
from penstock.private_file import read_private

FILE_BYTES_MAX = 4 * 2**20
KEY_CHARACTERS_MAX = 512
TENANT_CHARACTERS_MAX = 128
TENANT_NAME = re.compile(r"[A-Za-z0-9._@-]{1,128}")
KEY_TEXT = re.compile(r"[\x21\x23-\x26\x28-\x5b\x5d-\x7e]{1,512}")  # visible ASCII without quotes and backslash
_ALLOWED = 'KEY TENANT, or "KEY" = "TENANT", on a line; a line that begins with # is a comment'


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. `tenant` is empty if the client's `cache_salt` names the tenant."""

    tenant: str = ""
    operator: bool = False


class TenantKeys:
    """The keys of a file: one per line, each with its tenant."""

    def __init__(self, file: Path) -> None:
        """Read the file. Raises ConfigError."""
        self.file = file
        self._secret = os.urandom(32)
        self._tenants: dict[bytes, str] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._tenants)

    def reload(self) -> None:
        """Read the file again. On ConfigError the keys read before stay valid."""
        try:
            content = read_private(self.file, FILE_BYTES_MAX)
        except OSError as error:
            raise ConfigError(f"api_keys {self.file} cannot be read: {error.strerror or error}") from None
        self._tenants = self._parse(content)

    def tenant(self, key: bytes) -> str | None:
        """The tenant of this key, or None if the file does not contain it."""
        return self._tenants.get(self._digest(key))  # not a timing leak: clients cannot compute the keyed digest

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")

    def _parse(self, content: bytes) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        lines: dict[bytes, int] = {}
        for number, line in enumerate(content.split(b"\n"), 1):
            place = f"{self.file}:{number}"
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise ConfigError(f"{place}: this is not UTF-8 text; allowed: {_ALLOWED}") from None
            if not text or text.startswith("#"):
                continue
            key, tenant = _key_and_tenant(text, place)
            digest = self._digest(key.encode())
            if digest in found:
                raise ConfigError(f"{place}: the key of line {lines[digest]} comes again; allowed: each key once")
            found[digest], lines[digest] = tenant, number
        if not found:
            raise ConfigError(f"{self.file}: there is no key in it; allowed: {_ALLOWED}")
        return found


class KeyCheck:
    """Identifies the sender of a request from its Authorization header."""

    def __init__(self, operator_key: str | None, tenants: TenantKeys | None) -> None:
        self._secret = os.urandom(32)
        self._operator = None if operator_key is None else hmac.digest(self._secret, operator_key.encode(), "sha256")
        self._tenants = tenants

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return self._operator is not None or self._tenants is not None

    def caller(self, headers: Iterable[tuple[bytes, bytes]], *, basic: bool) -> Caller | None:
        """The sender if the key is valid, else None. `basic`: also accept the key as a Basic password with any user
        name, as a browser sends it."""
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, credentials = given[0].partition(b" ")
        key = credentials.strip()
        if scheme.lower() == b"basic" and basic:
            key = _password(key)
        elif scheme.lower() != b"bearer":
            return None
        if not 0 < len(key) <= KEY_CHARACTERS_MAX * 4:
            return None
        operator = self._operator
        if operator is not None and hmac.compare_digest(hmac.digest(self._secret, key, "sha256"), operator):
            return Caller(operator=True)
        tenant = self._tenants.tenant(key) if self._tenants is not None else None
        return None if tenant is None else Caller(tenant)


def _key_and_tenant(text: str, place: str) -> tuple[str, str]:
    """Parse one line. Raises ConfigError, whose text never contains the key."""
    words = text.split()
    if len(words) == 3 and words[1] == "=":
        del words[1]
    if len(words) != 2:
        raise ConfigError(f"{place}: a line of {len(words)} words; allowed: {_ALLOWED}")
    key, tenant = (word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word for word in words)
    if not KEY_TEXT.fullmatch(key):
        allowed = f"1 to {KEY_CHARACTERS_MAX} visible ASCII characters without quotes and backslash"
        raise ConfigError(f"{place}: the key is not usable; allowed: {allowed}")
    if not TENANT_NAME.fullmatch(tenant):
        allowed = f"1 to {TENANT_CHARACTERS_MAX} letters, digits, and . _ @ -"
        raise ConfigError(f"{place}: the tenant (the second word) is not usable; allowed: {allowed}")
    return key, tenant


def _password(encoded: bytes) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
