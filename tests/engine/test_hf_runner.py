"""The runner against transformers' own generation, and the ways of KV into and out of L1."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.core.layout import KVLayout
from penstock.engine import attention
from penstock.engine.checkpoint_folder import quiet_transformers
from penstock.engine.hf_runner import HFRunner
from penstock.engine.paged_kv import LayerShape, PagedKV, UploadFailed
from penstock.engine.runner import Chunk, ModelRunner, SamplingParams
from penstock.testing.tiny_models import ARCHITECTURES, build_tiny

GREEDY = SamplingParams(temperature=0.0)
BLOCK = 16
NEW_TOKENS = 10
WAIT_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: build_tiny(name, base / name, seed=3) for name in ARCHITECTURES}


def new_runner(folder: Path, pages: int = 64, **options: Any) -> HFRunner:
    runner = HFRunner(str(folder), block_tokens=BLOCK, device="cpu", **options)
    runner.allocate(pages)
    return runner


@pytest.fixture
def llama(checkpoints: dict[str, Path]) -> Iterator[HFRunner]:
    runner = new_runner(checkpoints["llama"])
    yield runner
    runner.close()


def prompt_of(runner: HFRunner, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(6, runner.vocab_size, (tokens,), generator=generator)]


def generated_by_transformers(folder: Path, prompts: list[list[int]], implementation: str) -> list[list[int]]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            result = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            outputs.append(result[0, len(prompt) :].tolist())
    return outputs


def decode(runner: HFRunner, prompt: list[int], pages: list[int], first: int) -> list[int]:
    """The tokens after `first` (which follows the prompt), one at a time."""
    tokens = [first]
    while len(tokens) < NEW_TOKENS:
        at = len(prompt) + len(tokens) - 1
        (token,) = runner.run([Chunk("r", [tokens[-1]], at, pages, GREEDY, len(tokens))])
        assert isinstance(token, int)
        tokens.append(token)
    return tokens


def host_blocks(runner: HFRunner, pages: list[int]) -> list[memoryview]:
    blocks = [memoryview(bytearray(runner.layout.full_block_bytes)) for _ in pages]
    for block, page in zip(blocks, pages, strict=True):
        runner.download(page, block)
    return blocks


def test_is_a_model_runner(llama: HFRunner) -> None:
    runner: ModelRunner = llama
    assert runner.layout.layers == 4
    assert runner.layout.dtype == "float32"
    assert runner.eos_token_ids == frozenset({1})
    assert runner.max_context_tokens == 2048


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_chunks_and_decodes_equal_transformers(architecture: str, checkpoints: dict[str, Path]) -> None:
    """Three requests of different lengths, chunks of odd sizes, prefill and decode in one batch."""
    folder = checkpoints[architecture]
    runner = new_runner(folder)
    prompts = [prompt_of(runner, size, seed) for size, seed in ((75, 1), (33, 2), (130, 3))]
    expected = generated_by_transformers(folder, prompts, "eager" if architecture == "gpt_oss" else "sdpa")
    chunk_sizes = (13, 33, 41)
    pages = [[17, 3, 30, 5, 22, 9], [1, 40, 2], [50, 10, 51, 11, 52, 12, 53, 13, 54]]
    computed = [0, 0, 0]
    tokens: list[list[int]] = [[], [], []]
    while any(len(generated) < NEW_TOKENS for generated in tokens):
        batch, owners = [], []
        for index, prompt in enumerate(prompts):
            if len(tokens[index]) >= NEW_TOKENS:
                continue
            left = prompt[computed[index] : computed[index] + chunk_sizes[index]] or [tokens[index][-1]]
            ends_prompt = computed[index] + len(left) >= len(prompt)
            sampling = GREEDY if ends_prompt else None
            batch.append(Chunk(str(index), left, computed[index], pages[index], sampling, len(tokens[index])))
            owners.append(index)
        for index, chunk, token in zip(owners, batch, runner.run(batch), strict=True):
            computed[index] += len(chunk.tokens)
            assert (token is None) == (chunk.sampling is None)
            if token is not None:
                assert isinstance(token, int)
                tokens[index].append(token)
    assert tokens == expected
    assert len(set(tokens[0])) > 2, "a model that repeats itself proves nothing"
    runner.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layerwise", [True, False])
def test_uploaded_kv_and_a_recomputed_hole_give_the_same_tokens(
    architecture: str, layerwise: bool, checkpoints: dict[str, Path]
) -> None:
    folder = checkpoints[architecture]
    first, second = new_runner(folder), new_runner(folder, layerwise=layerwise)
    assert first.model_id == second.model_id and first.layout == second.layout
    assert bool(first.notes) == (architecture == "deepseek_v3")
    prompt = prompt_of(first, 6 * BLOCK + 5, 4)
    pages = list(range(20, 28))
    (token,) = first.run([Chunk("r", prompt, 0, pages, GREEDY)])
    assert isinstance(token, int)
    expected = decode(first, prompt, pages, token)
    blocks = host_blocks(first, pages[:6])

    other_pages = [9, 31, 4, 60, 2, 8, 33, 34]
    hole = 3
    loaded = [index for index in range(6) if index != hole]
    group = second.start_upload([(blocks[index], other_pages[index]) for index in loaded])
    second.upload(group)
    group.wait_layer(3)
    refill = Chunk("r", prompt[hole * BLOCK : (hole + 1) * BLOCK], hole * BLOCK, other_pages)
    tail = Chunk("r", prompt[6 * BLOCK :], 6 * BLOCK, other_pages, GREEDY)
    _, token = second.run([refill, tail])
    assert isinstance(token, int)
    assert decode(second, prompt, other_pages, token) == expected
    for index, block in zip(loaded, host_blocks(second, [other_pages[index] for index in loaded]), strict=True):
        assert block == blocks[index]
    for runner in (first, second):
        runner.close()


class Ticket:
    """An upload group that says which layers were asked for, then waits like the real one."""

    def __init__(self, group: Any, layers: int) -> None:
        self._group = group
        self.asked = [threading.Event() for _ in range(layers)]

    def wait_layer(self, layer: int) -> None:
        self.asked[layer].set()
        self._group.wait_layer(layer)


def test_compute_starts_before_the_upload_and_follows_it_layer_by_layer(
    checkpoints: dict[str, Path], llama: HFRunner
) -> None:
    prompt = prompt_of(llama, 5 * BLOCK + 7, 5)
    pages = list(range(8))
    (token,) = llama.run([Chunk("r", prompt, 0, pages, GREEDY)])
    blocks = host_blocks(llama, pages[:5])
    other = new_runner(checkpoints["llama"])
    with ThreadPoolExecutor(1) as compute:
        group = other.start_upload([(block, page) for block, page in zip(blocks, pages[:5], strict=True)])
        ticket = Ticket(group, other.layout.layers)
        chunk = Chunk("r", prompt[5 * BLOCK :], 5 * BLOCK, pages, GREEDY, pending=[ticket])
        running = compute.submit(other.run, [chunk])
        assert ticket.asked[0].wait(WAIT_S)
        other.upload(group)
        assert running.result(WAIT_S) == [token]

        # The bytes are in L1 now; a second group releases its layers by hand.
        held = other.start_upload([(blocks[0], pages[0])])
        ticket = Ticket(held, other.layout.layers)
        running = compute.submit(other.run, [Chunk("r", chunk.tokens, chunk.start, pages, GREEDY, pending=[ticket])])
        for layer in range(other.layout.layers):
            assert ticket.asked[layer].wait(WAIT_S)
            assert not running.done()
            assert not any(event.is_set() for event in ticket.asked[layer + 1 :])
            held.stage_done(None)
        assert running.result(WAIT_S) == [token]
    other.close()


def test_a_failed_upload_ends_the_batch_and_the_runner_goes_on(llama: HFRunner) -> None:
    prompt = prompt_of(llama, 2 * BLOCK + 3, 6)
    pages = [0, 1, 2]
    (token,) = llama.run([Chunk("r", prompt, 0, pages, GREEDY)])
    block = host_blocks(llama, [0])[0]
    group = llama.start_upload([(block, 5)])
    ticket = Ticket(group, llama.layout.layers)
    with ThreadPoolExecutor(1) as compute:
        chunk = Chunk("r", prompt[BLOCK:], BLOCK, [5, 6, 7], GREEDY, pending=[ticket])
        running = compute.submit(llama.run, [chunk])
        assert ticket.asked[0].wait(WAIT_S)
        block.release()  # the host memory goes away under the upload
        with pytest.raises(ValueError):
            llama.upload(group)
        with pytest.raises(UploadFailed, match="upload of 1 blocks failed"):
            running.result(WAIT_S)
    assert llama.run([Chunk("r", prompt, 0, [5, 6, 7], GREEDY)]) == [token]


def test_an_upload_that_never_comes_ends_at_its_deadline(checkpoints: dict[str, Path]) -> None:
    runner = new_runner(checkpoints["llama"], upload_timeout_s=0.05)
    group = runner.start_upload([(memoryview(bytearray(runner.layout.full_block_bytes)), 0)])
    with pytest.raises(UploadFailed, match=r"layer 0 .* within 0.05 s"):
        runner.run([Chunk("r", [7, 8], BLOCK, [0, 1], GREEDY, pending=[group])])


def test_bad_chunks_blocks_and_pages_are_refused(llama: HFRunner) -> None:
    cases = [
        (Chunk("x", [], 0, [0]), "needs a token"),
        (Chunk("x", [1], -1, [0]), "start of at least 0"),
        (Chunk("x", [1], 2048, [0] * 200), "at most 2048"),
        (Chunk("x", [1] * 17, 0, [0]), "1 pages for 17 tokens; 2 needed"),
        (Chunk("x", [1], 0, [64]), "pages must be 0 to 63"),
        (Chunk("x", [llama.vocab_size], 0, [0]), "token ids must be 0 to"),
    ]
    for chunk, message in cases:
        with pytest.raises(ValueError, match=message):
            llama.run([chunk])
    assert llama.run([]) == []
    assert llama.run([Chunk("x", [1], 0, [0, -1])]) == [None], "pages after the chunk are not its business"
    block = memoryview(bytearray(llama.layout.full_block_bytes))
    with pytest.raises(ValueError, match="page 64 does not exist"):
        llama.start_upload([(block, 64)])
    with pytest.raises(ValueError, match="a full block has"):
        llama.start_upload([(block[1:], 0)])
    with pytest.raises(ValueError, match="writable"):
        llama.download(0, block.toreadonly())
    with pytest.raises(RuntimeError, match="allocated already"):
        llama.allocate(1)


def test_reduced_precision_pages_carry_over(checkpoints: dict[str, Path]) -> None:
    """bfloat16: bytes that went out and in again give the same next token and the same bytes."""
    first = new_runner(checkpoints["qwen3"], dtype="bfloat16")
    prompt = prompt_of(first, 3 * BLOCK + 2, 7)
    (token,) = first.run([Chunk("r", prompt, 0, [0, 1, 2, 3], GREEDY)])
    assert first.layout.dtype == "bfloat16"
    blocks = host_blocks(first, [0, 1, 2])
    first.upload(first.start_upload([(block, 10 + index) for index, block in enumerate(blocks)]))
    tail = Chunk("r", prompt[3 * BLOCK :], 3 * BLOCK, [10, 11, 12, 13], GREEDY)
    assert first.run([tail]) == first.run([Chunk("r", prompt[3 * BLOCK :], 3 * BLOCK, [0, 1, 2, 3], GREEDY)])
    assert host_blocks(first, [10, 11, 12]) == blocks
    assert isinstance(token, int)


def reference_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, args: attention.AttentionArgs
) -> torch.Tensor:
    """The definition, in float64, row by row."""
    groups = query.shape[0] // keys.shape[0]
    output = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    for head in range(query.shape[0]):
        for row in range(query.shape[1]):
            end = start + row + 1
            first = max(0, end - args.window) if args.window else 0
            scores = keys[head // groups, first:end].double() @ query[head, row].double() * args.scaling
            if args.softcap is not None:
                scores = torch.tanh(scores / args.softcap) * args.softcap
            if args.sinks is not None:
                scores = torch.cat((scores, args.sinks[head : head + 1].double()))
            weights = scores.softmax(0)[: end - first]
            output[head, row] = weights @ values[head // groups, first:end].double()
    return output


@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(("window", "sinks", "softcap"), [(0, 0, None), (9, 0, None), (9, 1, None), (0, 1, 5.0)])
def test_sliced_attention_equals_its_definition(
    start: int, window: int, sinks: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASK_ELEMENTS_MAX", 64)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS_MAX", 64)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 41, 8, generator=generator)
    keys, values = (torch.randn(2, start + 41, width, generator=generator) for width in (8, 6))
    args = attention.AttentionArgs(0.3, window, torch.randn(4, generator=generator) if sinks else None, softcap)
    found = attention.causal_attention(query, keys, values, start, args)
    torch.testing.assert_close(found.double(), reference_attention(query, keys, values, start, args), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("start", "value_dim"), [(0, 8), (37, 8), (37, 6)])
def test_attention_without_a_mask_equals_its_definition(start: int, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 9, 8, generator=generator)
    keys, values = (torch.randn(2, start + 9, width, generator=generator) for width in (8, value_dim))
    found = attention.flash_causal_attention(query, keys, values, 0.3)
    expected = reference_attention(query, keys, values, start, attention.AttentionArgs(0.3, 0, None, None))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "value_dim"), [(0, 8), (0, 6), (21, 8)])
def test_a_decode_without_a_mask_equals_one_with_it(
    window: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one chunk, by the kernel for GPUs; several chunks together have a mask."""
    shape = LayerShape(2, 8, value_dim)
    layout = KVLayout(16, (shape.elements_per_token * 4,), "float32")
    kv = PagedKV(layout, [shape], torch.float32, torch.device("cpu"), 8)
    generator = torch.Generator().manual_seed(0)
    kv.data.copy_(torch.randn(kv.data.shape, generator=generator))
    query, key = torch.randn(1, 4, 1, 8, generator=generator), torch.randn(1, 2, 1, 8, generator=generator)
    value = torch.randn(1, 2, 1, value_dim, generator=generator)
    args = attention.AttentionArgs(0.3, window, None, None)
    found = []
    for flash in (False, True):
        monkeypatch.setattr(attention, "_takes_flash", lambda query, flash=flash: flash)
        batch = attention.PagedBatch(kv, [Chunk("r", [1], 56, [5, 2, 7, 1])], [[5, 2, 7, 1]], [window])
        found.append(batch.attend(SimpleNamespace(layer_idx=0), query, key, value, args))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_attention_outside_of_a_batch_or_with_a_mask_is_refused() -> None:
    some = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match="outside of a Penstock batch"):
        attention.paged_attention(None, some, some, some, None)
