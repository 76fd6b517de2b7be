"""Every alias under vLLM's names is a metric that vLLM has, of the same type and with the same labels."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import REGISTRY
from prometheus_client.core import Metric

from penstock.engine.api import EngineStats, GenerationRequest, OnEvent
from penstock.server.metrics import ServerMetrics, engine_families


class Idle:
    """An engine that has done nothing."""

    max_context_tokens, vocab_size, eos_token_ids = 16, 16, frozenset[int]()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        return EngineStats({"l1_pages_total": 4.0}, {}, extra={"block_tokens": 16})

    def healthy(self) -> tuple[bool, str]:
        return True, "ok"

    def close(self, timeout_s: float) -> None:
        raise NotImplementedError


def test_every_alias_is_a_metric_of_vllm() -> None:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    config = VllmConfig()
    # Of the model vLLM's metrics need these three; to look a real one up takes it a process and a minute.
    config.model_config = SimpleNamespace(served_model_name="m", max_model_len=64, is_diffusion=False)
    config.cache_config.num_gpu_blocks = 4
    PrometheusStatLogger(config, [0]).log_engine_initialized()
    theirs = {family.name: family for family in REGISTRY.collect()}
    engine = Idle()
    shown = [*ServerMetrics(engine, "m").registry.collect(), *engine_families(True, engine.stats(), "m")]
    ours = [one for one in shown if one.name.startswith("vllm:")]
    assert len(ours) == 14
    for family in ours:
        same = theirs[family.name]
        assert family.type == same.type, family.name
        assert labels_of(family) <= labels_of(same), family.name
        if family.name != "vllm:cache_config_info":
            assert labels_of(family) == labels_of(same), family.name


def labels_of(family: Metric) -> set[str]:
    return {name for sample in family.samples for name in sample.labels}
