"""Random histories of a host engine against the connector's scheduler: a page always has what its key says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES, SchedulerConfig
from penstock.core.connector.records import Landed
from penstock.core.connector.scheduler import ConnectorScheduler
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.keys import block_keys, root_key
from penstock.core.operations import BlockHit, Discard, Drop, Emit, Fetch, Lookup, RequestSpec, Save, Upload

BLOCK = 4
BLOCK_BYTES = 4096
ROUTES = (("memory:0",), ("ssd:0", "net"))
FINGERPRINT = b"0123456789abcdef"


class ConnectorHistories(RuleBasedStateMachine):
    """A host that allocates, schedules, preempts and aborts as it likes, and a driver that completes operations in any
    order or fails them. Slots and pages hold the keys of what was copied into them."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        pages=st.integers(4, 40),
        slots=st.integers(4, 12),
        window=st.integers(1, 4),
        samples=st.booleans(),
    )
    def start(self, policy: Any, pages: int, slots: int, window: int, samples: bool) -> None:
        config = SchedulerConfig(
            block_tokens=BLOCK,
            block_bytes=BLOCK_BYTES,
            l1_pages=pages,
            l2_slots=slots,
            policy=policy,
            fetch_window_blocks=window,
            upload_group_blocks=2,
            max_waiting=6,
            save_queue_blocks=5,
            age_bound_s=5.0,
            default_slo_ttft_s=3.0,
            lookup_timeout_s=1.0,
            recompute=samples,
        )
        self.scheduler = ConnectorScheduler(config, CostModel(LinkCost(1e9), ComputeCost(1e-3, 1e-4, 1e-8)))
        self.now = 0.0
        self.serial = 0
        self.pages = 0
        self.prompts: dict[str, list[int]] = {}  # live requests
        self.spoilt: set[str] = set()  # requests whose load under way is of no use any more
        self.keys: dict[str, list[bytes]] = {}
        self.granted: dict[str, dict[int, int]] = {}  # request -> page by block, until Landed
        self.landed: dict[str, tuple[dict[int, int], int | None]] = {}  # until the host takes note
        self.content: dict[int, bytes] = {}  # of pages
        self.slots: dict[int, bytes] = {}
        self.open: dict[int, Any] = {}
        self.kept: dict[int, bytes] = {}  # pages that the host keeps for saves
        self.pool: dict[bytes, BlockHit] = {}
        if samples:
            for _ in range(10):
                self.scheduler.stepped([(8, 0)], 1e-3)
        self.decide()

    # -- the host -----------------------------------------------------------------------------------------------

    @rule(family=st.integers(0, 2), blocks=st.integers(1, 8), held=st.integers(0, 20), stored=st.integers(0, 9))
    def submit(self, family: int, blocks: int, held: int, stored: int) -> None:
        self.serial += 1
        name = f"r{self.serial}"
        shared = [family * 1000 + i for i in range(blocks * BLOCK)]
        prompt = [*shared, 7000 + self.serial]
        self.prompts[name] = prompt
        self.keys[name] = block_keys(prompt, FINGERPRINT, "", BLOCK)
        for index, key in enumerate(self.keys[name][:stored]):
            self.pool.setdefault(key, BlockHit(BLOCK_BYTES, ROUTES[index % 2]))
        spec = RequestSpec(name, prompt, 1, root_key(FINGERPRINT, ""))
        self.scheduler.submit(spec, min(held, len(prompt) - 1), self.now)
        self.decide()

    def live(self, data: st.DataObject) -> str | None:
        names = sorted(self.prompts)
        return data.draw(st.sampled_from(names)) if names else None

    @rule(data=st.data(), held_blocks=st.integers(0, 3), room=st.booleans())
    def consider(self, data: st.DataObject, held_blocks: int, room: bool) -> None:
        """The host's scan: ask, and if something is offered and there is room, give pages."""
        name = self.live(data)
        if name is None or name in self.granted or name in self.landed:
            return
        held = min(held_blocks * BLOCK, (len(self.prompts[name]) - 1) // BLOCK * BLOCK)
        found = self.scheduler.matched(name, held, self.now)
        assert self.scheduler.matched(name, held, self.now) == found, "asking changed the answer"
        if not found or not room:
            self.decide()
            return
        assert (held + found) % BLOCK == 0 and held + found < len(self.prompts[name])
        first, end = held // BLOCK, (held + found) // BLOCK
        busy = {self.keys[other][index] for other, blocks in self.granted.items() for index in blocks}
        pages = {}
        for index in range(first, end):
            assert self.keys[name][index] not in busy, "GRANT-1: two requests load one block"
            self.pages += 1
            pages[index] = self.pages
        self.granted[name] = pages
        self.scheduler.allocated(name, first, list(pages.values()), self.now)
        self.decide()

    @rule(data=st.data())
    def take_note(self, data: st.DataObject) -> None:
        if self.landed:
            name = data.draw(st.sampled_from(sorted(self.landed)))
            del self.landed[name]
            self.scheduler.acknowledged(name)
            self.decide()

    @rule(data=st.data(), first_token=st.booleans())
    def compute(self, data: st.DataObject, first_token: bool) -> None:
        name = self.live(data)
        if name is None or name in self.granted:
            return
        self.scheduler.started(name, self.now)
        if first_token:
            self.scheduler.prefilled(name, self.now)
            self.scheduler.extend(name, [1, 2, 3])
            self.prompts[name] += [1, 2, 3]
            self.keys[name] = block_keys(self.prompts[name], FINGERPRINT, "", BLOCK)
        self.scheduler.stepped([(5, 0)], 2e-3)
        self.decide()

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = self.live(data)
        if name is None or name in self.granted:
            return
        for index, key in enumerate(self.keys[name]):
            if self.scheduler.wants(name, index):
                self.pages += 1
                self.content[self.pages] = self.kept[self.pages] = key
                self.scheduler.offer(name, index, self.pages)
        self.decide()

    @rule()
    def press(self) -> None:
        self.scheduler.press()
        self.decide()

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = self.live(data)
        if name is not None:
            del self.prompts[name]
            self.scheduler.finish(name, self.now)
            self.decide()

    @rule(anew=st.booleans())
    def forget_all(self, anew: bool) -> None:
        """What the keys name is of no use any more, say because the host has other weights."""
        self.scheduler.forget_all(self.now)
        self.spoilt |= {name for name in self.granted}
        prompts, self.prompts = self.prompts, {}
        self.decide()
        if anew:
            for name, prompt in prompts.items():
                if name not in self.granted and name not in self.landed:
                    self.scheduler.submit(RequestSpec(name, prompt, 1, root_key(FINGERPRINT, "")), 0, self.now)
                    self.prompts[name] = prompt
        self.decide()

    @rule(seconds=st.sampled_from([1e-3, 0.1, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    # -- the driver -----------------------------------------------------------------------------------------------

    @rule(data=st.data(), fails=st.integers(0, 5))
    def complete(self, data: st.DataObject, fails: int) -> None:
        if not self.open:
            return
        self.end_operation(self.open.pop(data.draw(st.sampled_from(sorted(self.open)))), fails == 0)

    def end_operation(self, op: Any, failed: bool) -> None:
        self.now += 1e-4
        if isinstance(op, Lookup):
            self.scheduler.lookup_done(op.op_id, None if failed else [self.pool.get(key) for key in op.keys], self.now)
        elif isinstance(op, Fetch):
            missing = failed or op.key not in self.pool
            if not missing:
                self.slots[op.slot] = op.key
            self.scheduler.fetched(op.op_id, "missing" if missing else None, self.now)
        elif isinstance(op, Upload):
            if failed:
                self.scheduler.upload_failed(op.op_id, "device", self.now)
            else:
                for slot, page in op.blocks:
                    self.content[page] = self.slots[slot]
                self.scheduler.uploaded(op.op_id, self.now)
        elif isinstance(op, Save):
            assert self.content[op.page] == op.block.key and op.page in self.kept, "GRANT-2: a page was reused"
            if not failed:
                self.scheduler.downloaded(op.op_id)
                self.pool[op.block.key] = BlockHit(BLOCK_BYTES, ROUTES[0])
            self.scheduler.saved(op.op_id, "device" if failed else None)
        self.decide()

    def decide(self) -> None:
        for op in self.scheduler.decide(self.now):
            if isinstance(op, Drop):
                continue
            if isinstance(op, Landed):
                self.land(op)
                continue
            if isinstance(op, Upload):
                pages = {page for blocks in self.granted.values() for page in blocks.values()}
                assert all(page in pages for _, page in op.blocks), "GRANT-2: an upload into pages that were given up"
            assert not isinstance(op, Discard | Emit)
            self.open[op.op_id] = op
        for page in self.scheduler.released():
            del self.kept[page]
            del self.content[page]

    def land(self, notice: Landed) -> None:
        pages = self.granted.pop(notice.request_id)  # GRANT-3: exactly once
        if notice.request_id in self.spoilt:
            assert notice.hole == min(pages), "a load of what was forgotten landed as if it were of use"
            self.spoilt.remove(notice.request_id)
        under_way = {page for op in self.open.values() if isinstance(op, Upload) for _, page in op.blocks}
        assert not under_way & set(pages.values()), "GRANT-3: landed while a page is written"
        for index, page in pages.items():
            if notice.request_id in self.prompts and (notice.hole is None or index < notice.hole):
                assert self.content[page] == self.keys[notice.request_id][index], "a page without its block"
        self.landed[notice.request_id] = (pages, notice.hole)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Whatever is under way ends; then nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        for name in list(self.prompts):
            self.scheduler.finish(name, self.now)
        self.prompts.clear()
        self.decide()
        for _ in range(10_000):
            for name in list(self.landed):
                del self.landed[name]
                self.scheduler.acknowledged(name)
            if not self.open:
                break
            op = self.open.pop(next(iter(self.open)))
            if isinstance(op, Lookup):
                self.scheduler.lookup_done(op.op_id, None, self.now)
            elif isinstance(op, Fetch):
                self.scheduler.fetched(op.op_id, "missing", self.now)
            elif isinstance(op, Upload):
                self.scheduler.upload_failed(op.op_id, "device", self.now)
            else:
                self.scheduler.saved(op.op_id, "device")
            self.decide()
        self.scheduler.check_integrity()
        assert self.scheduler.idle and not self.granted and not self.kept, "something is left"


ConnectorHistories.TestCase.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestConnectorHistories(ConnectorHistories.TestCase):  # type: ignore[misc, valid-type]
    pass


if __name__ == "__main__":
    pytest.main([__file__])
