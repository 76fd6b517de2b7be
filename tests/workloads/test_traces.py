"""Trace readers: equal ids are equal tokens, scaling, and an error that says where for every kind of broken input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.workloads.generators import Turn, prompt_tokens
from penstock.workloads.traces import Scaling, TraceError, read_agent_sessions, read_mooncake, read_trace

FULL = Scaling()


def _request(ids: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    return {"t": 0.0, "type": "n", "in": tokens, "out": 40, "hash_ids": ids, "think_time": 1.0} | more


def _session(requests: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": "x", "block_size": 64, "tool_tokens": 100, "system_tokens": 60, "requests": requests} | more


def _write(folder: Path, **sessions: dict[str, Any]) -> Path:
    for name, record in sessions.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def _tokens(turn: Turn) -> list[int]:
    return prompt_tokens(turn.prompt, 2048)


def test_equal_ids_are_equal_tokens_within_a_session_only(tmp_path: Path) -> None:
    requests = [_request([1, 2, 3], 200), _request([1, 2, 3, 4], 256), _request([9, 2], 128)]
    _write(tmp_path, a=_session(requests), b=_session(requests, tool_tokens=0))
    a, b = read_agent_sessions(tmp_path, FULL).sessions
    first, second, third = (_tokens(turn) for turn in a.turns)
    assert [len(first), len(second), len(third)] == [200, 256, 128]
    assert first[:192] == second[:192]
    assert first[192:] != second[192:200]  # the recorded tail has no id, so it is shared with nothing
    assert third[:64] != first[:64] and third[64:] == first[64:128]
    assert _tokens(b.turns[0])[:64] != first[:64]


def test_tools_and_system_prompt_are_shared_across_sessions(tmp_path: Path) -> None:
    requests = [_request([1, 2, 3], 192)]
    other_ids = [_request([7, 8, 9], 192)]
    _write(
        tmp_path,
        a=_session(requests, tool_tokens=64, system_tokens=64),
        b=_session(other_ids, tool_tokens=64, system_tokens=64),
        c=_session(requests, tool_tokens=64, system_tokens=90),
    )
    a, b, c = (_tokens(session.turns[0]) for session in read_agent_sessions(tmp_path, FULL).sessions)
    assert a[:128] == b[:128] and a[128:] != b[128:]
    assert a[:64] == c[:64] and a[64:128] != c[64:128]


def test_requests_of_a_subagent_stand_in_its_place_and_share_ids(tmp_path: Path) -> None:
    nested = {"t": 1.0, "type": "subagent", "agent_id": "s", "requests": [_request([1, 5], 128)]}
    _write(tmp_path, a=_session([_request([1, 2], 128), nested, _request([1, 2, 3], 192)]))
    turns = read_agent_sessions(tmp_path, FULL).sessions[0].turns
    assert [turn.prompt_tokens for turn in turns] == [128, 128, 192]
    assert _tokens(turns[1])[:64] == _tokens(turns[0])[:64]


def test_scaling_divides_lengths_and_caps_times(tmp_path: Path) -> None:
    requests = [_request([1, 2, 3], 200), _request([1, 2, 3, 4, 5], 330, think_time=5000.0)]
    _write(tmp_path, a=_session(requests))
    turns = read_agent_sessions(tmp_path, Scaling(token_divisor=16, time_divisor=10, think_s_max=2.0)).sessions[0].turns
    assert [turn.prompt_tokens for turn in turns] == [12, 20]
    assert [turn.max_tokens for turn in turns] == [2, 2]
    assert [turn.think_s for turn in turns] == [0.0, 2.0]
    assert _tokens(turns[0]) == _tokens(turns[1])[:12]


def test_limits_keep_sessions_and_cut_turns(tmp_path: Path) -> None:
    long = [_request(list(range(1, n + 1)), 64 * n) for n in range(1, 8)]
    _write(tmp_path, a=_session(long), b=_session(long[:2]), c=_session(long))
    by_requests = read_agent_sessions(tmp_path, Scaling(requests_max=8))
    assert [len(s.turns) for s in by_requests.sessions] == [3, 2, 3]
    by_context = read_agent_sessions(tmp_path, Scaling(context_tokens_max=300))
    assert by_context.context_tokens_max <= 300
    assert [len(s.turns) for s in by_context.sessions] == [4, 2, 4]
    assert len(read_agent_sessions(tmp_path, Scaling(sessions_max=1, turns_max=2)).sessions[0].turns) == 2
    assert read_agent_sessions(tmp_path / "b.json", FULL).requests == 2
    with pytest.raises(TraceError, match="no session has a request that fits context_tokens_max=10"):
        read_agent_sessions(tmp_path, Scaling(context_tokens_max=10))


def test_mooncake_ids_are_global_and_times_open_loop(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1000, "output_length": 30, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 700, "output_length": 0, "hash_ids": [0, 2]},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(path, Scaling(token_divisor=4, time_divisor=3)).sessions
    assert (first.start_s, second.start_s) == (0.0, 0.5)
    assert [first.turns[0].prompt_tokens, second.turns[0].prompt_tokens] == [250, 175]
    assert _tokens(first.turns[0])[:128] == _tokens(second.turns[0])[:128]
    assert _tokens(first.turns[0])[128:170] != _tokens(second.turns[0])[128:170]
    assert [first.turns[0].max_tokens, second.turns[0].max_tokens] == [7, 1]
    assert read_mooncake(path, Scaling(requests_max=1)).requests == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"a\.json: not JSON at line 1, column 2"),
        ("[]", r"a\.json: expected an object, found list"),
        (_session([], block_size=0), r"a\.json: field 'block_size' is 0; allowed are 1 to 65536"),
        ({"block_size": 64}, r"a\.json: field 'tool_tokens' is missing"),
        (_session([1]), r"requests\[0\]: expected an object, found int"),  # type: ignore[list-item]
        (_session([_request([1], 200)]), r"requests\[0\]: 1 hash_ids do not fit 200 tokens in blocks of 64; .* 3 or 4"),
        (_session([_request([1, -2], 128)]), r"requests\[0\]: hash_ids\[1\] is -2"),
        (_session([_request([1], "64")]), r"requests\[0\]: field 'in' is '64'; it must be a whole number"),  # type: ignore[arg-type]
        (_session([_request([1], 64, think_time=-1)]), r"requests\[0\]: field 'think_time' is -1"),
        (
            _session([{"type": "subagent", "requests": [_request([1], 64), {"in": 3}]}]),
            r"requests\[0\]: requests\[1\]: field 'hash_ids' is missing",
        ),
    ],
)
def test_broken_sessions_say_where(tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(TraceError, match=message):
        read_agent_sessions(tmp_path, FULL)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", r"line 2: not JSON"),
        ('{"timestamp": 5}', r"line 2: field 'input_length' is missing"),
        (
            '{"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            r"line 2: field 'timestamp' is -1",
        ),
        ('{"timestamp": 9, "input_length": 900, "output_length": 1, "hash_ids": [1, 2, 3, 4]}', r"line 2: 4 hash_ids"),
        ('{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1]}', r"line 2: .* is 1, before 5"),
        ('{"timestamp": 9, "input_length": 9, "output_length": true, "hash_ids": [1]}', r"line 2: .* must be a whole"),
    ],
)
def test_broken_lines_say_where(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"timestamp": 5, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(TraceError, match=message):
        read_mooncake(path, FULL)


def test_paths_that_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "t.csv", "a trace is a folder"),
        (tmp_path, r"holds no \.json file"),
        (tmp_path / "bad.jsonl", "not UTF-8 at byte 0"),
    ):
        with pytest.raises(TraceError, match=message):
            read_trace(path, FULL)


def test_scaling_refuses_nonsense(tmp_path: Path) -> None:
    for wrong in ({"token_divisor": 0}, {"time_divisor": 0.0}, {"think_s_max": -1.0}, {"requests_max": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Scaling(**wrong)
    _write(tmp_path, a=_session([_request([1], 64)]))
    with pytest.raises(TraceError, match="token_divisor 100 is larger than a block of 64 tokens"):
        read_agent_sessions(tmp_path, Scaling(token_divisor=100))
