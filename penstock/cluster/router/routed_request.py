"""One request in the router: its record, the router's settings and limits, and the records that are sent to engines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import msgspec

from penstock.cluster.messages import Part, PlacedRequest, ReadSide, continues
from penstock.cluster.router.engine_registry import RegisteredEngine
from penstock.cluster.router.merged_report import merged_report
from penstock.cluster.router.unclaimed_parts import Asked
from penstock.cluster.settings import RouterTimes
from penstock.cluster.wire_types import NAME_CHARACTERS_MAX, SECONDS_MAX, TENANT_CHARACTERS_MAX
from penstock.core.cluster.answer import Answer
from penstock.core.cluster.decisions import InterEngineConfig, Place
from penstock.core.cluster.seen_prefixes import PrefixKeys
from penstock.core.config import check_range
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import GenerationRequest, InvalidRequest, OnEvent, RequestReport, TokenEvent, tell

MARKS_MAX = 64


@dataclass(frozen=True, slots=True)
class RouterSettings(RouterTimes):
    """`claim_s`: how long unclaimed parts are stored. `vocabulary`: `TextCodec.vocabulary_digest` of the router's
    tokenizer; empty without one. `sidecar`: requests name their prefill engine; a decode engine alone can serve."""

    claim_s: float = 60.0
    vocabulary: str = ""
    max_open: int = 16_384
    sidecar: bool = False
    scheduler: InterEngineConfig = field(default_factory=InterEngineConfig)

    def __post_init__(self) -> None:
        check_range("lease_s", self.lease_s, 0.05, 3600)
        check_range("no_engine_s", self.no_engine_s, 0.05, 1e6)
        check_range("grace_s", self.grace_s, 0, 3600)
        check_range("claim_s", self.claim_s, 0.05, 1e6)
        check_range("max_open", self.max_open, 1, 1 << 20)


@dataclass(eq=False, slots=True)
class RoutedRequest:
    """One request in the router, under a key that the router makes. `clients` wait for its answer, by the id under
    which each submitted it: more than one when the same request arrived again over another connection."""

    id: str
    request: GenerationRequest
    clients: dict[str, OnEvent]
    arrival_s: float
    answer: Answer
    prompt: bytes  # packed (`pack_tokens`)
    asked: Asked | None  # label and digest with which another client gets this answer; None: none can
    scheduler_attempt: int | None = None  # the scheduler core's number of the current placement
    waiting: str = "no engine yet"  # why it is not placed yet
    first_token_s: float | None = None
    data_sent: bool = False  # a piece of an answer by vLLM's own API
    read: str = ""
    hit_tokens: int = 0
    keys: PrefixKeys | None = None  # of its prompt, for `SeenPrefixes`; None: not computed yet
    reports: list[RequestReport] = field(default_factory=list)
    marks: list[tuple[str, float]] = field(default_factory=list)  # (stage, time of its begin)

    @property
    def shared(self) -> bool:
        """Whether a second client with the same request may share this answer: it would get the same tokens if it were
        served separately."""
        sampling = self.request.sampling
        return self.asked is not None and (sampling.temperature == 0 or sampling.seed is not None)

    @property
    def repeatable(self) -> bool:
        """Whether vLLM engines can go on with the answer after a loss: by continuing, or by the same tokens again."""
        sampling = self.request.sampling
        if self.request.api is not None:
            return not self.data_sent
        return not self.answer.tokens or continues(sampling) or sampling.temperature == 0 or sampling.seed is not None

    def tell(self, event: TokenEvent) -> None:
        """Pass an event to every client that waits for this request."""
        for on_event in list(self.clients.values()):
            tell(on_event, event)

    def mark(self, stage: str, now: float) -> None:
        """Record the begin of a stage, unless it is the latest recorded one; at most MARKS_MAX."""
        if len(self.marks) < MARKS_MAX and (not self.marks or self.marks[-1][0] != stage):
            self.marks.append((stage, now))

    def spans(self, now: float) -> list[tuple[str, float, float]]:
        """Stages from arrival until now."""
        ends = [start_s for _, start_s in self.marks[1:]] + [now]
        return [
            (stage, start_s - self.arrival_s, end_s - self.arrival_s)
            for (stage, start_s), end_s in zip(self.marks, ends, strict=True)
        ]

    def report(self, now: float) -> RequestReport:
        """The merged report of all its parts. May raise any exception, as another process made a part's report."""
        return merged_report(
            self.reports,
            prompt_tokens=len(self.request.prompt_tokens),
            generated_tokens=len(self.answer.tokens),
            ttft_s=None if self.first_token_s is None else self.first_token_s - self.arrival_s,
            total_s=now - self.arrival_s,
            slo_ttft_s=self.request.slo_ttft_s,
        )


def fresh_answer(answer: Answer) -> Answer:
    """A new, empty answer for the same request."""
    return Answer(answer.max_tokens, answer.end_tokens, answer.attempt)


def tokens_begun(routed: RoutedRequest, vllm: bool) -> list[int]:
    """The tokens with which the next attempt goes on. What is generated again is not sent again."""
    again = vllm and (routed.request.api is not None or not continues(routed.request.sampling))
    return [] if again else routed.answer.tokens


def has_decode_part(routed: RoutedRequest, vllm: bool) -> bool:
    """Whether anything is left for a decode engine: not where the prefill engine's token is the last one."""
    left = routed.answer.max_tokens - len(tokens_begun(routed, vllm))
    return left > 1 or routed.request.api is not None


def placed_request(
    routed: RoutedRequest, place: Place, attempt: int, decode: RegisteredEngine | None, vllm: bool = False
) -> PlacedRequest:
    """The record for the engines of an attempt. `decode`: the engine that receives the hand-off; None for a single
    engine. `vllm`: the engines are vLLM, whose sampling not always continues that of another. Raises ConfigError."""
    request, answer = routed.request, routed.answer
    sampling, call, begun = request.sampling, request.api, tokens_begun(routed, vllm)
    samples = vllm and (call is not None or not continues(sampling)) and has_decode_part(routed, vllm)
    read: ReadSide = place.read if place.read != "none" else "prefill"
    return PlacedRequest(
        request_id=routed.id,
        epoch=0,
        prompt=routed.prompt + pack_tokens(begun),
        sampling=replace(sampling, max_tokens=answer.max_tokens - len(begun)),
        attempt=attempt,
        first_index=len(begun),
        waited_s=min(time.monotonic() - routed.arrival_s, SECONDS_MAX),
        slo_ttft_s=request.slo_ttft_s,
        tenant=request.tenant,
        session=request.session,
        decode_engine=decode.name if decode is not None else "",
        decode_relay=decode.card.relay_address if decode is not None else "",
        read=read,
        decode_share=place.decode_share if read == "split" else float(read == "decode"),
        recompute_tokens=place.recompute_tokens,
        resume_label=request.resume_label,
        decode_samples=samples and decode is not None,
        api_path=call.path if call is not None else "",
        api_body=call.body if call is not None else b"",
    )


def part_of(placed: PlacedRequest, part: Part, epoch: int) -> PlacedRequest:
    """That engine's part of a request. Only the part that answers gets a body."""
    body = b"" if part == "prefill" else placed.api_body
    path = "" if part == "prefill" else placed.api_path
    return msgspec.structs.replace(placed, part=part, epoch=epoch, api_path=path, api_body=body)


def check_names(request: GenerationRequest) -> None:
    """Refuse names that cannot be sent to engines, before anything is sent. Raises InvalidRequest."""
    for what, name, most in (
        ("tenant (cache_salt)", request.tenant, TENANT_CHARACTERS_MAX),
        ("session", request.session or "", TENANT_CHARACTERS_MAX),
        ("resume_label", request.resume_label, NAME_CHARACTERS_MAX),
    ):
        if len(name) > most:
            raise InvalidRequest(f"{what} has {len(name)} characters; {most} are allowed")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{what} is not valid Unicode text") from None
