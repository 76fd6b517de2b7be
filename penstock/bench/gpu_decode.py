"""Milliseconds per token of decodes at several contexts, against what reading weights and KV once takes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import Chunk, SamplingParams
from penstock.report import Report

STEPS = 16
WARM_STEPS = 3
OVER_BOUND_GOAL = 2.0
COPY_BYTES = 1 << 28
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def measure_decode(runner: HFRunner, contexts: tuple[int, ...], report: Report) -> None:
    """One request, at each context that L1 holds; its KV is zeros, which cost as much as any."""
    bandwidth = _bytes_per_s(runner)
    model: Any = runner.model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for context in contexts:
        pages = list(range(-(-(context + STEPS + WARM_STEPS) // runner.layout.block_tokens)))
        if len(pages) > runner.kv.pages or context + STEPS + WARM_STEPS > runner.max_context_tokens:
            report.notes.append(f"left out: a decode at {context} tokens, which L1 or the model does not hold")
            continue
        took = []
        for step in range(STEPS + WARM_STEPS):
            start_s = time.perf_counter()
            runner.run([Chunk("decode", [1], context + step, pages, GREEDY, step)])
            took.append(time.perf_counter() - start_s)
        median_s = statistics.median(took[WARM_STEPS:])
        bound_s = (weights + context * runner.layout.bytes_per_token) / bandwidth
        report.figure(f"decode_{context}_ms", median_s * 1e3, OVER_BOUND_GOAL * bound_s * 1e3)


def _bytes_per_s(runner: HFRunner) -> float:
    """What the device reads, by a copy within it."""
    accelerator = runner.kv.accelerator
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=runner.device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(4):
        accelerator.synchronize()
        start_s = time.perf_counter()
        target.copy_(source)
        accelerator.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * COPY_BYTES / best_s
