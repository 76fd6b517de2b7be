"""Attention by a kernel that reads pages where they lie: the same outputs as over gathered pages, and used only where
it gives them. The kernel of torch is for GPUs; here its definition stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.device.accelerator import Cpu
from penstock.device.registry import registered
from penstock.engine import paged_kernel
from penstock.engine.hf_runner import HFRunner
from penstock.engine.paged_kernel import GATHERED
from penstock.engine.runner import Chunk, SamplingParams
from tests.asking import prompt_of

BLOCK = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def varlen_by_definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    return_aux: Any = None,
) -> Any:
    """What torch documents of `varlen_attn`, in float32; the rows of a chunk are the last of its context."""
    assert window_size[1] == 0 and all(tensor.dtype == torch.int32 for tensor in (cu_seq_q, seqused_k, block_table))
    assert enable_gqa == (query.shape[1] != keys.shape[2])
    outputs, sums = [], []
    for chunk, end in enumerate(seqused_k.tolist()):
        low, high = cu_seq_q[chunk : chunk + 2].tolist()
        assert high - low <= max_q and end <= max_k
        k, v = (part[block_table[chunk].long()].flatten(0, 1)[:end].float() for part in (keys, values))
        k, v = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[low:high].float(), k) * scale
        at, seen = torch.arange(end)[None, :], torch.arange(end - (high - low), end)[:, None]
        mask = at <= seen
        if window_size[0] >= 0:
            mask &= at >= seen - window_size[0]
        scores = scores.masked_fill(~mask, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    output = torch.cat(outputs).to(query.dtype)
    return output if return_aux is None else (output, torch.cat(sums, dim=1))


@contextmanager
def runner_by(kernel: Callable[..., Any] | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HFRunner]:
    with monkeypatch.context() as patched:
        if kernel is not None:
            patched.setattr(paged_kernel, "DEVICES", ("cpu",))
            patched.setattr(paged_kernel, "FLASH_VERSIONS", (None,))
            patched.setattr(paged_kernel, "_varlen", kernel)
        runner = HFRunner(str(folder), block_tokens=BLOCK, dtype="float32", device="cpu", layerwise=False)
        runner.allocate(32)
        assert not runner.kv.data.any(), "what the kernel was tried on is zeros again"
        yield runner
        runner.close()


def tokens_of(runner: HFRunner) -> list[Any]:
    """A prefill in two chunks beside decodes of another request, and decodes of both together."""
    long, short = prompt_of(1, 70), prompt_of(2, 20)
    pages, others = [7, 3, 9, 1, 12, 13], [20, 22, 21]
    found: list[Any] = [*runner.run([Chunk("a", long[:40], 0, pages), Chunk("b", short, 0, others, GREEDY)])]
    found += runner.run([Chunk("a", long[40:], 40, pages, GREEDY), Chunk("b", [found[1]], 20, others, GREEDY)])
    for step in range(5):
        a, b = found[-2:]
        found += runner.run(
            [Chunk("a", [a], 70 + step, pages, GREEDY, step + 1), Chunk("b", [b], 21 + step, others, GREEDY, step + 2)]
        )
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "qwen3_moe"])
def test_the_kernel_gives_the_same_tokens(
    architecture: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared heads, sinks, windows."""
    with runner_by(None, tiny(architecture), monkeypatch) as gathering:
        assert gathering.attention_kernel == GATHERED
        expected = tokens_of(gathering)
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options.get("return_aux"))
        return varlen_by_definition(*arguments, **options)

    with runner_by(counted, tiny(architecture), monkeypatch) as runner:
        assert runner.attention_kernel == "varlen_attn with a block table"
        calls.clear()
        assert tokens_of(runner) == expected
        assert len(calls) == 7 * runner.layout.layers, "one call for each layer and batch"
        assert any(calls) is (architecture == "gpt_oss")


def wrong(*arguments: Any, **options: Any) -> Any:
    found = varlen_by_definition(*arguments, **options)
    return found + 0.1 if isinstance(found, torch.Tensor) else (found[0] + 0.1, found[1])


def refusing(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("block_table is not supported by this flash attention")


@pytest.mark.parametrize("kernel", [wrong, refusing])
def test_a_kernel_that_does_not_give_the_right_results_is_not_used(
    kernel: Callable[..., Any], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runner_by(kernel, tiny("llama"), monkeypatch) as runner:
        assert runner.attention_kernel == GATHERED


def test_the_order_of_the_log_sum_exps_is_found_out(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's documentation says rows first, its code heads first."""

    def rows_first(*arguments: Any, **options: Any) -> Any:
        found = varlen_by_definition(*arguments, **options)
        return found if isinstance(found, torch.Tensor) else (found[0], found[1].transpose(0, 1))

    with runner_by(None, tiny("gpt_oss"), monkeypatch) as gathering:
        expected = tokens_of(gathering)
    with runner_by(rows_first, tiny("gpt_oss"), monkeypatch) as runner:
        assert runner.attention_kernel != GATHERED and tokens_of(runner) == expected


class Recording(Cpu):
    """Records a step by calling it again, with whatever its inputs hold then."""

    records = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.recorded, self.replayed, self.fails = 0, 0, False

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        output = step().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(step())

        return output, replay


@pytest.mark.parametrize("fails", [False, True])
def test_recorded_decode_steps_give_the_same_tokens(
    fails: bool, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes from step to step is in the inputs; a prefill and a step of another size are not replayed."""
    made: list[Recording] = []

    def recording(device: torch.device) -> Recording:
        made.append(Recording(device))
        made[-1].fails = fails
        return made[-1]

    def decode(runner: HFRunner) -> list[Any]:
        found = tokens_of(runner)
        pages = [25, 24, 26]
        found += runner.run([Chunk("c", prompt_of(3, 10), 0, pages, GREEDY)])
        for step in range(30):  # through the ends of pages, and of a table of one column
            found += runner.run([Chunk("c", [found[-1]], 10 + step, pages, GREEDY, step + 1)])
        return found

    with runner_by(None, tiny("llama"), monkeypatch) as gathering:
        expected = decode(gathering)
    with registered("cpu", recording), runner_by(varlen_by_definition, tiny("llama"), monkeypatch) as runner:
        assert decode(runner) == expected
        device = max(made, key=lambda one: one.recorded)
        if fails:
            assert device.recorded == device.replayed == 0
        else:
            assert device.recorded == 4, "two requests; one with tables of one, two and four columns"
            assert device.replayed == 5 - 1 + 30 - 3 + device.recorded, "and each was compared once"


def test_recorded_steps_that_replay_something_else_are_not_used(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stale(Recording):
        """Replays what it recorded first, whatever its inputs hold."""

        def record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            self.recorded += 1
            output = torch.zeros_like(step())

            def replay() -> None:
                self.replayed += 1

            return output, replay

    made: list[Stale] = []

    def stale(device: torch.device) -> Stale:
        made.append(Stale(device))
        return made[-1]

    with runner_by(None, tiny("llama"), monkeypatch) as gathering:
        expected = tokens_of(gathering)
    with registered("cpu", stale), runner_by(varlen_by_definition, tiny("llama"), monkeypatch) as runner:
        assert tokens_of(runner) == expected
    device = max(made, key=lambda one: one.recorded)
    assert (device.recorded, device.replayed) == (1, 1), "it was tried, and never again"
