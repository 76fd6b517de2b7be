"""The docs say of flags, keys and defaults what the records say from which these are derived, and leave none out.

`python tests/test_docs_flags.py` writes docs/reference/flags.md anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import Any

import pytest
from rich.markup import render
from typer.main import get_command

from penstock.cli import app
from penstock.cluster.engine.serve_command import PANELS as SERVE_PANELS
from penstock.cluster.engine.serve_flags import ServeFlags
from penstock.cluster.router.router_command import PANELS as ROUTER_PANELS
from penstock.cluster.router.router_flags import RouterFlags
from penstock.cluster.vllm_agent.agent_command import PANELS as AGENT_PANELS
from penstock.cluster.vllm_agent.agent_flags import AgentFlags
from penstock.command_line import ARGUMENTS, shown_default
from penstock.core.settings import Declared, settings_of
from penstock.lazy_commands import LazyGroup
from penstock.pool.net.node import CONNECTIONS_MAX, STAGING_BYTES
from penstock.pool.setup.config import NodeSettings, PoolConfig
from penstock.pool.setup.pool_command import PANELS as POOL_PANELS
from penstock.pool.setup.pool_command import NodeFlags
from penstock.units import format_bytes
from penstock.vllm.command import PANELS as VLLM_PANELS
from penstock.vllm.settings import Settings

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "reference" / "flags.md"
COMMANDS: Mapping[str, tuple[type, Mapping[str, Sequence[str]]]] = {
    "serve": (ServeFlags, SERVE_PANELS),
    "router": (RouterFlags, ROUTER_PANELS),
    "pool": (NodeFlags, POOL_PANELS),
    "vllm": (Settings, VLLM_PANELS),
    "vllm-engine": (AgentFlags, AGENT_PANELS),
}
HEAD = """# Flags

What these commands can be told, as their `--help` has it. `serve` and `router` take the same names, with `_` for `-`,
as keys of a TOML file (`--config`); the command line overrides it. `pool` takes those of the node as keys of its
[pool.toml](pool-toml.md), `vllm` its own as keys of [`kv_connector_extra_config`](vllm.md). A flag that may be repeated
is a list there. `penstock up` takes the flags of `pool`, `router`, `serve` and `vllm-engine` as keys of
[cluster.toml](../how-to/run-a-cluster.md).
"""
WIDTH = 120
MENTION = re.compile(r"`--([a-z0-9-]+)` \(([^)`]+)\)")
NAMED = re.compile(r"`--([a-z][a-z0-9-]*)")
# Cut short, and of other programs.
OTHERS = {"peer-tls-", "enable-lora", "enable-auto-tool-choice", "trust-request-chat-template", "http2"}
OWN_PAGES = (
    "reference/http-api.md", "reference/serve.md", "reference/pool-toml.md", "how-to/run-a-cluster.md",
    "how-to/size-a-cluster.md", "how-to/find-where-ttft-goes.md", "how-to/run-a-pool-node.md",
    "how-to/secure-connections.md", "explanation/cluster.md", "explanation/pool.md", "explanation/pool-key.md",
    "security.md",
)  # fmt: skip


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_of(one: Declared) -> str:
    """The default as the tables have it; None of a flag whose help names none is "none" or "off" here."""
    return shown_default(one) or ("off" if one.kind is bool else "none")


def row_of(what: str, default: str, text: str) -> tuple[str, list[str]]:
    """The row of a flag, and what goes below the table: more than fits into its line, or more than a sentence."""
    row = f"| {what} | {default} | {text} |\n"
    if len(row) <= WIDTH and ". " not in text:
        return row, []
    note = fill(f"- {what}: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return f"| {what} | {default} | below |\n", [note + "\n"]


def page() -> str:
    parts = [HEAD]
    for command, (record, panels) in COMMANDS.items():
        parts.append(f"\n## `penstock {command}`\n\n| flag | default | meaning |\n| --- | --- | --- |\n")
        declared, notes = settings_of(record), []
        for name in (name for names in panels.values() for name in names):
            one = declared[name]
            what = "`MODEL`" if name in ARGUMENTS else f"`{flag_of(name)}`"
            default = "none" if name in ARGUMENTS else default_of(one)
            row, note = row_of(what, default, one.setting.help)
            parts.append(row)
            notes += note
        parts += ["\n", *notes] if notes else []
    return "".join(parts)


def options(command: str) -> dict[str, Any]:
    """The flags of a command as the command line has them, by name."""
    found = get_command(app).load(command)  # type: ignore[attr-defined]
    return {one.name: one for one in found.params if not getattr(one, "hidden", False)}


def all_flags(command: Any) -> Iterator[str]:
    for one in command.params:
        yield from one.opts
    for name in getattr(command, "commands", {}):
        yield from all_flags(command.load(name) if isinstance(command, LazyGroup) else command.commands[name])


def table(page_name: str, first: str) -> list[tuple[str, str]]:
    """The first two columns of the table whose first heading begins so."""
    text = (DOCS / page_name).read_text()
    rows = text[text.index(f"| {first}") :].split("\n\n")[0].splitlines()[2:]
    return [(cells[1].strip(), cells[2].strip()) for cells in (re.split(r"(?<!\\)\|", row) for row in rows)]


def plain(text: str) -> str:
    return re.sub(r'[`" ]|--', "", text)


def test_the_page_of_flags_is_what_the_records_say() -> None:
    assert PAGE.read_text() == page(), "write it anew: python tests/test_docs_flags.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_has_the_settings_of_the_record_and_no_others(command: str) -> None:
    record, panels = COMMANDS[command]
    listed = [name for names in panels.values() for name in names]
    of_the_command = {"help", "config", "log_level", "stock_scheduler", "print_command"}
    assert len(listed) == len(set(listed)) and set(options(command)) - of_the_command == set(listed) - {"log_level"}
    keys_only = {"max_waiting", "save_timeout_s", "age_bound_s", "age_delays"}
    keys_only |= {"block_tokens", "model_id", "weight_version", "agent"}
    assert set(settings_of(record)) - set(listed) == (keys_only if command == "vllm" else set())
    for name in set(listed) - set(ARGUMENTS):
        one = settings_of(record)[name]
        option = options(command)[name]
        assert option.default is None and render(option.help).plain == one.setting.help
        assert (option.show_default or "") == shown_default(one)


def test_the_table_of_vllm_has_every_flag_and_key_with_its_default() -> None:
    declared = settings_of(Settings)
    flags: set[str] = set()
    keys: set[str] = set()
    for what, default in table("reference/vllm.md", "flag, and key"):
        names = re.findall(r"`([^`]{2,})`", what)
        flags |= {name for name in names if name.startswith("--")}
        asked = list(dict.fromkeys(name.removeprefix("--").replace("-", "_") for name in names))
        keys |= set(asked) - {"stock_scheduler"}
        if asked[0] in ("pool", "pool_config", "secret_file", "memory", "model_id", "stock_scheduler", "block_tokens"):
            continue  # said in words
        wanted = ["off" if declared[name].kind is bool else plain(default_of(declared[name])) for name in asked]
        assert plain(default).split(",") == wanted, what
    assert flags == {flag_of(name) for names in VLLM_PANELS.values() for name in names} | {"--stock-scheduler"}
    assert keys == set(declared)


def test_the_table_of_pool_toml_has_every_key_with_its_default() -> None:
    declared = settings_of(NodeSettings)
    assert declared["connections"].setting.shown == str(CONNECTIONS_MAX)
    assert str(declared["staging"].setting.shown).startswith(format_bytes(STAGING_BYTES).replace(" ", ""))
    fields_of = {one.name: one for one in fields(PoolConfig)}
    keys: set[str] = set()
    for what, default in table("reference/pool-toml.md", "key | default"):
        names = re.findall(r"`([^`]+)`", what)
        keys |= {name for name in names if not name.startswith("[quota]")}
        wanted = [shown_default(declared[name]) for name in names if name in declared]
        wanted += [str(fields_of[name].default) for name in names if name == "write_admission"]
        if "" not in wanted and wanted and set(wanted) != {"none"}:
            assert plain(default) == plain(",".join(wanted)), what
    assert keys == set(declared) | {"write_admission", "profile", "block_bytes"}


@pytest.mark.parametrize("name", OWN_PAGES)
def test_flags_that_a_page_names_exist_and_have_the_default_that_it_says(name: str) -> None:
    text = (DOCS / name).read_text()
    known = {flag.removeprefix("--") for flag in all_flags(get_command(app))}
    assert set(NAMED.findall(text)) - known <= OTHERS
    for flag, value in MENTION.findall(text):
        defaults = {
            plain(shown_default(settings_of(record)[flag.replace("-", "_")]))
            for record, _ in COMMANDS.values()
            if flag.replace("-", "_") in settings_of(record)
        }
        assert not re.match(r"\d", value) or plain(value).removesuffix("s") in defaults, (
            f"{name}: --{flag} ({value}), not {defaults}"
        )


if __name__ == "__main__":
    PAGE.write_text(page())
