"""Leases: limits, three ways to end, and random histories against a plain list."""

from __future__ import annotations

import random

import pytest

from penstock.core.pool.leases import LeaseTable


def test_a_client_may_lease_up_to_its_limit_and_one_block_in_any_case() -> None:
    table = LeaseTable(10, 100, 50)
    first = table.grant("a", 6, 1.0)
    assert first and table.grant("a", 5, 1.0) is None and table.grant("a", 4, 1.0)
    assert table.grant("b", 60, 1.0), "the only lease of its client"
    assert table.grant("c", 60, 1.0) is None, "all together"
    assert table.held_of("a") == 10 and table.held_bytes == 70
    table.check_integrity()


def test_there_are_no_more_leases_than_allowed() -> None:
    table = LeaseTable(100, 100, 2)
    assert table.grant("a", 1, 1.0) and table.grant("a", 1, 1.0) and table.grant("a", 1, 1.0) is None


def test_a_lease_ends_once_and_only_by_its_client_its_time_or_with_its_client() -> None:
    table = LeaseTable(100, 100, 50)
    leases = [table.grant("a", 1, until_s) for until_s in (3.0, 1.0, 2.0)]
    own = [lease for lease in leases if lease is not None]
    assert len(own) == 3 and table.next_s == 1.0
    assert table.give_back("b", own) == [] and table.give_back("a", [own[0], 99]) == [own[0]]
    assert table.run_out(0.9) == [] and table.run_out(1.0) == [own[1]] and table.next_s == 2.0
    assert table.leave("a") == [own[2]] and table.leave("a") == [] and table.next_s is None
    assert table.give_back("a", own) == [] and table.run_out(9.0) == [] and table.held_bytes == 0
    table.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_agree_with_a_list(seed: int) -> None:
    generator = random.Random(seed)
    table = LeaseTable(40, 100, 12)
    model: dict[int, tuple[str, int, float]] = {}
    now_s = 0.0
    for _ in range(400):
        client = generator.choice("abcd")
        match generator.randrange(5):
            case 0 | 1:
                size, until_s = generator.randint(1, 30), now_s + generator.uniform(0, 5)
                held = sum(one[1] for one in model.values() if one[0] == client)
                fits = len(model) < 12 and sum(one[1] for one in model.values()) + size <= 100
                fits = fits and (not held or held + size <= 40)
                lease = table.grant(client, size, until_s)
                assert (lease is not None) == fits and lease not in model
                if lease is not None:
                    model[lease] = client, size, until_s
            case 2:
                some = generator.sample(range(1, 60), 8)
                mine = {lease for lease in some if lease in model and model[lease][0] == client}
                assert set(table.give_back(client, some)) == mine
                model = {lease: one for lease, one in model.items() if lease not in mine}
            case 3:
                now_s += generator.uniform(0, 2)
                late = {lease for lease, one in model.items() if one[2] <= now_s}
                assert set(table.run_out(now_s)) == late
                model = {lease: one for lease, one in model.items() if lease not in late}
            case 4:
                gone = {lease for lease, one in model.items() if one[0] == client} if generator.random() < 0.3 else None
                if gone is not None:
                    assert set(table.leave(client)) == gone
                    model = {lease: one for lease, one in model.items() if lease not in gone}
        assert len(table) == len(model) and table.next_s == min((one[2] for one in model.values()), default=None)
        table.check_integrity()
