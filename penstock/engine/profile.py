"""Compute profiles: the KV geometry of a model and what batches and uploads cost on a named GPU (modelled compute)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import msgspec

from penstock.core.config import ConfigError, check_range
from penstock.core.cost import ComputeCost
from penstock.toml_file import parse_toml


@dataclass(frozen=True, slots=True)
class Profile:
    """A batch of q query tokens after c context tokens takes `a_s + b_s.q + c_s.q.(c + q/2)` seconds.

    `source`: origin of the numbers. `bytes_divisor` and `time_factor`: how the profile was scaled.
    """

    name: str
    source: str
    layers: int
    layer_bytes_per_token: int
    dtype: str
    vocab_size: int
    max_context_tokens: int
    a_s: float
    b_s: float
    c_s: float
    upload_bytes_per_s: float
    bytes_divisor: float = 1.0
    time_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("layers", "layer_bytes_per_token", "vocab_size", "max_context_tokens", "upload_bytes_per_s"):
            check_range(name, getattr(self, name), 1, 1e15)
        for name in ("a_s", "b_s", "c_s"):
            check_range(name, getattr(self, name), 0, 1e6)

    def compute_cost(self) -> ComputeCost:
        """The cost model of a batch."""
        return ComputeCost(self.a_s, self.b_s, self.c_s)

    def scaled(self, bytes_divisor: int, time_factor: float) -> Profile:
        """The profile with KV bytes divided by `bytes_divisor` and all times multiplied by `time_factor`; bandwidths
        follow.

        Raises ConfigError when a layer's bytes do not divide."""
        if bytes_divisor < 1 or self.layers * self.layer_bytes_per_token % bytes_divisor:
            total = self.layers * self.layer_bytes_per_token
            raise ConfigError(f"bytes_divisor is {bytes_divisor}; allowed: a divisor of {total} (bytes per token)")
        layers, width = self.layers, self.layer_bytes_per_token
        if width % bytes_divisor:  # reduce layers instead, to avoid fractions of a byte
            layers, width = 1, layers * width
        return replace(
            self,
            layers=layers,
            layer_bytes_per_token=width // bytes_divisor,
            a_s=self.a_s * time_factor,
            b_s=self.b_s * time_factor,
            c_s=self.c_s * time_factor,
            upload_bytes_per_s=self.upload_bytes_per_s / bytes_divisor / time_factor,
            bytes_divisor=self.bytes_divisor * bytes_divisor,
            time_factor=self.time_factor * time_factor,
        )


def profile_names() -> list[str]:
    """Names of the profiles that ship with Penstock."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in files("penstock.engine").joinpath("profiles").iterdir()
        if entry.name.endswith(".toml")
    )


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or one in a TOML file by path. Raises ConfigError."""
    if name in profile_names():
        file = Path(str(files("penstock.engine").joinpath("profiles").joinpath(f"{name}.toml")))
    elif name.endswith(".toml") and Path(name).is_file():
        file = Path(name)
    else:
        raise ConfigError(f"profile is {name!r}; allowed: {', '.join(profile_names())}, or the path of a .toml file")
    try:
        return msgspec.convert(parse_toml(file), Profile)
    except OSError as error:
        raise ConfigError(f"profile {name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, not TOML, or a field of wrong type or range
        raise ConfigError(f"profile {name}: {error}") from None
