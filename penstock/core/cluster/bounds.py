"""The prefill/decode ratios within which no link but the storage NICs is a bottleneck (DualPath's analysis)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from penstock.core.config import check_range


@dataclass(frozen=True, slots=True)
class NodeLinks:
    """One node: GPUs, bandwidth of a compute NIC (one per GPU), of its storage NIC, and of its memory; bytes/s."""

    gpus: int
    compute_nic_bytes_per_s: float
    storage_nic_bytes_per_s: float
    memory_bytes_per_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name), 1, 1e18)

    @property
    def storage_share(self) -> float:
        """s: the storage NIC's bandwidth in compute NICs."""
        return self.storage_nic_bytes_per_s / self.compute_nic_bytes_per_s


@dataclass(frozen=True, slots=True)
class LinkUse:
    """How much of each link all storage NICs at full rate would use; above 1 the link is the bottleneck."""

    prefill_in: float
    prefill_out: float
    decode_in: float
    decode_out: float
    decode_memory: float

    @property
    def worst(self) -> tuple[str, float]:
        """The link nearest to (or farthest beyond) its limit, and its use."""
        found = {field.name: float(getattr(self, field.name)) for field in fields(self)}
        name = max(found, key=lambda n: found[n])
        return name, found[name]


def link_use(links: NodeLinks, prefill_nodes: int, decode_nodes: int) -> LinkUse:
    """The paper's per-resource inequalities as used fractions, reads balanced over all storage NICs."""
    s, g = links.storage_share, links.gpus
    ratio = prefill_nodes / decode_nodes
    bandwidth = links.storage_nic_bytes_per_s
    return LinkUse(
        prefill_in=s / g * (1.0 + 1.0 / ratio),
        prefill_out=2.0 * s / g,
        decode_in=s / g * (2.0 * ratio + 1.0),
        decode_out=s / g * (ratio + 2.0),
        decode_memory=(3.0 + 2.0 * ratio) * bandwidth / links.memory_bytes_per_s,
    )


def ratio_bounds(links: NodeLinks) -> tuple[float, float]:
    """Smallest and largest P/D without a bottleneck: `s/(g-s) <= P/D <= min{(g-2s)/s, (g-s)/(2s), (M/(Bs)-3)/2}`.

    Empty (low above high) where the storage NIC is too fast for the rest of the node."""
    s, g = links.storage_share, float(links.gpus)
    low = s / (g - s) if g > s else float("inf")
    memory = (links.memory_bytes_per_s / links.storage_nic_bytes_per_s - 3.0) / 2.0
    return low, min((g - 2.0 * s) / s, (g - s) / (2.0 * s), memory)
