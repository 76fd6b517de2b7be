"""Requests as vLLM takes them: bodies of `/inference/v1/generate`, its sampling parameters, and its salts."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import msgspec

from penstock.core.keys import BlockKey, root_key
from penstock.engine.api import GenerationRequest, InvalidRequest
from penstock.engine.runner import SamplingParams

GENERATE = "/inference/v1/generate"
SALT_CHARACTERS_MAX = 128
EXTENSIONS = ("slo_ttft_ms", "session_id", "return_timing")  # of Penstock's API; vLLM gets what they mean
_SALT = re.compile(rf"[^@/\\\0]{{1,{SALT_CHARACTERS_MAX}}}")


def salt_of(tenant: str) -> str:
    """vLLM's `cache_salt` for a tenant: the same text where vLLM takes it, so that KV is shared with instances that
    get it from their clients; else a digest of it."""
    if not tenant or _SALT.fullmatch(tenant):
        return tenant
    return f"tenant-{hashlib.blake2b(tenant.encode(), digest_size=32, person=b'cache salt').hexdigest()}"


def root_of(fingerprint: bytes, tenant: str) -> BlockKey:
    """Root of the block keys of a tenant's requests, as the connector makes it. Raises UnicodeEncodeError."""
    salt = salt_of(tenant)
    return root_key(fingerprint, msgspec.json.encode([salt, []]).decode() if salt else "")


def sampling_of(sampling: SamplingParams, first_index: int) -> dict[str, Any]:
    """vLLM's sampling parameters for tokens only; `first_index` tokens of the answer are in the prompt already."""
    found: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "ignore_eos": sampling.ignore_eos,
        "detokenize": False,
    }
    if sampling.seed is not None:
        found["seed"] = sampling.seed
    shaping = sampling.shaping
    if shaping is not None:
        found |= {
            "presence_penalty": shaping.presence_penalty,
            "frequency_penalty": shaping.frequency_penalty,
            "repetition_penalty": shaping.repetition_penalty,
            "min_p": shaping.min_p,
            "min_tokens": max(0, shaping.min_tokens - first_index),
            "stop_token_ids": list(shaping.stop_token_ids),
        }
        if shaping.logit_bias:
            found["logit_bias"] = {str(token): bias for token, bias in shaping.logit_bias}
    return found


def body_of(request: GenerationRequest, params: dict[str, Any]) -> dict[str, Any]:
    """The body that generates a request's tokens as a stream, with these `kv_transfer_params`."""
    body: dict[str, Any] = {
        "request_id": request.request_id,
        "token_ids": request.prompt_tokens,
        "sampling_params": sampling_of(request.sampling, request.first_index),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | _common(request, params)


def api_body_of(request: GenerationRequest, params: dict[str, Any]) -> dict[str, Any]:
    """The body of a request that vLLM's own API answers. Raises InvalidRequest for one that is no JSON object."""
    assert request.api is not None
    try:
        body = json.loads(request.api.body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not a JSON object")
    ours = ("kv_transfer_params", "cache_salt", "model", "request_id", *EXTENSIONS)
    return {name: value for name, value in body.items() if name not in ours} | _common(request, params)


def _common(request: GenerationRequest, params: dict[str, Any]) -> dict[str, Any]:
    """Hand-off, deadline and tenant."""
    found: dict[str, Any] = {}
    if request.slo_ttft_s is not None:
        left_s = max(1e-3, request.slo_ttft_s - request.waited_s)
        params = {**params, "slo_ttft_ms": left_s * 1e3}
    if params:
        found["kv_transfer_params"] = params
    salt = salt_of(request.tenant)
    return found | ({"cache_salt": salt} if salt else {})
