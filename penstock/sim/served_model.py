"""A model's cost on a GPU (KV bytes per token, prefill and decode times), computed from its published sizes."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

import msgspec

from penstock.core.config import ConfigError, check_range
from penstock.core.cost import ComputeCost
from penstock.core.engine.compute_quota import AttentionCost


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, at achievable rates. The defaults are one assumption for all models: Hopper with 80 GB, 400 TFLOP/s in
    prefill (40 % of dense bf16), 80 % of 3.35 TB/s of memory bandwidth."""

    flop_per_s: float = 400.0e12
    memory_bytes: float = 80.0e9
    memory_share: float = 0.9
    activation_bytes: float = 4.0e9
    memory_bytes_per_s: float = 2.68e12

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name), 1e-3, 1e18)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by its sizes. `ranks_in_step`: the engines of a group exchange tokens in every layer (experts are spread
    over them), so all wait for the slowest; otherwise each engine has all weights and runs independently."""

    name: str
    source: str
    layers: int
    kv_bytes_per_token: int
    linear_flop_per_token: float
    attention_flop_per_token: float
    attention_flop_per_pair: float
    decode_read_bytes_per_sequence: float
    decode_read_bytes_per_token: float
    weight_bytes: float
    replicated_weight_bytes: float
    ranks_in_step: bool
    layer_overhead_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                zero = field.name.startswith(("attention_", "decode_read", "layer_overhead"))
                check_range(field.name, value, 0.0 if zero else 1.0, 1e18)

    def attention(self, gpu: Gpu) -> AttentionCost:
        """Cost of prefill attention on this GPU."""
        rate = gpu.flop_per_s
        return AttentionCost(self.attention_flop_per_token / rate, self.attention_flop_per_pair / rate)

    def step_overhead_s(self) -> float:
        """Seconds of a decode step that do not depend on the batch."""
        return self.layers * self.layer_overhead_s

    def prefill_cost(self, gpu: Gpu) -> ComputeCost:
        """Time of one prompt on one GPU, in the form of the core's cost model: a + b.q + c.q.(context + q/2)."""
        per_token = self.linear_flop_per_token + self.attention_flop_per_token
        return ComputeCost(0.0, per_token / gpu.flop_per_s, self.attention_flop_per_pair / gpu.flop_per_s)

    def weights_on_gpu(self, engines_in_group: int) -> float:
        """Bytes of weights on each GPU of a group."""
        spread = engines_in_group if self.ranks_in_step else 1
        return self.replicated_weight_bytes + (self.weight_bytes - self.replicated_weight_bytes) / spread

    def kv_tokens(self, gpu: Gpu, engines_in_group: int) -> int:
        """Tokens of KV that fit beside the weights. Raises ConfigError if the model does not fit."""
        room = gpu.memory_bytes * gpu.memory_share - gpu.activation_bytes - self.weights_on_gpu(engines_in_group)
        tokens = int(room / self.kv_bytes_per_token)
        if tokens < 1:
            need = self.weights_on_gpu(engines_in_group) + gpu.activation_bytes
            raise ConfigError(
                f"memory_bytes is {gpu.memory_bytes:.3g}, {gpu.memory_share:g} of it usable; {self.name} in groups "
                f"of {engines_in_group} engines needs {need:.3g} before any KV; allowed: more memory or larger groups"
            )
        return tokens

    def fits(self, gpu: Gpu, engines_in_group: int, tokens: int) -> bool:
        """Whether the weights and this many tokens of KV fit on each GPU of such a group."""
        try:
            return self.kv_tokens(gpu, engines_in_group) >= tokens
        except ConfigError:
            return False

    def decode_step(self, gpu: Gpu, engines_in_group: int) -> tuple[float, float, float]:
        """(a, b, c): a step of n sequences with t tokens of context in all takes a + b.n + c.t seconds on one GPU."""
        rate, memory = gpu.flop_per_s, gpu.memory_bytes_per_s
        a = self.weights_on_gpu(engines_in_group) / memory + self.step_overhead_s()
        b = (self.linear_flop_per_token + self.attention_flop_per_token) / rate
        b += self.decode_read_bytes_per_sequence / memory
        c = max(self.decode_read_bytes_per_token / memory, self.attention_flop_per_pair / rate)
        return a, b, c


def model_names() -> list[str]:
    """Names of the models shipped with Penstock."""
    folder = files("penstock.sim").joinpath("models")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_model(name: str) -> ServedModel:
    """A shipped model by name, or one in a TOML file by path. Raises ConfigError."""
    if name in model_names():
        data = files("penstock.sim").joinpath("models").joinpath(f"{name}.toml").read_bytes()
    elif name.endswith(".toml") and Path(name).is_file():
        data = Path(name).read_bytes()
    else:
        raise ConfigError(f"model is {name!r}; allowed: {', '.join(model_names())}, or the path of a .toml file")
    try:
        return msgspec.convert(tomllib.loads(data.decode()), ServedModel)
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from None
