"""A chat of several turns against `penstock serve`: cached tokens and time to the first word of each turn.

penstock serve MODEL & python examples/agent_session.py http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import sys
import time

import httpx

QUESTIONS = ("What is a penstock?", "And a turbine?", "Which of the two waits for the other?")


def ask(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> tuple[str, float, int, int]:
    """The answer, seconds to its first token, prompt tokens, and how many of those were cached."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "session_id": "example",
    }
    start_s, first_s, text = time.monotonic(), 0.0, ""
    usage: dict[str, object] = {}
    with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-slo-ttft-ms": "2000"}) as response:
        if response.status_code != 200:
            raise SystemExit(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line[5:])
            for choice in chunk["choices"]:
                first_s = first_s or time.monotonic() - start_s
                text += choice["delta"].get("content") or ""
            usage = chunk.get("usage") or usage
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return text, first_s, int(str(usage["prompt_tokens"])), int(cached)


def main(url: str) -> None:
    with httpx.Client(base_url=url, timeout=120.0) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        messages = [{"role": "system", "content": "You answer in one sentence. " * 40}]
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            answer, first_s, prompt_tokens, cached_tokens = ask(client, model, messages)
            messages.append({"role": "assistant", "content": answer})
            print(f"{prompt_tokens} prompt tokens, {cached_tokens} cached, first token after {first_s * 1000:.0f} ms")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
