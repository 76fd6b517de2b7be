"""Readers of recorded request streams: agent sessions (a folder of JSON files) and Mooncake traces (JSON lines).

The files hold no text. Tokens come from the hash ids, so that equal ids (in a session, or in a whole Mooncake trace)
are equal tokens; every 64 (or 512) recorded tokens become 64 / `token_divisor` sent ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.workloads.generators import Prompt, Segment, Session, Turn, Workload

MOONCAKE_BLOCK_TOKENS = 512
FILE_BYTES_MAX = 256 * 1024 * 1024
REQUESTS_MAX = 1_000_000
_JSON_NAMES = {dict: "an object", list: "a list", int: "a whole number", float: "a number", str: "a string"}


class TraceError(ValueError):
    """A trace cannot be read; the message names the file, the line or field, what was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a trace is scaled to a load that fits a machine.

    `token_divisor` divides prompt and answer lengths, `time_divisor` divides time stamps and think times, `think_s_max`
    caps think times (after division). A session ends before its first prompt that does not fit `context_tokens_max`
    (after division, including the answer); `requests_max` selects one request per session in rotation, so that all
    sessions remain in the load.
    """

    token_divisor: int = 1
    time_divisor: float = 1.0
    think_s_max: float = 5.0
    sessions_max: int | None = None
    turns_max: int | None = None
    requests_max: int | None = None
    context_tokens_max: int | None = None
    answer_tokens_max: int | None = None

    def __post_init__(self) -> None:
        for name in ("token_divisor", "sessions_max", "turns_max", "requests_max", "context_tokens_max"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not self.time_divisor > 0:
            raise ValueError(f"time_divisor is {self.time_divisor}; it must be above 0")
        if self.think_s_max < 0:
            raise ValueError(f"think_s_max is {self.think_s_max}; it must be at least 0")

    def answer_tokens(self, recorded: int) -> int:
        """Answer length to request: at least one token."""
        scaled = max(1, recorded // self.token_divisor)
        return scaled if self.answer_tokens_max is None else min(scaled, self.answer_tokens_max)

    def fits(self, turn: Turn) -> bool:
        """Whether prompt and answer fit the context."""
        return self.context_tokens_max is None or turn.prompt_tokens + turn.max_tokens <= self.context_tokens_max


def read_trace(path: Path, scaling: Scaling) -> Workload:
    """Read either format: a folder or a `.json` file of agent sessions, a `.jsonl` file of Mooncake requests."""
    if not path.exists():
        raise TraceError(f"{path}: no such file or folder")
    if path.is_dir() or path.suffix == ".json":
        return read_agent_sessions(path, scaling)
    if path.suffix == ".jsonl":
        return read_mooncake(path, scaling)
    raise TraceError(f"{path}: a trace is a folder of .json files, one .json file or one .jsonl file")


def read_agent_sessions(path: Path, scaling: Scaling) -> Workload:
    """Closed-loop sessions, one JSON file each, in the order of their names (all start at once)."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path}: holds no .json file")
    sessions: list[Session] = []
    for file in files:
        if scaling.sessions_max is not None and len(sessions) >= scaling.sessions_max:
            break
        session = _read_session(file, scaling)
        if session.turns:
            sessions.append(session)
    if not sessions:
        raise TraceError(f"{path}: no session has a request that fits context_tokens_max={scaling.context_tokens_max}")
    return Workload(path.stem, tuple(_share_requests(sessions, scaling.requests_max)))


def _share_requests(sessions: list[Session], requests_max: int | None) -> list[Session]:
    """At most `requests_max` requests: one more turn of every session in rotation, until the number is reached."""
    if requests_max is None:
        return sessions
    kept = [0] * len(sessions)
    left = requests_max
    while left and any(kept[i] < len(s.turns) for i, s in enumerate(sessions)):
        for i, session in enumerate(sessions):
            if left and kept[i] < len(session.turns):
                kept[i] += 1
                left -= 1
    return [Session(s.name, s.turns[:n], s.start_s, s.tenant) for s, n in zip(sessions, kept, strict=True) if n]


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > FILE_BYTES_MAX:
        raise TraceError(f"{path}: {size} bytes; at most {FILE_BYTES_MAX} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 at byte {error.start}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise TraceError(f"{where}: JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected an object, found {type(record).__name__}")
    return record


class _Fields:
    """Checked access to the fields of one record; errors name the place."""

    def __init__(self, record: object, where: str) -> None:
        if not isinstance(record, dict):
            raise TraceError(f"{where}: expected an object, found {type(record).__name__}")
        self._record = record
        self.where = where

    def has(self, name: str) -> bool:
        return self._record.get(name) is not None

    def _get(self, name: str, kind: type) -> Any:
        if name not in self._record:
            raise TraceError(f"{self.where}: field {name!r} is missing")
        value = self._record[name]
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise TraceError(f"{self.where}: field {name!r} is {value!r:.60}; it must be {_JSON_NAMES[kind]}")
        return value

    def integer(self, name: str, low: int, high: int = 1 << 30) -> int:
        value: int = self._get(name, int)
        if not low <= value <= high:
            raise TraceError(f"{self.where}: field {name!r} is {value}; allowed are {low} to {high}")
        return value

    def seconds(self, name: str) -> float:
        value = float(self._get(name, float))
        if not 0 <= value < float("inf"):
            raise TraceError(f"{self.where}: field {name!r} is {value}; it must be at least 0 and finite")
        return value

    def text(self, name: str) -> str:
        value: str = self._get(name, str)
        return value

    def records(self, name: str) -> list[Any]:
        value: list[Any] = self._get(name, list)
        if len(value) > REQUESTS_MAX:
            raise TraceError(f"{self.where}: field {name!r} has {len(value)} entries; at most {REQUESTS_MAX} are read")
        return value

    def hash_ids(self) -> list[int]:
        ids = self.records("hash_ids")
        for i, value in enumerate(ids):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise TraceError(f"{self.where}: hash_ids[{i}] is {value!r:.60}; it must be a whole number from 0")
        return ids


def _flat_requests(entries: list[Any], where: str, depth: int = 0) -> Iterator[_Fields]:
    """Requests of a session in recorded order; a subagent's requests are placed where it was called (the caller waits
    for it), and share the session's hash ids."""
    if depth > 4:
        raise TraceError(f"{where}: subagents are nested more than 4 deep")
    for i, entry in enumerate(entries):
        fields = _Fields(entry, f"{where}: requests[{i}]")
        if fields.has("type") and fields.text("type") == "subagent":
            yield from _flat_requests(fields.records("requests"), fields.where, depth + 1)
        else:
            yield fields


def _read_session(file: Path, scaling: Scaling) -> Session:
    fields = _Fields(_parse(_read_text(file), str(file)), str(file))
    block = fields.integer("block_size", 1, 65_536)
    tools = fields.integer("tool_tokens", 0)
    system = fields.integer("system_tokens", 0)
    sent_block = block // scaling.token_divisor
    if sent_block < 1:
        raise TraceError(f"{file}: token_divisor {scaling.token_divisor} is larger than a block of {block} tokens")
    name = file.stem
    shared: dict[int, str] = {}
    known: dict[int, Segment] = {}
    turns: list[Turn] = []
    for request in _flat_requests(fields.records("requests"), str(file)):
        ids = request.hash_ids()
        length = request.integer("in", 1)
        answer = request.integer("out", 0)
        think_s = request.seconds("think_time") if request.has("think_time") else 0.0
        if len(ids) not in (length // block, -(-length // block)):
            raise TraceError(
                f"{request.where}: {len(ids)} hash_ids do not fit {length} tokens in blocks of {block}; "
                f"allowed are {length // block} or {-(-length // block)}"
            )
        if not turns:
            shared = _shared_streams(ids, block, tools, system)
        unique = f"{name}/{len(turns)}"
        prompt = _prompt(ids, length, block, scaling.token_divisor, f"session/{name}", shared, unique, known)
        turn = Turn(
            prompt,
            scaling.answer_tokens(answer),
            think_s=min(think_s / scaling.time_divisor, scaling.think_s_max) if turns else 0.0,
        )
        if not scaling.fits(turn) or len(turns) == scaling.turns_max:
            break
        turns.append(turn)
    return Session(name, tuple(turns))


def _shared_streams(ids: list[int], block: int, tools: int, system: int) -> dict[int, str]:
    """Streams of the leading blocks that sessions share: tools among all sessions whose tools have the same length, the
    system prompt among those where its length is also equal."""
    streams = {}
    for i, hash_id in enumerate(ids[: (tools + system) // block]):
        in_tools = (i + 1) * block <= tools
        streams[hash_id] = f"tools/{tools}/{i}" if in_tools else f"system/{tools}/{system}/{i}"
    return streams


def _prompt(
    ids: list[int],
    length: int,
    block: int,
    divisor: int,
    scope: str,
    shared: dict[int, str],
    unique: str,
    known: dict[int, Segment],
) -> Prompt:
    """Segments of a prompt: one per hash id, and a unique tail for recorded tokens after the last full block. `known`
    are full blocks of earlier prompts with the same scope: a session's turns repeat them."""
    sent_block = block // divisor
    segments = []
    left = max(1, length // divisor)
    for hash_id in ids:
        if left >= sent_block:
            segment = known.get(hash_id)
            if segment is None:
                segment = known[hash_id] = Segment(shared.get(hash_id, f"{scope}/{hash_id}"), sent_block)
            segments.append(segment)
            left -= sent_block
        elif left:
            segments.append(Segment(shared.get(hash_id, f"{scope}/{hash_id}"), left))
            left = 0
    if left:
        segments.append(Segment(f"tail/{unique}", left))
    return tuple(segments)


def read_mooncake(path: Path, scaling: Scaling) -> Workload:
    """An open loop: every request is a session of one turn at its time stamp; hash ids are global."""
    if scaling.token_divisor > MOONCAKE_BLOCK_TOKENS:
        raise TraceError(
            f"{path}: token_divisor {scaling.token_divisor} is larger than a block of {MOONCAKE_BLOCK_TOKENS} tokens"
        )
    sessions: list[Session] = []
    known: dict[int, Segment] = {}
    limit = min(x for x in (scaling.requests_max, scaling.sessions_max, REQUESTS_MAX) if x is not None)
    last_ms = 0
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if len(sessions) >= limit:
            break
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        request = _Fields(_parse(line, where), where)
        stamp_ms = request.integer("timestamp", 0, 1 << 52)
        length, answer = request.integer("input_length", 1), request.integer("output_length", 0)
        ids, block = request.hash_ids(), MOONCAKE_BLOCK_TOKENS
        if stamp_ms < last_ms:
            raise TraceError(f"{where}: field 'timestamp' is {stamp_ms}, before {last_ms} of the line above")
        if len(ids) not in (length // block, -(-length // block)):
            raise TraceError(f"{where}: {len(ids)} hash_ids do not fit {length} tokens in blocks of {block}")
        last_ms = stamp_ms
        prompt = _prompt(ids, length, block, scaling.token_divisor, "mooncake", {}, f"{path.stem}/{number}", known)
        turn = Turn(prompt, scaling.answer_tokens(answer))
        if scaling.fits(turn):
            start_s = stamp_ms / 1000.0 / scaling.time_divisor
            sessions.append(Session(f"{path.stem}-{number}", (turn,), start_s=start_s))
    if not sessions:
        raise TraceError(f"{path}: no request fits context_tokens_max={scaling.context_tokens_max}")
    return Workload(path.stem, tuple(sessions))
