"""Proof of who wrote a block: a MAC under a pool key, stored beside the block and verified by its readers.

The plain checksum (`pool.checksum`) finds damage, not forgery: anybody can make other bytes with the same checksum, so
a MAC over the checksum would protect nothing. The MAC is AES-256-GMAC over the block's bytes. GMAC must never be used
twice with one key and nonce, and one block key may be written with different bytes (another batch composition rounds
differently). So each MAC has a key of its own: BLAKE2b, keyed with the pool key, over a fresh random salt of 128 bits
and the block key. The salt is stored before the tag. A forged block of 1 GiB passes with a probability of at most
2^-101 per attempt, and each attempt needs a load by a process that has the key.

MAC-1  Statement: A MAC covers the block's key, its bytes and (by GMAC) their length. A block under another key, or
       truncated, does not pass.
MAC-2  Statement: Nodes and members without the pool key store and send a MAC unchanged.
MAC-3  Statement: A process with a pool key uses no block whose MAC it did not verify, on whatever path it arrived.
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
    """The key shared by all engines that may write blocks for each other; never part of a message or of a log."""

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
        """The key in a file: the whole content if that has KEY_FILE_BYTES_MIN bytes, else the content without
        surrounding white space. Raises ValueError with one line, also for a file that others can read or replace."""
        try:
            content = read_private(path, KEY_FILE_BYTES_MAX + 2)
            return cls(content if len(content) == KEY_FILE_BYTES_MIN else content.strip())
        except OSError as error:
            raise ValueError(f"pool key file {path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"pool key file {path}: {error}") from None

    def fingerprint(self, fingerprint: bytes) -> bytes:
        """The root of block keys, instead of `fingerprint` (16 bytes): without this pool key nobody can compute them,
        and groups with different pool keys have no block key in common."""
        return hashlib.blake2b(fingerprint, digest_size=16, key=self._name_key).digest()

    def mac(self, key: BlockKey, data: memoryview) -> bytes:
        """The MAC (MAC_BYTES) of all of `data` (exactly the block's `size_bytes`), different each time; runs without
        the GIL."""
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
    """The MAC that a writer stores beside a block; empty without a pool key."""
    return pool_key.mac(key, data) if pool_key is not None else b""


def check_block(
    pool_key: PoolKey | None, key: BlockKey, data: memoryview, checksum: int, mac: bytes
) -> PoolError | None:
    """The error in a block's bytes, or None. Reason "checksum": they are damaged. Reason "mac": they are whole, but
    were not written under this pool key. With a pool key a good block costs one pass over its bytes, that of the
    MAC."""
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
    """`check_block` bound to one block key."""
    return partial(check_block, pool_key, key)
