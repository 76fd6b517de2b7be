"""The bodies of `/v1/completions` and `/v1/chat/completions`: typed records, and checks beyond types."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from penstock.core.tenants import tenant_and_salt
from penstock.engine.runner import SamplingParams
from penstock.engine.shaping import Shaping
from penstock.server.errors import bad_request, not_here, wrong_value
from penstock.server.sampling_fields import SamplingFields, chat_logprobs, completion_logprobs, shaping_of
from penstock.server.settings import ServerSettings

SLO_MS_MAX = 1e9
NAME_CHARACTERS_MAX = 512
SLO_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")  # the first one that a request has counts
SESSION_HEADERS = ("x-session-id", "x-claude-code-session-id", "x-session-affinity", "session-id")


class StreamOptions(msgspec.Struct):
    """`stream_options` of a request."""

    include_usage: bool | None = None


class _Unsupported(SamplingFields, kw_only=True):
    """Fields that would change the output and are not implemented: refused unless their value has no effect."""

    prompt_logprobs: Any = None
    length_penalty: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    suffix: Any = None
    bad_words: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    add_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


_UNSUPPORTED = [name for name in _Unsupported.__struct_fields__ if name not in SamplingFields.__struct_fields__]

_MORE = [name for name in _UNSUPPORTED if name != "best_of"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


_CALLS = '; calls in the history (tool_calls, and messages of role "tool") are taken'
_HINTS = {"tools": _CALLS, "tool_choice": _CALLS, "functions": _CALLS, "function_call": _CALLS}


class GenerationBody(_Unsupported, kw_only=True):
    """Fields of both endpoints: OpenAI's, then the extensions."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = None
    ignore_eos: bool | None = None
    slo_ttft_ms: float | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    return_timing: bool | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """The body of `/v1/completions`. `prompt` is a text, texts, token ids, or lists of token ids."""

    prompt: str | list[Any]
    echo: bool | None = None


class ContentPart(msgspec.Struct):
    """A part of a message's content; only text is supported."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message of a chat, as the template gets it."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for reasoning_content


class ChatBody(GenerationBody, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """A checked request without its prompt. `max_tokens` None: as many as fit into the context."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    ignore_eos: bool
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    slo_ttft_s: float | None
    tenant: str
    session: str | None
    return_timing: bool
    return_token_ids: bool
    shaping: Shaping | None
    logprobs: int | None  # number of alternatives per token; None: no logprobs

    def sampling(self, choice: int, max_tokens: int) -> SamplingParams:
        """Sampling of choice number `choice`; choices of the same seed differ."""
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        return SamplingParams(
            max_tokens, self.temperature, self.top_p, self.top_k, seed, self.ignore_eos, self.shaping, self.logprobs
        )


B = TypeVar("B", bound=msgspec.Struct)


def decode_body(raw: bytes, kind: type[B]) -> B:
    """Parse a request's body. Raises ApiError(400) that names the faulty field."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        if param is None and message.startswith("Object missing required field"):
            param = message.split("`")[1]
        text = f"{param}: {message}" if param else f"the body: {message}"
        raise bad_request(text, param) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None


def check_options(
    body: GenerationBody,
    headers: Mapping[str, str],
    default_max_tokens: int | None,
    limits: ServerSettings,
    tenant: str = "",
    *,
    vocab_size: int,
) -> Options:
    """Check every field except the prompt; headers fill in missing body fields. `tenant` is that of the request's key;
    the client's salt cannot change it. Raises ApiError(400)."""
    _refuse_unsupported(body)
    max_tokens, field = body.max_tokens, "max_tokens"
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        max_tokens, field = body.max_completion_tokens, "max_completion_tokens"
    _check_range(field, max_tokens, 1, 2**31)
    _check_range("temperature", body.temperature, 0, 2)
    _check_range("n", body.n, 1, limits.choices_max)
    _check_range("seed", body.seed, -(2**63), 2**63 - 1)
    _check_range("top_k", body.top_k, -1, 2**31)
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise wrong_value("top_p", body.top_p, "above 0, at most 1")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options is given without stream; allowed: only with stream true", "stream_options")
    if body.return_timing and (body.n or 1) > 1:
        raise wrong_value("n", body.n, "1 together with return_timing")
    session = body.session_id if body.session_id is not None else _first_header(headers, SESSION_HEADERS)[1]
    _check_length("session_id", session)
    _check_length("cache_salt", body.cache_salt)
    if body.return_timing and limits.hide_cached_tokens:
        raise wrong_value("return_timing", True, "false (this server does not reveal what was cached)")
    return Options(
        max_tokens=default_max_tokens if max_tokens is None else max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
        stop=_stop_strings(body.stop, limits),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        slo_ttft_s=_slo_ttft_s(body, headers),
        tenant=tenant_of_body(body, tenant, limits),
        session=session,
        return_timing=bool(body.return_timing),
        return_token_ids=bool(body.return_token_ids),
        shaping=shaping_of(body, vocab_size),
        logprobs=_logprobs(body),
    )


def _logprobs(body: GenerationBody) -> int | None:
    wanted = chat_logprobs(body) if isinstance(body, ChatBody) else completion_logprobs(body)
    if wanted is not None and isinstance(body, CompletionBody) and body.echo:
        raise not_here("logprobs", "leaving it out together with echo")
    return wanted


def wants_more(body: GenerationBody) -> bool:
    """Whether the body asks for what only an API with more fields can answer: log-probabilities, and the fields that
    are refused here."""
    refused = any(
        getattr(body, name) is not None and not _asks_for_nothing(name, getattr(body, name)) for name in _MORE
    )
    parts = [message.content for message in body.messages] if isinstance(body, ChatBody) else []
    media = any(part.type != "text" for content in parts if isinstance(content, list) for part in content)
    return refused or media or body.logprobs not in (None, False) or bool(body.top_logprobs)


def neutral(body: GenerationBody) -> GenerationBody:
    """The body without what `wants_more` looks for in its fields."""
    return msgspec.structs.replace(body, **dict.fromkeys(_MORE), logprobs=None, top_logprobs=None)


def unknown_fields(raw: bytes, kind: type[msgspec.Struct]) -> list[str]:
    """The fields of a body, a JSON object, that its record does not have and that are not null."""
    found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    return [name for name, value in found.items() if name not in known and bytes(value) != b"null"]


def prompts_of(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts of a completion: all texts or all token ids. Raises ApiError(400)."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return prompt
    if kinds == {int}:
        return [prompt]
    if kinds == {list}:
        for index, one in enumerate(prompt):
            if set(map(type, one)) != {int}:
                raise bad_request(f"prompt[{index}] must be a non-empty list of token ids", f"prompt[{index}]")
        return prompt
    raise bad_request(
        "prompt must be a string, or a non-empty list of strings, token ids or lists of token ids", "prompt"
    )


def chat_messages(body: ChatBody) -> list[dict[str, Any]]:
    """The messages in the form that chat templates take, with text parts joined. Raises ApiError(400)."""
    if not body.messages:
        raise bad_request("messages is empty; allowed: at least one message", "messages")
    found = []
    for index, message in enumerate(body.messages):
        plain: dict[str, Any] = msgspec.to_builtins(message)
        if isinstance(message.content, list):
            for at, part in enumerate(message.content):
                if part.type != "text" or part.text is None:
                    raise wrong_value(f"messages[{index}].content[{at}].type", part.type, "text (with a text field)")
            plain["content"] = "".join(part.text or "" for part in message.content)
        plain.setdefault("content", "")
        found.append(plain)
    return found


def template_variables(body: ChatBody, known: Collection[str]) -> dict[str, Any]:
    """The chat template's variables besides the messages, including `reasoning_effort` if the template knows it."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None and "reasoning_effort" in known:
        variables["reasoning_effort"] = body.reasoning_effort
    return variables


def _refuse_unsupported(body: GenerationBody) -> None:
    for name in _UNSUPPORTED:
        value = getattr(body, name)
        if value is None or _asks_for_nothing(name, value) or (name == "best_of" and value == (body.n or 1)):
            continue
        neutral = " or ".join(msgspec.json.encode(one).decode() for one in _NEUTRAL.get(name, ()))
        raise not_here(name, neutral or "leaving it out", _HINTS.get(name, ""))


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether the value is the default. 0 and False differ here: `logprobs: 0` asks for something."""
    neutral = _NEUTRAL.get(name, ())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise wrong_value(name, value, f"{low} to {high}")


def _check_length(name: str, value: str | None) -> None:
    if value is not None and len(value) > NAME_CHARACTERS_MAX:
        raise wrong_value(name, value, f"at most {NAME_CHARACTERS_MAX} characters")


def tenant_of_body(body: GenerationBody, tenant: str, limits: ServerSettings) -> str:
    """The tenant whose KV the request reads and writes (`core.tenants`). Raises ApiError(400)."""
    salt = body.cache_salt or ""
    if limits.require_tenant and not salt and not tenant:
        text = "cache_salt is missing; this server serves tenants only: give cache_salt"
        text += ", or a tenant's API key" if limits.tenant_keys is not None else ""
        raise bad_request(text, "cache_salt", "tenant_required")
    try:
        return tenant_and_salt(tenant, salt)
    except ValueError:
        raise wrong_value("cache_salt", salt, "text without characters of code 0") from None


def _stop_strings(stop: str | list[str] | None, limits: ServerSettings) -> tuple[str, ...]:
    found = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(found) > limits.stop_strings_max:
        raise bad_request(f"stop has {len(found)} strings; allowed: at most {limits.stop_strings_max}", "stop")
    for text in found:
        if not 1 <= len(text) <= limits.stop_characters_max:
            raise wrong_value("stop", text, f"strings of 1 to {limits.stop_characters_max} characters")
    return found


def _first_header(headers: Mapping[str, str], names: Sequence[str]) -> tuple[str, str | None]:
    """The first of these headers that the request has, and its value."""
    return next(((name, headers[name]) for name in names if name in headers), ("", None))


def _slo_ttft_s(body: GenerationBody, headers: Mapping[str, str]) -> float | None:
    name, value = "slo_ttft_ms", body.slo_ttft_ms
    if value is None:
        name, text = _first_header(headers, SLO_HEADERS)
        try:
            value = float(text) if text is not None else None
        except ValueError:
            raise wrong_value(name, text, "a number of milliseconds above 0") from None
    if value is None:
        return None
    if not (math.isfinite(value) and 0 < value < SLO_MS_MAX):
        raise wrong_value(name, value, f"above 0 and below {SLO_MS_MAX:g}")
    return value / 1000
