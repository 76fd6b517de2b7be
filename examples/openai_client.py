"""Sends a request with a deadline to a running `penstock serve` through the official client, and prints what was
cached.

penstock serve MODEL_DIR & then python examples/openai_client.py "Why is the sky blue?" (needs: pip install openai)
"""

from __future__ import annotations

import sys

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
model = client.models.list().data[0].id
answer = client.completions.create(
    model=model,
    prompt=" ".join(sys.argv[1:]) or "Why is the sky blue?",
    max_tokens=32,
    extra_headers={"x-slo-ttft-ms": "500"},
    extra_body={"cache_salt": "my-tenant", "session_id": "my-session", "return_timing": True},
)
print(answer.choices[0].text)
if answer.usage is not None:
    print(answer.usage)
