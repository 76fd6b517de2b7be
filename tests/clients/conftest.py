"""One `penstock serve` with a tiny checkpoint, and one server that answers with the prompt, for all clients. The tests
run in an environment of the clients' own, the servers on the product's interpreter, named by PENSTOCK_PYTHON."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("litellm") is None:  # one test stays, and says why it is skipped
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_clients_environment.py"]
else:
    os.environ.update(  # before they are imported: no look-ups outside of this machine
        LITELLM_LOCAL_MODEL_COST_MAP="True",
        LITELLM_LOG="ERROR",
        LANGCHAIN_TRACING_V2="false",
        LANGSMITH_TRACING="false",
        OPENAI_API_KEY="unused",
    )
    from tests.clients.client_rig import CONTEXT, KEY, MODEL, Server, build_model, serve

    @pytest.fixture(scope="session")
    def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("model")
        build_model(folder, CONTEXT)
        command = ["-m", "penstock", "serve", str(folder), "--port", "0", "--served-model-name", MODEL]
        with serve([*command, "--api-key", KEY, "--memory", "16MiB", "--drain-timeout-s", "1"], MODEL) as one:
            yield one

    @pytest.fixture(scope="session")
    def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with serve(["-m", "tests.clients.echo_server", "64", "2", "0"], "echo") as one:
            yield one
