"""Slots and pages of the fuzzed engine with a model of KV content: every batch, save and hand-off must find its own.

Also checks the bounds that a driver observes: transfers in flight by link, batches, lookups.
"""

from __future__ import annotations

from collections import Counter

from penstock.core.config import SchedulerConfig
from penstock.core.keys import BlockKey
from penstock.core.operations import (
    Compute,
    Drop,
    Emit,
    Fetch,
    Forward,
    Lookup,
    Operation,
    RequestSpec,
    Save,
    Upload,
)
from penstock.sim.engine_driver import Observer

_MASK, _FIRST = (1 << 61) - 1, 7


class Violation(AssertionError):
    """An invariant is violated."""


def hold(condition: bool, text: str) -> None:
    """Raises Violation unless `condition`."""
    if not condition:
        raise Violation(text)


def kv_of(tokens: list[int]) -> list[int]:
    """The modelled KV of each token: a function of it and of all tokens before it."""
    found, state = [], _FIRST
    for token in tokens:
        state = _next(state, token)
        found.append(state)
    return found


def _next(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) & _MASK


class CheckedMemory(Observer):
    """Checks invariants FUZZ-2 (KV content) and FUZZ-4 (bounds) for each operation. `pool` is the devices' content."""

    def __init__(self, config: SchedulerConfig, pool: dict[BlockKey, list[int]]) -> None:
        self._config = config
        self._pool = pool
        self._tokens: dict[str, list[int]] = {}
        self._values: dict[str, list[int]] = {}
        self._handed_to: dict[str, tuple[str, list[BlockKey]]] = {}
        self._blocks: dict[BlockKey, list[int]] = {}  # correct content of blocks of requests that are handed off
        self._delivered: dict[str, set[BlockKey]] = {}
        self._slots: dict[int, list[int]] = {}
        self._pages: dict[int, list[int]] = {}
        self._uploads: dict[int, Upload] = {}
        self._saving: dict[int, list[int]] = {}
        self._in_flight: Counter[str] = Counter()

    def submitted(self, spec: RequestSpec, keys: list[BlockKey]) -> None:
        """Register a request with its prompt's block keys, before the scheduler core sees it."""
        size = self._config.block_tokens
        tokens = self._tokens[spec.request_id] = list(spec.prompt)
        values = self._values[spec.request_id] = kv_of(tokens)
        if spec.hand_off is not None:
            self._handed_to[spec.request_id] = spec.hand_off.to, keys
            self._blocks |= {key: values[i * size : (i + 1) * size] for i, key in enumerate(keys)}
            there = self._delivered.setdefault(spec.hand_off.to, set())
            there |= {keys[i] for i in spec.hand_off.present}

    # -- operations that begin ----------------------------------------------------------------------------------

    def began(self, operation: Operation) -> None:
        """Check a starting operation against the content of slots and pages, and against the bounds."""
        if isinstance(operation, Fetch):
            hold(operation.slot not in self._slots, "FUZZ-3: a fetch into a slot whose content is needed")
            for name in operation.route:
                self._take(name, self._config.fetch_window_blocks)
        elif isinstance(operation, Upload):
            self._uploads[operation.op_id] = operation
            self._take("upload", self._config.upload_window_groups)
            for slot, _ in operation.blocks:
                hold(slot in self._slots, "FUZZ-2: a slot is uploaded that nothing was fetched into")
        elif isinstance(operation, Drop):
            self._slots.pop(operation.slot, None)
        elif isinstance(operation, Compute):
            self._take("batch", 1)
            self._check_batch(operation)
        elif isinstance(operation, Save):
            self._take("save", self._config.save_window_blocks)
        elif isinstance(operation, Forward):
            self._take(f"to {operation.to}", self._config.forward_window_blocks)
            self._check_forward(operation)
        elif isinstance(operation, Lookup):
            self._take("lookup", self._config.lookup_window)
        elif isinstance(operation, Emit):
            self._emitted(operation)

    def _take(self, name: str, limit: int) -> None:
        self._in_flight[name] += 1
        hold(
            self._in_flight[name] <= limit, f"FUZZ-4: {self._in_flight[name]} in flight on {name}; the bound is {limit}"
        )

    def _check_batch(self, op: Compute) -> None:
        config = self._config
        prefills = sum(len(chunk.tokens) > 1 for chunk in op.chunks)
        hold(prefills <= config.max_prefills, f"FUZZ-4: {prefills} prefills in a batch")
        tokens = sum(len(chunk.tokens) for chunk in op.chunks)
        hold(tokens <= config.max_batch_tokens, f"FUZZ-4: {tokens} tokens in a batch")
        for chunk in op.chunks:
            request, end = self._tokens[chunk.request_id], chunk.start + len(chunk.tokens)
            hold(
                list(chunk.tokens) == request[chunk.start : end], "FUZZ-2: other tokens are computed than the request's"
            )
            values = self._values[chunk.request_id]
            coming = {page: slot for upload in chunk.pending for slot, page in self._going_up(upload)}
            size = config.block_tokens
            for first in range(0, chunk.start, size):
                number = chunk.pages[first // size]
                page = self._slots[coming[number]] if number in coming else self._pages.get(number)
                last = min(first + size, chunk.start)
                right = page is not None and page[: last - first] == values[first:last]
                hold(right, "FUZZ-2: KV of other tokens is used")

    def _going_up(self, upload: int) -> tuple[tuple[int, int], ...]:
        return self._uploads[upload].blocks if upload in self._uploads else ()

    def _check_forward(self, op: Forward) -> None:
        if op.page is None:
            hold(
                self._slots.get(op.slot) == self._blocks[op.block.key],
                "FUZZ-2: other KV is handed over than the block's",
            )

    def _emitted(self, op: Emit) -> None:
        name = op.request_id
        if op.token is not None:
            self._tokens[name].append(op.token)
            self._values[name].append(_next(self._values[name][-1], op.token))
        if op.finish_reason == "handed_over":
            to, keys = self._handed_to[name]
            assert op.account is not None
            lacking = len([key for key in keys if key not in self._delivered[to]])
            known = sum(op.account.hand_off_failures.values())
            hold(lacking <= known, "FUZZ-2: a block is neither handed over nor reported missing")

    # -- operations that end ------------------------------------------------------------------------------------

    def looked_up(self, op: Lookup) -> None:
        """A lookup has ended."""
        self._in_flight["lookup"] -= 1

    def fetched(self, op: Fetch, error: str | None) -> None:
        """The slot holds the block's content if the read succeeded."""
        self._in_flight.subtract(op.route)
        if error is None:
            self._slots[op.slot] = list(self._pool[op.key])
            way, _, to = op.route[-1].partition("@")
            if way == "relay":  # it came through the decode engine's buffer
                self._delivered.setdefault(to, set()).add(op.key)

    def uploaded(self, op: Upload, failed: bool) -> None:
        """The pages hold the slots' content; slots that are not retained are free."""
        self._in_flight["upload"] -= 1
        del self._uploads[op.op_id]
        for slot, page in op.blocks:
            content = self._slots[slot]
            if slot not in op.retained:
                del self._slots[slot]
            self._pages[page] = [-1] * self._config.block_tokens if failed else list(content)

    def computed(self, op: Compute, failed: bool) -> None:
        """The pages hold the KV of the batch's tokens; after a failed batch, invalid KV."""
        self._in_flight["batch"] -= 1
        size = self._config.block_tokens
        for chunk in op.chunks:
            values = self._values[chunk.request_id]
            for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                page = self._pages.setdefault(chunk.pages[position // size], [-1] * size)
                page[position % size] = -1 if failed else values[position]

    def saved(self, op: Save, error: str | None) -> None:
        """The pool holds the block if the save succeeded."""
        self._in_flight["save"] -= 1
        content = self._saving.pop(op.op_id)
        if error is None:
            hold(-1 not in content, "FUZZ-2: an incomplete block is saved")
            self._pool[op.block.key] = content

    def downloaded(self, op: Save | Forward) -> None:
        """Check the page's content, and copy it for the save."""
        assert op.page is not None
        if isinstance(op, Save):
            self._saving[op.op_id] = list(self._pages[op.page])
            return
        hold(self._pages.get(op.page) == self._blocks[op.block.key], "FUZZ-2: other KV is handed over than the block's")

    def forwarded(self, op: Forward, error: str | None) -> None:
        """The decode engine holds the block if the hand-off succeeded."""
        self._in_flight[f"to {op.to}"] -= 1
        if op.page is None:
            self._check_forward(op)
        if error is None:
            self._delivered[op.to].add(op.block.key)
