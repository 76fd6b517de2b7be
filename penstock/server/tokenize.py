"""`/tokenize` and `/detokenize`, as vLLM has them: text or messages to tokens, and tokens to text."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.server.errors import bad_request, not_here, wrong_value
from penstock.server.preparation import RequestPreparation
from penstock.server.schema import ChatBody, Message


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`prompt`, or `messages` as a chat has them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # default: True for a prompt; a chat template adds its own
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    tools: Any = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None


async def tokenize(preparation: RequestPreparation, body: TokenizeBody) -> dict[str, Any]:
    """The answer of `/tokenize`. Raises ApiError."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt and messages: exactly one of them must be given", "prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        tokens = await preparation.text_tokens(body.prompt, special_tokens=special)
    else:
        _check_chat(body)
        chat = ChatBody(messages=body.messages or [], chat_template_kwargs=body.chat_template_kwargs)
        tokens = await preparation.chat_tokens(chat, special_tokens=bool(body.add_special_tokens))
    names = await preparation.token_names(tokens) if body.return_token_strs else None
    limit = preparation.max_context_tokens
    return {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": names}


async def detokenize(preparation: RequestPreparation, body: DetokenizeBody) -> dict[str, Any]:
    """The answer of `/detokenize`. Raises ApiError."""
    return {"prompt": await preparation.text_of(body.tokens)}


def _check_chat(body: TokenizeBody) -> None:
    if body.add_generation_prompt is False:
        raise wrong_value("add_generation_prompt", False, "true: what a chat with these messages is asked with")
    if body.continue_final_message:
        raise wrong_value("continue_final_message", True, "false")
    for name in ("tools", "chat_template"):
        if getattr(body, name):
            raise not_here(name, "leaving it out")
