"""New blocks on their way into a local pool: which are taken, on which member each is stored, when it is present."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from penstock.core.keys import BlockKey, split_keys
from penstock.core.new_block import NewBlock
from penstock.core.pool.copies import is_copy, original_of
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.write_admission import WriteAdmission
from penstock.pool.api import Done, DoneMany, PoolError, check_write
from penstock.pool.block import Block
from penstock.pool.callbacks import Callbacks, call_done, call_soon
from penstock.pool.local.row_batches import Found
from penstock.pool.local.suspects import Suspects
from penstock.pool.local.table import Table
from penstock.pool.local.write_span import Stored, WriteSpan
from penstock.pool.losses import note_error
from penstock.pool.members.member import Member, forget_rows, is_durable, store_at_once
from penstock.pool.members.work import Work

WRITTEN_AT_ONCE = (
    64  # blocks of one call for which extents are reserved before the lock is released once for other threads
)


class Writes:
    """The writes of one pool, whose lock guards the table and what is counted here.

    `members` is the pool's own list, which changes as members come and go. `unready` brings the members' states up to
    date, and returns the error when the pool is closed; it is called with the lock held.
    """

    def __init__(
        self,
        lock: threading.Lock,
        table: Table,
        members: Sequence[Member],
        suspects: Suspects,
        callbacks: Callbacks,
        policy: PoolPolicy,
        unready: Callable[[], PoolError | None],
    ) -> None:
        self._lock, self._table, self._members = lock, table, members
        self._suspects, self._callbacks, self._unready = suspects, callbacks, unready
        self._admission = WriteAdmission(policy.write_admission)
        self._named_tenants_only = policy.named_tenants_only
        self.dropped = self.not_admitted = self.refused = 0

    def set_policy(self, policy: PoolPolicy) -> None:
        """Set write admission, and which tenants may write; the lock is held."""
        if policy.write_admission != self._admission.mode:
            self._admission = WriteAdmission(policy.write_admission)
        self._named_tenants_only = policy.named_tenants_only

    def note_lookup(self, keys: bytes, found: Found) -> None:
        """Note those of the blocks looked up (16 bytes each) that are absent, where write admission asks for it. Takes
        the lock."""
        if self._admission.mode == "all":
            return
        with self._lock:
            for key, size in zip(split_keys(keys), found.sizes.tolist(), strict=True):
                if not size:
                    self._admission.asked(key)

    def begin(self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany) -> None:
        """Store blocks; they become present together, once all are stored. `done` is called once, not on this thread,
        with the error of each: None when it can be read back, durably on a device member. Takes the lock."""
        if not blocks:
            call_soon(self._callbacks, lambda _: done([]), None)
            return
        deadline_s = time.monotonic() + timeout_s
        ended_here = partial(self._span_ended, done, threading.get_ident())
        span = WriteSpan(len(blocks), ended_here, partial(self._stored_many, deadline_s))
        for at in range(0, len(blocks), WRITTEN_AT_ONCE):
            some = range(at, min(at + WRITTEN_AT_ONCE, len(blocks)))
            reserved, ended = self._reserve_many(span, some, blocks, datas, deadline_s)
            self._begin_stores(span, reserved, datas, deadline_s)
            for number, error in ended:
                with self._lock:
                    self.dropped += 1
                if error.reason != "dropped":
                    note_error("store", "the pool", error)
                call_soon(self._callbacks, span.end_of(number), error)
        span.begun()

    def _begin_stores(
        self, span: WriteSpan, reserved: list[tuple[int, Block]], datas: Sequence[memoryview], deadline_s: float
    ) -> None:
        """Store blocks that have their extents: small ones in memory now, others on their members' threads."""
        by_member: dict[int, list[tuple[int, Block]]] = {}
        for one in reserved:
            by_member.setdefault(one[1].member, []).append(one)
        for number_of_member, some in by_member.items():
            member = self._members[number_of_member]
            errors = None
            if deadline_s > time.monotonic():
                errors = store_at_once(member, [(block, datas[number]) for number, block in some])
            if errors is not None:
                span.stored([(*one, error) for one, error in zip(some, errors, strict=True)])
                continue
            for number, block in some:
                store = Work("store", block, datas[number], deadline_s, span.finish_of(number), after=member.barrier)
                error = member.put(store)
                if error is not None:
                    store.finish(store, error)

    def _span_ended(self, done: DoneMany, caller: int, errors: list[PoolError | None]) -> None:
        """Call `done`, never on the thread that asked for the writes."""
        if threading.get_ident() == caller:
            call_soon(self._callbacks, lambda _: done(errors), None)
        else:
            done(errors)

    def _reserve_many(
        self,
        span: WriteSpan,
        some: range,
        blocks: Sequence[NewBlock],
        datas: Sequence[memoryview],
        deadline_s: float,
    ) -> tuple[list[tuple[int, Block]], list[tuple[int, PoolError]]]:
        """Reserve extents for some blocks of a span; returns them by number, and the errors of those that are not
        stored. The rest is present already: the span hears when it is durable. Takes the lock."""
        todo: dict[frozenset[int], list[int]] = {}
        reserved: list[tuple[int, Block]] = []
        ended: list[tuple[int, PoolError]] = []
        with self._lock:
            asked: set[BlockKey] = set()
            refusing = self._refusing()
            every_new = not self._named_tenants_only and self._admission.mode == "all"
            for number in some:
                new = blocks[number]
                refused: dict[int, str] | PoolError | None = check_write(new, datas[number])
                if refused is None and new.key in asked:
                    refused = PoolError("dropped", f"block {new.key.hex()} is being written already")
                if refused is None and every_new and not self._table.knows(new.key):
                    refused = refusing
                elif refused is None:
                    refused = self._needs_room(new, span.end_of(number), deadline_s)
                if isinstance(refused, dict):
                    asked.add(new.key)
                    todo.setdefault(frozenset(refused), []).append(number)
                elif refused is not None:
                    ended.append((number, refused))
            for without, numbers in todo.items():
                found, gone = self._table.reserve_many([blocks[number] for number in numbers], without)
                forget_rows(self._members, gone)
                for number, block in zip(numbers, found, strict=True):
                    if block is None:
                        ended.append((number, _no_room(blocks[number])))
                    else:
                        reserved.append((number, block))
        return reserved, ended

    def _needs_room(self, new: NewBlock, done: Done, deadline_s: float) -> dict[int, str] | PoolError | None:
        """The members that may not take a new block, and why; or the error. None when the block is present already:
        `done` is then called once it is durable. The lock is held."""
        refusing = self._refusing()
        if isinstance(refusing, PoolError) and refusing.reason == "closed":
            return refusing
        present = self._table.find(new.key)
        if present is not None and (self._table.being_moved(new.key) or not self._gives_way(present, new)):
            member = self._members[present.member]
            self._table.touch(present)
            if present.size_bytes != new.size_bytes:
                return PoolError("layout", f"block {new.key.hex()} exists with {present.size_bytes} bytes")
            if not (is_durable(member) and member.confirm(present, done, deadline_s)):
                call_soon(self._callbacks, done, None)
            return None
        if self._named_tenants_only and not self._table.quotas.has_name(original_of(new.tenant)):
            self.refused += 1
            return PoolError("dropped", "only tenants that [quota] names may write here")
        if self._table.being_written(new.key):
            return PoolError("dropped", f"block {new.key.hex()} is being written already")
        if isinstance(refusing, PoolError):
            return refusing
        return self._refuse_ssds(new, refusing) or refusing

    def _gives_way(self, present: Block, new: NewBlock) -> bool:
        """Whether a block that is present is written again: a suspect one, or a copy by an original."""
        if is_copy(present.tenant) and not is_copy(new.tenant):
            return True
        return self._suspects.gives_way(present, new)

    def _refusing(self) -> dict[int, str] | PoolError:
        """The members that take no stores now, and why; the error where none does. The lock is held."""
        if (unready := self._unready()) is not None:
            return unready
        refused = {n: why for n, member in enumerate(self._members) if (why := member.refuses_stores)}
        if len(refused) == len(self._members):
            return PoolError("device", "; ".join(dict.fromkeys(refused.values())))
        return refused

    def _refuse_ssds(self, new: NewBlock, refused: dict[int, str]) -> PoolError | None:
        """Apply write admission: add the SSDs to `refused` for a block that they should not store; the lock is held."""
        if is_copy(new.tenant) or self._admission.admits(new.key):
            return None
        ssds = {n: "the block is new" for n, m in enumerate(self._members) if m.kind != "memory" and n not in refused}
        turn = next((n for n in self._table.placement.order(new.position) if n not in refused), None)
        self.not_admitted += turn in ssds
        refused.update(ssds)
        if len(refused) < len(self._members):
            return None
        return PoolError("dropped", f"block {new.key.hex()} is seen for the first time; SSDs take reused ones only")

    def _stored_many(self, deadline_s: float, span: WriteSpan, stored: Stored) -> None:
        """All stores of a span ended, on a member's thread: each block ends once it is durable. Takes the lock."""
        ends: list[tuple[int, Block, PoolError | None]] = []
        with self._lock:
            for number, block, error in stored:
                if error is not None:
                    self._table.abandon(block)
                    self.dropped += 1
                    ends.append((number, block, error))
            kept = [(number, block) for number, block, error in stored if error is None]
            replaced = self._table.commit_many([block for _, block in kept])
            forget_rows(self._members, [(old.member, old.key) for old in replaced])
            for number, block in kept:
                member, end = self._members[block.member], span.end_of(number)
                if is_durable(member):
                    member.record(block, self._table.value(block.key), partial(self._recorded, end), deadline_s)
                else:
                    ends.append((number, block, None))
        for _, block, error in ends:
            note_error("store", self._members[block.member].name, error)
        if ends:
            span.end([number for number, _, _ in ends], [error for _, _, error in ends])

    def _recorded(self, done: Done, error: PoolError | None) -> None:
        """A row was committed, or not in time. Takes the lock."""
        if error is not None:
            with self._lock:
                self.dropped += 1
            note_error("store", "the pool", error)
        call_done(done, error)


def _no_room(new: NewBlock) -> PoolError:
    detail = (
        f"no member has room for {new.size_bytes} bytes: the rest is in use, or held by tenants within their quotas"
    )
    return PoolError("full", detail)
