"""`penstock sim run`: what a file describes is simulated, one seed is one result, and wrong files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli import app
from penstock.engine.profile import load_profile
from penstock.sim.cluster_file import Simulation, read_simulation
from penstock.sim.commands.run import simulate
from penstock.sim.commands.run_result import Result
from tests.children import with_tests

EXAMPLES = Path(__file__).parents[2] / "deploy"
ENGINE = """
seed = 3
[engine]
profile = "h100-llama-3.1-8b"
weight_bytes = 16e9
[engine.scheduler]
block_tokens = 64
[engine.links]
nic = 4e9
[[engine.device]]
name = "ssd:0"
bytes_per_s = 2e9
over = ["nic"]
[[engine.device]]
name = "ssd:1"
bytes_per_s = 2e9
over = ["nic"]
[workload]
kind = "agents"
length = "32K"
agents = 4
token_divisor = 16
turns_max = 5
rate_per_s = 2.0
slo_ttft_s = 1.0
"""
CLUSTER = """
[cluster]
model = "qwen2.5-32b"
[cluster.shape]
prefill_nodes = 1
decode_nodes = 2
gpus = 2
[workload]
kind = "agents"
length = "32K"
agents = 6
turns_max = 6
rate_per_s = 1.0
"""
PROGRAM = "import sys; from tests.sim.test_sim_run import digest; print(digest(sys.argv[1]))"


def written(folder: Path, text: str) -> Path:
    path = folder / "sim.toml"
    path.write_text(text)
    return path


def simulated(folder: Path, text: str) -> Result:
    return simulate(read_simulation(written(folder, text)), folder)


def digest(path: str) -> str:
    result = simulate(read_simulation(Path(path)))
    return repr((result.ttft_s, result.tpot_s, result.jct_s, result.link_use))


def test_one_request_takes_what_arithmetic_says(tmp_path: Path) -> None:
    text = ENGINE.split("[workload]")[0] + '[workload]\nkind = "calvo"\ndataset = "icl"\nrequests = 1\n'
    result = simulated(tmp_path, text)
    profile = load_profile("h100-llama-3.1-8b")
    block_bytes = 64 * profile.layers * profile.layer_bytes_per_token
    read_s = 28_300 // 64 * block_bytes / 4e9  # both devices at once
    assert result.ttft_s[0] == pytest.approx(read_s, rel=0.06) and result.ttft_s[0] > read_s
    assert result.slo_attainment == 1.0 and result.ended == {"length": 1}
    assert result.balance_max_avg < 1.1
    assert max(result.link_use["ssd:0"]) > 0.5


def test_sessions_are_closed_loops_and_later_turns_hit(tmp_path: Path) -> None:
    result = simulated(tmp_path, ENGINE)
    assert result.requests == sum(result.ended.values()) == len(result.ttft_s) == 20
    assert len(result.jct_s) == 4 and min(result.jct_s) > 5 * min(result.ttft_s)
    assert result.cached_tokens > 0.5 * result.prompt_tokens
    assert all(first < second for first, second in zip(sorted(result.ttft_s), sorted(result.ttst_s), strict=False))
    assert all(0 <= share <= 1.001 for use in result.link_use.values() for share in use)


def test_a_fault_of_a_link_costs_time(tmp_path: Path) -> None:
    text = ENGINE.split("[workload]")[0] + '[workload]\nkind = "calvo"\ndataset = "icl"\nrequests = 3\n'
    fault = '[[engine.fault]]\nat_s = 0.0\nlink = "ssd:1"\nlasts_s = 1.0\nfactor = 0.01\nloses = true\n'
    whole, slow = simulated(tmp_path, text), simulated(tmp_path, text.replace("[workload]", fault + "[workload]"))
    assert slow.ended == whole.ended and slow.jct_s[0] > whole.jct_s[0]


def test_a_cluster_gives_all_its_figures(tmp_path: Path) -> None:
    result = simulated(tmp_path, CLUSTER)
    assert result.requests == result.ended["length"] == len(result.ttft_s) == len(result.ttst_s) == 36
    assert len(result.jct_s) == 6 and result.duration_s >= max(result.jct_s)
    assert set(result.link_use) == {"snic@n0", "snic@n1", "snic@n2"}
    assert result.goodput_per_s > 0 and result.slo_attainment == 1.0


@pytest.mark.parametrize("text", [ENGINE, CLUSTER], ids=["engine", "cluster"])
def test_one_seed_is_one_result_whatever_the_seed_of_hashes(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    found = {digest(str(path))}
    for seed in ("1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)], env=with_tests(PYTHONHASHSEED=seed),
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found.add(done.stdout.strip())
    assert len(found) == 1
    other = simulate(read_simulation(path).seeded(99))
    assert repr(other.ttft_s) not in next(iter(found))


@pytest.mark.parametrize("text", [ENGINE, CLUSTER], ids=["engine", "cluster"])
def test_the_command_writes_figures_a_picture_and_a_trace(text: str, tmp_path: Path) -> None:
    path, out = written(tmp_path, text), {kind: tmp_path / f"o.{kind}" for kind in ("json", "png", "trace")}
    options = ["--json", str(out["json"]), "--plot", str(out["png"]), "--trace-out", str(out["trace"])]
    done = CliRunner().invoke(app, ["sim", "run", str(path), *options])
    assert done.exit_code == 0, done.output
    figures = json.loads(out["json"].read_text())["figures"]
    for name in ("ttft_p99_s", "ttst_p50_s", "tpot_mean_s", "jct_mean_s", "slo_attainment", "goodput_per_s"):
        assert figures[name] > 0
    assert figures["balance_max_avg"] >= 1.0
    assert out["png"].read_bytes()[:4] == b"\x89PNG"
    events = json.loads(out["trace"].read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) >= figures["requests"] and all(span["dur"] >= 0 for span in spans)


@pytest.mark.parametrize("name", ["sim-engine.toml", "sim-2p4d.toml"])
def test_the_examples_are_valid(name: str) -> None:
    assert isinstance(read_simulation(EXAMPLES / name), Simulation)


def test_the_example_of_a_cluster_runs_at_a_small_size(tmp_path: Path) -> None:
    text = (EXAMPLES / "sim-2p4d.toml").read_text().replace("agents = 200", "agents = 20\nturns_max = 8")
    assert simulated(tmp_path, text).ended["length"] == 160


WRONG: list[tuple[str, str, str, str]] = [
    (ENGINE, "nic = 4e9", "nic = 0", "links.nic is 0"),
    (ENGINE, "bytes_per_s = 2e9", "bytes_per_s = -1", "bytes_per_s of device ssd:0 is -1"),
    (ENGINE, "weight_bytes = 16e9", "weight_bytes = 79e9", "gpu_memory_bytes is 8e+10; allowed: at least"),
    (ENGINE, "block_tokens = 64", 'policy = "best"', "policy is 'best'; allowed: fcfs"),
    (ENGINE, "block_tokens = 64", "l1_pages = 5", "scheduler.l1_pages is not a setting"),
    (
        ENGINE, "block_tokens = 64", "fetch_window_blocks = 4",
        "scheduler.fetch_window_blocks is not a setting; allowed: fetch_window_bytes of engine",
    ),
    (ENGINE, 'over = ["nic"]', 'over = ["nic2"]', "link is 'nic2'; allowed: nic"),
    (ENGINE, "seed = 3", "sead = 3", "unknown field `sead`"),
    (ENGINE, "seed = 3", "seed = -3", "seed is -3"),
    (ENGINE, "h100-llama-3.1-8b", "h100-none", "h100-none"),
    (ENGINE, 'length = "32K"', 'length = "16K"', "length is '16K'; allowed: 32K, 48K, 64K"),
    (ENGINE, "agents = 4", "agents = 0", "agents is 0"),
    (ENGINE, "rate_per_s = 2.0", "rate_per_s = 0.0", "rate_per_s is 0.0"),
    (ENGINE, "weight_bytes = 16e9", "weight_bytes = 75.99e9", "engine.gpu_memory_bytes"),
    (ENGINE, 'kind = "agents"', 'kind = "trace"', "length"),
    (CLUSTER, "gpus = 2", "gpus = 2\nstorage_nic_bytes_per_s = 0", "storage_nic_bytes_per_s is 0"),
    (CLUSTER, "gpus = 2", "gpus = 0", "gpus is 0"),
    (CLUSTER, "gpus = 2", "gpu_s = 2", "cluster.shape.gpu_s is not a setting"),
    (CLUSTER, "gpus = 2", "gpus = 2\n[cluster.shape.gpu]\nmemory_bytes = 30e9", "memory_bytes is 3e+10"),
    (CLUSTER, "gpus = 2", "gpus = 2\n[cluster.shape.gpu]\nmemory = 30e9", "cluster.shape.gpu.memory is not a setting"),
    (CLUSTER, 'model = "qwen2.5-32b"', 'model = "qwen"', "model is 'qwen'; allowed"),
    (CLUSTER, 'model = "qwen2.5-32b"', 'model = "qwen2.5-32b"\nsystem = "x"', "system is 'x'; allowed: basic"),
    (CLUSTER, "[workload]", '[[cluster.fault]]\nat_s=1.0\nwhat="nic lost"\nnode=3\n[workload]', "fault.node is 3"),
    (CLUSTER, "agents = 6", "agents = 6\ntoken_divisor = 4", "workload.token_divisor is 4; allowed with [cluster]: 1"),
    (CLUSTER, "[cluster]", "[cluster_]", "cluster_"),
    (CLUSTER, "[cluster]", "[cluster", "sim.toml"),
]  # fmt: skip


def refusal(path: Path) -> str:
    done = CliRunner().invoke(app, ["sim", "run", str(path)])
    assert done.exit_code == 2, done.output
    return done.output


@pytest.mark.parametrize(("text", "old", "new", "says"), WRONG, ids=lambda value: value if len(value) < 60 else "")
def test_a_wrong_file_is_refused_in_one_line_with_the_fields_name(
    text: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    assert old in text
    output = refusal(written(tmp_path, text.replace(old, new)))
    assert output.count("\n") == 1 and says in output, output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hash_ids": [1]}, "1 hash_ids do not fit 1100 tokens"),
        ({"hash_ids": None}, "field 'hash_ids' is None"),
        ({"timestamp": None}, "field 'timestamp'"),
        ({"input_length": None}, "field 'input_length'"),
    ],
)
def test_a_trace_with_holes_is_refused_with_its_line_and_field(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    row = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
    rows = [row, row | {"timestamp": 10} | change]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = ENGINE.split("[workload]")[0] + '[workload]\nkind = "trace"\npath = "trace.jsonl"\n'
    output = refusal(written(tmp_path, text))
    assert output.count("\n") == 1 and "line 2" in output and says in output, output


def test_a_trace_is_simulated(tmp_path: Path) -> None:
    rows = [
        {"timestamp": i * 100, "input_length": 1536, "output_length": 3, "hash_ids": [1, 2, 10 + i]} for i in range(6)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = ENGINE.split("[workload]")[0] + '[workload]\nkind = "trace"\npath = "trace.jsonl"\n'
    result = simulated(tmp_path, text)
    assert result.ended == {"length": 6} and result.cached_tokens == 5 * 1024
