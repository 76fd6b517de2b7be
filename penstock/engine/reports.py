"""Reports about requests and pools: the core's accounts with times from arrival, pool members as metric series."""

from __future__ import annotations

from penstock.core.config import SchedulerConfig
from penstock.core.operations import Account
from penstock.engine.api import LINK_CHARACTERS_MAX, GenerationRequest, RequestReport
from penstock.pool.api import PoolStat


def pool_series(stat: PoolStat) -> dict[str, dict[str, float]]:
    """Series of a pool: its members by name, bytes over quotas by tag, evictions by reason."""
    series = {
        f"pool_member_{name}": {member.name: float(getattr(member, name)) for member in stat.members}
        for name in ("capacity_bytes", "used_bytes", "blocks", "healthy", "weight", "errors")
    }
    series["pool_over_quota_bytes"] = {tenant: float(excess) for tenant, excess in stat.over_quota}
    series["pool_evictions"] = {reason: float(count) for reason, count in stat.evictions_by}
    return series


def report_of(request: GenerationRequest, account: Account, config: SchedulerConfig) -> RequestReport:
    """The scheduler core's account of a request, with times counted from its arrival."""
    arrival_s = account.arrival_s
    end_s = account.end_s if account.end_s is not None else arrival_s
    fetch_s, upload_s = account.measured_fetch_s, account.measured_upload_s
    return RequestReport(
        prompt_tokens=account.prompt_tokens,
        cached_tokens=min(account.cached_tokens, account.prompt_tokens),
        loaded_bytes=account.loaded_bytes,
        generated_tokens=account.generated_tokens,
        ttft_s=None if account.first_token_s is None else account.first_token_s - arrival_s,
        total_s=end_s - arrival_s,
        slo_ttft_s=request.slo_ttft_s,
        predicted_load_s=account.predicted_load_s,
        predicted_compute_s=account.predicted_compute_s,
        measured_load_s=fetch_s + upload_s if config.mode == "coupled" else max(fetch_s, upload_s),
        measured_compute_s=account.measured_compute_s,
        recomputed_tokens=account.recomputed_tokens,
        load_failures=dict(account.load_failures),
        spans=tuple((label, start - arrival_s, end - arrival_s) for label, start, end in account.spans),
        handed_blocks=account.handed_blocks,
        hand_off_failures=dict(account.hand_off_failures),
        link_reads=tuple(
            (name[:LINK_CHARACTERS_MAX], reads.start_s - arrival_s, reads.end_s - arrival_s, reads.size_bytes)
            for name, reads in account.link_reads.items()
        ),
    )
