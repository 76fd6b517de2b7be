"""Who wrote a block: a MAC under a pool key, stored beside the block and verified by whoever loads it.

The plain checksum (`pool.checksum`) finds damage, not intent: anybody can make other bytes with a right one, so a MAC
over the checksum would bind nothing. The MAC is AES-256-GMAC over the block's bytes. GMAC must never be used twice with
one key and nonce, and one block key may be written with other bytes (another batch rounds otherwise). So each MAC has a
key of its own: BLAKE2b under the pool key over a fresh random salt of 128 bits and the block key. The salt is stored
before the tag. A forgery of a block of 1 GiB succeeds with a chance of at most 2^-101 per attempt, and an attempt takes
a load by somebody who has the key.

MAC-1  A MAC covers the block's key, its bytes and (GMAC) their length: nothing else passes, neither under another key
       nor cut short.
MAC-2  Nodes and members without the key store and send a MAC as it came.
MAC-3  A process with a key takes no block whose MAC it did not verify, whatever path the block came by.
Verification: tests/pool/test_mac.py.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from functools import partial
from pathlib import Path

from penstock.core.keys import BlockKey
from penstock.core.new_block import MAC_BYTES
from penstock.pool.api import PoolError, ReadCheck
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import note_loss
from penstock.private_file import read_private

KEY_FILE_BYTES_MIN = 32
KEY_FILE_BYTES_MAX = 4096
SALT_BYTES = MAC_BYTES // 2
_NONCE = bytes(12)  # each key is used once


class PoolKey:
    """The key of all who may write blocks for each other; never part of a message or of a text."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for fewer than KEY_FILE_BYTES_MIN bytes, or more than KEY_FILE_BYTES_MAX."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not KEY_FILE_BYTES_MIN <= len(secret) <= KEY_FILE_BYTES_MAX:
            raise ValueError(
                f"the pool key has {len(secret)} bytes; allowed: {KEY_FILE_BYTES_MIN} to {KEY_FILE_BYTES_MAX} "
                "(openssl rand -hex 32)"
            )
        self._aes_gcm = AESGCM
        self._mac_key = hashlib.blake2b(secret, digest_size=32, person=b"penstock mac").digest()
        self._name_key = hashlib.blake2b(secret, digest_size=32, person=b"penstock names").digest()

    @classmethod
    def read(cls, path: Path) -> PoolKey:
        """The content of a file: all of it where that is KEY_FILE_BYTES_MIN bytes, else without white space around it.
        Raises ValueError with one line, also for a file that others can read or replace."""
        try:
            content = read_private(path, KEY_FILE_BYTES_MAX + 2)
            return cls(content if len(content) == KEY_FILE_BYTES_MIN else content.strip())
        except OSError as error:
            raise ValueError(f"pool key file {path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"pool key file {path}: {error}") from None

    def fingerprint(self, fingerprint: bytes) -> bytes:
        """The start of block keys, in the place of `fingerprint` (16 bytes): without this pool key nobody can compute
        them, and groups with different keys share no block key."""
        return hashlib.blake2b(fingerprint, digest_size=16, key=self._name_key).digest()

    def mac(self, key: BlockKey, data: memoryview) -> bytes:
        """MAC_BYTES for all of `data` (exactly the block's `size_bytes`), different each time; runs without the GIL."""
        salt = os.urandom(SALT_BYTES)
        return salt + self._tag(salt, key, data)

    def verifies(self, key: BlockKey, data: memoryview, mac: bytes) -> bool:
        """Whether `mac` was made with this pool key for this block key and these bytes; runs without the GIL."""
        salt = mac[:SALT_BYTES]
        return len(mac) == MAC_BYTES and hmac.compare_digest(self._tag(salt, key, data), mac[SALT_BYTES:])

    def _tag(self, salt: bytes, key: BlockKey, data: memoryview) -> bytes:
        once = hashlib.blake2b(salt + key, digest_size=32, key=self._mac_key, person=b"penstock block").digest()
        return self._aes_gcm(once).encrypt(_NONCE, b"", data)


def block_mac(pool_key: PoolKey | None, key: BlockKey, data: memoryview) -> bytes:
    """What a writer stores beside a block: nothing without a pool key."""
    return pool_key.mac(key, data) if pool_key is not None else b""


def check_block(
    pool_key: PoolKey | None, key: BlockKey, data: memoryview, checksum: int, mac: bytes
) -> PoolError | None:
    """What is wrong with a block's bytes: "checksum", they are damaged; "mac", they are not, but were not written under
    this pool key. With a pool key a good block takes one pass, that of the MAC."""
    if pool_key is not None and pool_key.verifies(key, data, mac):
        return None
    if block_checksum(key, data) != checksum:
        return PoolError("checksum", f"block {key.hex()} does not match its checksum")
    if pool_key is None:
        return None
    what = "has no MAC" if not mac else "does not match its MAC"
    note_loss("mac_failures", "", "block %s is computed again: it %s under this engine's pool key", key.hex(), what)
    return PoolError("mac", f"block {key.hex()} {what} under this engine's pool key")


def check_of(pool_key: PoolKey | None, key: BlockKey) -> ReadCheck:
    """`check_block` for one block."""
    return partial(check_block, pool_key, key)
