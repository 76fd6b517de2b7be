"""Sizes, rates and addresses as people write them: "2GiB", "200MB/s", "127.0.0.1:7070"."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": 2**10,
    "m": 10**6,
    "mb": 10**6,
    "mib": 2**20,
    "g": 10**9,
    "gb": 10**9,
    "gib": 2**30,
    "t": 10**12,
    "tb": 10**12,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_ALLOWED = "a number and one of B, KB, KiB, MB, MiB, GB, GiB, TB, TiB"


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "512MiB" or "1.5GB". Raises ValueError for anything else, zero included."""
    found = _SIZE.fullmatch(text)
    factor = _FACTORS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(f"size {text!r} is not understood; allowed is {_ALLOWED}, for example 2GiB")
    size = int(float(found[1]) * factor) if "." in found[1] else int(found[1]) * factor
    if not 0 < size < 2**63:
        raise ValueError(f"size {text!r} is {size} bytes; it must be between 1 byte and 8 EiB")
    return size


def parse_rate(text: str) -> float:
    """Bytes per second of a rate such as "200MB/s" or "10Gbit/s". Raises ValueError for anything else."""
    stripped = text.strip()
    bits = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)bit/s", stripped, re.IGNORECASE)
    try:
        if bits:
            return parse_bytes(f"{bits[1]}{bits[2]}") / 8
        if not stripped.endswith("/s"):
            raise ValueError
        return float(parse_bytes(stripped[:-2]))
    except ValueError:
        raise ValueError(
            f"rate {text!r} is not understood; allowed is {_ALLOWED}, then /s, or Mbit/s, Gbit/s; for example 200MB/s"
        ) from None


def format_bytes(size_bytes: float) -> str:
    """A size in the largest binary unit that leaves at least 1, with three digits: "1.5 GiB"."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {text!r} is not understood; allowed is HOST:PORT with a port from 0 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(host: str, port: int) -> str:
    """What `parse_address` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
