"""The router's live page: current hosts, engines, links, queues and requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.server.errors import json_response
from penstock.server.live import live_page, page_response

if TYPE_CHECKING:
    from penstock.cluster.router.fronts.placer import Placer
    from penstock.cluster.router.router import ClusterEngine, RequestRouter

REQUESTS_SHOWN = 64
LINKS_SHOWN = 64


def ui_routes(engine: ClusterEngine, model: str) -> Sequence[Route]:
    """The routes of `/ui` and of its data."""
    return page_routes(lambda: engine.ask(lambda: live_record(engine, model)))


def page_routes(record: Callable[[], dict[str, Any]]) -> Sequence[Route]:
    """The routes of `/ui` and of its data, which `record` returns; it may block, and raise TimeoutError."""

    async def page(request: Request) -> Response:
        return page_response(live_page("penstock.cluster.router", "ui.html"))

    async def data(request: Request) -> Response:
        try:
            return json_response(await run_in_threadpool(record))
        except TimeoutError as error:
            return json_response({"error": str(error)}, 503)

    return Route("/ui", page), Route("/ui/data", data)


def live_record(engine: ClusterEngine, model: str) -> dict[str, Any]:
    """The data of the page; on the router's thread."""
    return engines_record(engine, model) | {
        "counters": dict(engine.counters) | engine.scheduler.counts, **requests_record(engine)
    }  # fmt: skip


def engines_record(engine: ClusterEngine | Placer, model: str) -> dict[str, Any]:
    """What the page shows of engines, and of the router as a whole."""
    now = time.monotonic()
    healthy, why = engine.healthy()
    engines = [_engine(one, now) for one in engine.port.engines.values()]
    return {
        "model": model,
        "healthy": healthy,
        "reason": why,
        "uptime_s": now - engine.start_s,
        "read": engine.settings.scheduler.read,
        "hosts": _hosts(engine, engines),
        "links": _links(engine),
    }


def requests_record(engine: RequestRouter) -> dict[str, Any]:
    """What the page shows of requests."""
    now = time.monotonic()
    return {
        "requests": [_request(one, now) for one in list(engine.requests.values())[:REQUESTS_SHOWN]],
        "open": len(engine.requests),
        "queues": _queues(engine),
        "recent": [
            {"spans": report.spans, "ttft_s": report.ttft_s, "prompt_tokens": report.prompt_tokens}
            for report in list(engine.recent)[-REQUESTS_SHOWN:]
        ],
    }


def _engine(one: Any, now: float) -> dict[str, Any]:
    card, report = one.card, one.report
    return {
        "name": card.name,
        "role": card.role,
        "host": card.host,
        "epoch": str(one.epoch),
        "peer": one.peer,
        "pid": card.pid,
        "heard_s": now - one.heard_s if one.heard_s else None,
        "report": {name: getattr(report, name) for name in report.__struct_fields__ if name != "links"},
    }


def _hosts(engine: ClusterEngine | Placer, engines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each host with its storage link; its load is the waiting bytes divided by the bytes per second."""
    nodes = engine.scheduler.groups.nodes
    hosts = []
    for name in sorted({one["host"] for one in engines}):
        node = nodes.get(name)
        here = [one for one in engines if one["host"] == name]
        link: dict[str, Any] | None = None
        if node is not None:
            link = {"tokens_per_s": node.tokens_per_s, "backlog_tokens": node.read_tokens, "up": node.nic_up}
            link["backlog_s"] = node.read_tokens / node.tokens_per_s
            reports = [one["report"] for one in here]
            link["load_bytes_per_s"] = sum(report["storage_load_bytes_per_s"] for report in reports)
            measured = max(report["storage_bytes_per_s"] for report in reports)
            link["bytes_per_s"] = measured or None
        hosts.append({"name": name, "storage": link, "engines": here})
    return hosts


def _links(engine: ClusterEngine | Placer) -> list[dict[str, Any]]:
    """Compute links, one entry per direction, the largest backlog first. A relay that is not registered is shown by its
    address."""
    decodes = {one.card.relay_address: one.name for one in engine.port.engines.values()}
    found: list[dict[str, Any]] = []
    for one in engine.port.engines.values():
        for link in one.report.links:
            ends = [decodes.get(link.relay, link.relay), one.name]
            if link.direction == "hand-off":
                ends.reverse()
            speed = link.bytes_per_s or None
            found.append(
                {
                    "from": ends[0],
                    "to": ends[1],
                    "what": link.direction,
                    "load_bytes_per_s": link.load_bytes_per_s,
                    "bytes_per_s": speed,
                    "backlog_bytes": link.backlog_bytes,
                    "backlog_s": link.backlog_bytes / speed if speed else None,
                }
            )
    found.sort(key=lambda link: (-link["backlog_bytes"], -link["load_bytes_per_s"], link["from"], link["to"]))
    return found[:LINKS_SHOWN]


def _queues(engine: RequestRouter) -> dict[str, int]:
    """Requests by stage."""
    queues = {"wait_router": 0, "prefill": 0, "hand-off": 0, "decode": 0}
    for routed in engine.requests.values():
        queues[stage_of(routed)] += 1
    return queues


def stage_of(routed: Any) -> str:
    """The stage of a request, as named on the live page."""
    parts = set(routed.answer.parts.values())
    if not parts:
        return "wait_router"
    if routed.first_token_s is None or (not routed.answer.tokens and "prefill" in parts):
        return "prefill"
    if parts == {"decode"} and len(routed.answer.tokens) <= 1:
        return "hand-off"
    return "decode"


def _request(routed: Any, now: float) -> dict[str, Any]:
    stage = stage_of(routed)
    return {
        "id": routed.id,
        "stage": stage,
        "waiting": routed.waiting if stage == "wait_router" else "",
        "engines": dict(routed.answer.parts),
        "read": routed.read,
        "prompt_tokens": len(routed.request.prompt_tokens),
        "tokens": len(routed.answer.tokens),
        "attempt": routed.answer.attempts,
        "age_s": now - routed.arrival_s,
        "spans": routed.spans(now),
    }
