"""A prefill vLLM of two tensor parallel ranks and a decode vLLM of one, by `penstock up`: equal answers, also while
processes of theirs are killed (`kill_rounds.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from penstock.cluster.deploy.supervisor import Supervisor
from tests.inside_vllm.cluster_rig import client_of
from tests.inside_vllm.kill_rounds import TOKENS, VLLM_ENVIRONMENT, asked, kill_rounds, vllms
from tests.inside_vllm.vllm_rig import BLOCK

pytestmark = pytest.mark.timeout(1200)  # vLLMs start in here again and again

Made = tuple[Supervisor, list[list[int]]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VLLM_ENVIRONMENT.items():
            patch.setenv(name, value)
        with vllms(tmp_path_factory.mktemp("cluster"), prefill_ranks=2) as made:
            yield made


def test_two_ranks_hand_over_to_one(cluster: Made) -> None:
    """The answers are those of the decode vLLM alone, which found every full block of the prompts at its relay."""
    supervisor, answers = cluster
    decode = psutil.Process(supervisor.children["decode"].pid).children()[0]
    assert len(psutil.Process(supervisor.children["prefill"].pid).children(recursive=True)) > 3, "two workers"
    with client_of(decode) as one:
        metrics = one.get("/metrics").text
        body = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        alone = [one.post("/v1/completions", json=body | question).json() for question in asked()]
    assert [answer["choices"][0]["token_ids"] for answer in alone] == answers
    hits = next(line for line in metrics.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total"))
    assert float(hits.rpartition(" ")[2]) == sum(len(question["prompt"]) // BLOCK * BLOCK for question in asked())


def test_processes_are_killed_under_load(cluster: Made) -> None:
    victims = ("pool", "prefill vllm", "router", "decode agent")
    counts = kill_rounds(*cluster, victims)
    assert not counts.wrong and not counts.failed, (counts.wrong, counts.failed)
    assert counts.kills.total() == len(victims) and counts.answers > 0
