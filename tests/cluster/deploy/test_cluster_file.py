"""cluster.toml: the example file, the settings of the network for it, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli import app
from penstock.cluster.deploy.cluster_config import read_cluster_config
from penstock.core.config import ConfigError

EXAMPLE = Path(__file__).parents[3] / "deploy" / "cluster.toml"


def test_the_example_describes_processes_in_the_order_of_their_start() -> None:
    found = read_cluster_config(EXAMPLE)
    assert [(process.name, process.kind) for process in found.processes] == [
        ("pool-0", "pool"),
        ("router", "router"),
        ("prefill-0-0", "engine"),
        ("prefill-0-1", "engine"),
        ("decode", "engine"),
    ]
    command = found.of("engine")[2].command({"router": ["r:1"], "pool": ["a:1", "b:2"]})
    assert command[:2] == ["serve", "/models/llama-3.1-8b"]
    line = " ".join(command)
    for words in ("--router r:1", "--pool a:1 --pool b:2", "--role decode", "--node host-b", "--buffer 16GiB"):
        assert words in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = 3\n[[engine]]", "model"),
        ("[router]", "engine"),
        ("[[engine]]\nrole = 'prefill'", "all engines have the role prefill"),
        ("[[engine]]\ncount = 0", "count is 0"),
        ("[[engine]]\nspeed = 1", "'speed' is not known; allowed: "),
        ("[[engine]]\nname = 'x'\n[[engine]]\nname = 'x'", "two processes are named 'x'"),
        ("[[engine]]\nengine = 'sglang'", "engine is 'sglang'; allowed: penstock, vllm"),
        ("[[engine]]\nengine = 'vllm'", "in a cluster without model"),
        ("model = 'm'\n[[engine]]\nengine = 'vllm'\nvllm = '--dtype float16'", "allowed: a list of words"),
        ("model = 'm'\n[[engine]]\nengine = 'vllm'\nkv_memory = '1GiB'", "'kv_memory' is not known"),
        ("[[engine]]\npython = 'bin/python'", "allowed: the absolute path of an interpreter"),
        ("[[engine", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_cluster_config(file)
    assert says in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_pool_key_lies_beside_the_file_and_each_engine_may_have_its_own(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        "[serve]\npool-key-file = 'one.key'\n[[engine]]\n[[engine]]\nname = 'x'\npool_key_file = '/keys/two.key'\n"
    )
    lines = [" ".join(process.command({})) for process in read_cluster_config(file).of("engine")]
    assert f"--pool-key-file {tmp_path}/one.key" in lines[0] and "--pool-key-file /keys/two.key" in lines[1]


def test_an_engine_that_is_vllm_is_an_agent_with_vllms_own_flags_behind(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        "model = 'org/model'\n[serve]\nkv_memory = '1GiB'\n"
        "[[engine]]\nrole = 'prefill'\nengine = 'vllm'\ncount = 2\nvllm = ['--dtype', 'float16', '--port-range=x']\n"
        "[[engine]]\nrole = 'decode'\nengine = 'vllm'\nbuffer = '2GiB'\npython = '/vllm/bin/python'\n"
    )
    engines = read_cluster_config(file).of("engine")
    assert [engine.name for engine in engines] == ["prefill-0-0", "prefill-0-1", "decode-1"]
    words = engines[1].command({"router": ["r:1"], "pool": ["a:1"]})
    assert words[:2] == ["vllm-engine", "org/model"] and words[-3:] == ["--dtype", "float16", "--port-range=x"]
    line = " ".join(words)
    assert "--router r:1 --pool a:1" in line and "--engine-name prefill-0-1" in line and "kv-memory" not in line
    assert "--buffer 2GiB" in " ".join(engines[2].command({}))
    assert [engine.python for engine in engines] == ["", "", "/vllm/bin/python"]


INFINIBAND = """\
qos TRUE
qos_max_vls 4
qos_high_limit 240
qos_vlarb_high 0:192,1:192,2:0,3:192
qos_vlarb_low 0:192,1:192,2:64,3:192
"""


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("infiniband", [INFINIBAND, "UCX_IB_SL=2    # the bulk lane", "mlx5_0:1,mlx5_1:1"]),
        ("roce", ["DSCP 46 -> traffic class 3", "mlnx_qos -i mlx5_0 --trust dscp --pfc 1,1,1,1,0,0,0,0"]),
        ("tcp", ["tc qdisc replace dev mlx5_8 root handle 1: prio bands 3"]),
    ],
)
def test_fabric_prints_the_settings_of_each_network(kind: str, lines: list[str]) -> None:
    printed = CliRunner().invoke(app, ["fabric", str(EXAMPLE), "--kind", kind])
    assert printed.exit_code == 0, printed.output
    for wanted in [*lines, "# host host-a", "# host host-b", "this cluster: 1 / 1"]:
        assert wanted in printed.output
    refused = CliRunner().invoke(app, ["fabric", str(EXAMPLE), "--kind", "token-ring"])
    assert refused.exit_code == 2 and "allowed: infiniband, roce, tcp" in refused.output
