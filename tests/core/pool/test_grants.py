"""Grants of space for one-sided writes: limits, ends, and a quarantine for what ended without its client."""

from __future__ import annotations

import random

import pytest

from penstock.core.pool.grants import GRANT_FIRST, GrantTable

QUARANTINE_S = 10.0


def table() -> GrantTable:
    return GrantTable(100, 5, QUARANTINE_S)


def test_a_grant_is_committed_once_by_its_client_in_its_time() -> None:
    grants = table()
    number = grants.grant("a", 60, 5.0)
    assert number >= GRANT_FIRST and not grants.commit("b", number, 1.0)
    assert not grants.commit("a", number, 5.0), "its time is over"
    assert grants.commit("a", number, 4.9) and not grants.commit("a", number, 4.9)
    assert grants.give_back("a", [number]) == [] and grants.run_out(1e9) == [], "it is being stored"
    grants.stored(number)
    assert len(grants) == 0
    grants.check_integrity()


def test_limits_count_what_is_open_and_what_is_stored_but_not_what_is_in_quarantine() -> None:
    grants = table()
    assert grants.may_grant("a", 100) and not grants.may_grant("a", 101)
    first = grants.grant("a", 60, 5.0)
    assert not grants.may_grant("a", 41) and grants.may_grant("a", 40) and grants.may_grant("b", 100)
    assert grants.commit("a", first, 0.0) and not grants.may_grant("a", 41)
    grants.leave("a", 0.0)
    assert grants.count("storing") == 1, "what was committed is stored all the same"
    grants.stored(first)
    second = grants.grant("a", 60, 5.0)
    grants.leave("a", 1.0)
    assert grants.may_grant("a", 100) and not grants.commit("a", second, 1.0)
    for _ in range(4):
        grants.grant("b", 1, 99.0)
    assert not grants.may_grant("b", 1), "as many grants as there may be"
    grants.check_integrity()


@pytest.mark.parametrize("how", ["leaves", "runs out"])
def test_space_is_free_after_the_quarantine_or_when_its_client_says_so(how: str) -> None:
    grants = table()
    one, two = grants.grant("a", 10, 5.0), grants.grant("a", 10, 5.0)
    if how == "leaves":
        grants.leave("a", 5.0)
    assert grants.run_out(5.0) == [] and grants.count("quarantine") == 2
    assert grants.give_back("b", [one]) == [] and grants.give_back("a", [one, one]) == [one]
    assert grants.run_out(14.9) == [] and grants.run_out(15.0) == [two] and grants.run_out(99.0) == []
    assert len(grants) == 0


def test_a_client_that_can_write_nothing_any_more_needs_no_quarantine() -> None:
    grants = table()
    over, open_, stored = [grants.grant("a", 10, until_s) for until_s in (1.0, 9.0, 9.0)]
    others = grants.grant("b", 10, 1.0)
    assert grants.commit("a", stored, 0.0)
    assert grants.run_out(2.0) == [] and grants.count("quarantine") == 2
    assert grants.leave("a", 2.0, writes_ended=True) == [over, open_]
    assert grants.leave("b", 2.0) == [] and grants.count("quarantine") == 1, "that of another one"
    grants.stored(stored)
    assert grants.give_back("b", [others]) == [others] and len(grants) == 0
    grants.check_integrity()


def test_random_histories_against_a_model() -> None:
    for seed in range(300):
        generator, now_s = random.Random(seed), 0.0
        grants, model = table(), dict[int, tuple[str, int, float, str]]()
        for _ in range(60):
            now_s += generator.choice([0.0, 0.5, 3.0])
            client = generator.choice("abc")
            free = grants.run_out(now_s)
            for number, (whose, size, until_s, state) in list(model.items()):
                if state == "open" and until_s <= now_s:
                    model[number] = whose, size, until_s + QUARANTINE_S, "quarantine"
            due = [number for number, one in model.items() if one[3] == "quarantine" and one[2] <= now_s]
            assert sorted(free) == sorted(due)
            for number in due:
                del model[number]
            number = generator.choice([*model, 0])
            match generator.choice(["grant", "grant", "commit", "stored", "give back", "leave", "ends"]):
                case "grant":
                    size, until_s = generator.randint(1, 60), now_s + generator.choice([1.0, 4.0])
                    held = sum(one[1] for one in model.values() if one[0] == client and one[3] != "quarantine")
                    assert grants.may_grant(client, size) == (held + size <= 100 and len(model) < 5)
                    if grants.may_grant(client, size):
                        model[grants.grant(client, size, until_s)] = client, size, until_s, "open"
                case "commit":
                    mine = number in model and model[number][0] == client and model[number][3] == "open"
                    assert grants.commit(client, number, now_s) == mine
                    if mine:
                        model[number] = *model[number][:3], "storing"
                case "stored" if number in model and model[number][3] == "storing":
                    grants.stored(number)
                    del model[number]
                case "give back":
                    back = number in model and model[number][0] == client and model[number][3] != "storing"
                    assert grants.give_back(client, [number]) == ([number] if back else [])
                    if back:
                        del model[number]
                case "ends":
                    over = [one for one, (whose, *_, state) in model.items() if whose == client and state != "storing"]
                    assert grants.leave(client, now_s, writes_ended=True) == over
                    for one in over:
                        del model[one]
                case "leave":
                    assert grants.leave(client, now_s) == []
                    for one, (whose, size, _, state) in list(model.items()):
                        if whose == client and state == "open":
                            model[one] = whose, size, now_s + QUARANTINE_S, "quarantine"
            assert len(grants) == len(model)
            grants.check_integrity()
