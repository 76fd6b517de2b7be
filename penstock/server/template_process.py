"""The process that renders chat templates: `TemplateRenderer` starts it as a script and can kill it.

It imports nothing of Penstock. Its standard input is a socket. Each frame is 4 bytes of length (big endian), then
msgpack. The first frame is the set-up; each later one is a chat, answered by `{"text": ...}` or `{"error": ...}`. A
chat that takes more processor time than allowed ends the process by SIGPROF's default action, which a template cannot
catch; too much memory gives an error.
"""

import resource
import signal
import socket
from typing import Any

import msgspec
from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Render until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the socket
    with socket.socket(fileno=0) as sock, sock.makefile("rb") as stream:
        setup = _next(stream)
        if setup is None:
            return
        with open("/proc/self/statm", encoding="ascii") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = in_use + setup["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
        sock.sendall(_frame({"text": "ready"}))
        while (chat := _next(stream)) is not None:
            signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
            try:
                answer = {"text": _render(setup, chat)}
                frame = _frame(answer)
            except Exception as error:  # noqa: BLE001 (a template raises anything; the answer says what)
                frame = _frame({"error": " ".join(str(error).split())[:500] or type(error).__name__})
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0.0)
            del chat
            sock.sendall(frame)


def _render(setup: dict[str, Any], chat: dict[str, Any]) -> str:
    variables = setup["special_tokens"] | chat["variables"]
    texts, _ = render_jinja_template(
        conversations=[chat["messages"]],
        chat_template=setup["template"],
        add_generation_prompt=True,
        **variables,
    )
    text: str = texts[0]
    if len(text) > setup["characters_max"]:
        raise ValueError(f"it made {len(text)} characters of them; {setup['characters_max']} are allowed")
    return text


def _next(stream: Any) -> Any:
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(int.from_bytes(head))
    return msgspec.msgpack.decode(body)


def _frame(record: dict[str, str]) -> bytes:
    body = msgspec.msgpack.encode(record)
    return len(body).to_bytes(4) + body


if __name__ == "__main__":
    main()
