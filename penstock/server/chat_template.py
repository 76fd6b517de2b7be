"""A checkpoint's chat template: which variables a client may set, and the form of tool calls that it takes."""

from __future__ import annotations

import inspect
import json
import logging
import math
import threading
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.server.errors import ApiError, bad_request, wrong_value
from penstock.server.template_renderer import RendererClosed, RenderError, TemplateRenderer

log = logging.getLogger(__name__)

VARIABLES_MAX = 32
TEXT_CHARACTERS_MAX = 4096  # of all variables together
LIST_MAX = 64
INTEGER_MAX = 2**53
_SET_BY_THE_SERVER = {"messages", "tools", "documents", "add_generation_prompt"}
_SPECIAL_TOKENS = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
_GLOBALS = {"raise_exception", "strftime_now", "namespace", "dict"}  # names that the rendering environment provides
_NEEDLE = "argument_needle"


class ChatTemplate:
    """Threading: any method may be called from any thread; `render` waits for the rendering process."""

    def __init__(self, tokenizer: Any, source: str, characters_max: int, cpu_s: float) -> None:
        special_tokens = dict(tokenizer.special_tokens_map)
        self.variables = _variables(source) - _parameters(tokenizer) - set(special_tokens)
        self._renderer = TemplateRenderer(source, special_tokens, characters_max, cpu_s)
        self._arguments_lock = threading.Lock()
        self._wants_objects: bool | None = None  # None: not yet determined

    def start(self) -> None:
        """Start the renderer. Raises RenderError."""
        self._renderer.start()

    def close(self) -> None:
        """Stop the renderer and whatever it renders."""
        self._renderer.close()

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text of a chat, ending with the beginning of the answer. `variables` were checked by `check_variables`.
        Raises ApiError."""
        messages = [{name: value for name, value in one.items() if value is not None} for one in messages]
        if any(_text_arguments(message) for message in messages) and self._takes_object_arguments():
            messages = [_with_object_arguments(message, at) for at, message in enumerate(messages)]
        try:
            return self._renderer.render(messages, dict(variables))
        except RendererClosed as error:
            raise ApiError(503, str(error), code="shutting_down", retry_after_s=5.0) from None
        except RenderError as error:
            raise bad_request(f"the chat template refused the messages: {error}", "messages") from None

    def check_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A client's `chat_template_kwargs` if this template takes all of them. Raises ApiError(400)."""
        if len(given) > VARIABLES_MAX:
            message = f"chat_template_kwargs has {len(given)} entries; allowed: at most {VARIABLES_MAX}"
            raise bad_request(message, "chat_template_kwargs")
        characters = 0
        for name, value in given.items():
            param = f"chat_template_kwargs.{name[:100]}"
            if name not in self.variables:
                allowed = ", ".join(sorted(self.variables)) or "none"
                message = f"{param} is no variable that a client may set; allowed with this model's template: {allowed}"
                raise bad_request(message, param)
            for one in value if isinstance(value, list) else [value]:
                _check_scalar(param, one)
                characters += len(one) if isinstance(one, str) else 0
            if isinstance(value, list) and len(value) > LIST_MAX:
                raise bad_request(f"{param} has {len(value)} elements; allowed: at most {LIST_MAX}", param)
        if characters > TEXT_CHARACTERS_MAX:
            message = f"chat_template_kwargs has {characters} characters; allowed: at most {TEXT_CHARACTERS_MAX}"
            raise bad_request(message, "chat_template_kwargs")
        return dict(given)

    def _takes_object_arguments(self) -> bool:
        """Whether the template writes out tool-call arguments given as an object; some templates only join text."""
        with self._arguments_lock:
            if self._wants_objects is None:
                self._wants_objects = self._writes_out_objects()
            return self._wants_objects

    def _writes_out_objects(self) -> bool:
        function = {"name": "f", "arguments": {_NEEDLE: "v"}}
        call = {"id": "call00001", "type": "function", "function": function}
        asked = {"role": "user", "content": "a"}
        for content in ("", None):
            answered = {"role": "assistant", "tool_calls": [call]} | ({} if content is None else {"content": content})
            try:
                text = self._renderer.render([asked, answered, asked], {})
            except RenderError as error:
                log.debug("the chat template takes no object as arguments: %s", error)
                continue
            return _NEEDLE in text and f"{{'{_NEEDLE}'" not in text
        return False


def _check_scalar(param: str, value: Any) -> None:
    allowed = "true, false, null, a number, a string, or a list of them"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not (math.isfinite(value) and abs(value) <= INTEGER_MAX):
            raise wrong_value(param, value, f"numbers from -{INTEGER_MAX} to {INTEGER_MAX}")
    elif value is not None and not isinstance(value, bool | str):
        raise bad_request(f"{param} has a {type(value).__name__}; allowed: {allowed}", param)


def _text_arguments(message: Mapping[str, Any]) -> bool:
    functions = [call.get("function") for call in message.get("tool_calls") or ()]
    return any(isinstance(one, dict) and isinstance(one.get("arguments"), str) for one in functions)


def _with_object_arguments(message: dict[str, Any], at: int) -> dict[str, Any]:
    """The message with its tool calls' arguments decoded from the API's JSON text to objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return message | {"tool_calls": [_decoded(call, f"messages[{at}].tool_calls[{i}]") for i, call in enumerate(calls)]}


def _decoded(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    text = function["arguments"]
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong_value(f"{where}.function.arguments", text, "the JSON text of an object")
    return call | {"function": function | {"arguments": arguments}}


def _variables(source: str) -> frozenset[str]:
    """Names that the template reads but does not define."""
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, jinja2.ext.loopcontrols])
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        log.warning("the chat template cannot be parsed: %s", error)
        return frozenset()
    return frozenset(found) - _SET_BY_THE_SERVER - _SPECIAL_TOKENS - _GLOBALS - set(environment.globals)


def _parameters(tokenizer: Any) -> set[str]:
    """Parameter names of the tokenizer's own function, which are not template variables."""
    from transformers import PreTrainedTokenizerBase

    functions = (tokenizer.apply_chat_template, PreTrainedTokenizerBase.apply_chat_template)
    return {name for function in functions for name in inspect.signature(function).parameters}


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, by which templates mark the model's answers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
