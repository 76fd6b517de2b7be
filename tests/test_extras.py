"""What `pip install penstock` leaves out is not imported by what needs no model, and is named in one line where it is.

The environment of the tests has everything; here a finder hides what the extras bring, as if it were not installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from penstock.extras import EXTRAS, ExtraMissing, missing_modules, require_extra

HERE = Path(__file__).parent.parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
HIDDEN = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "jinja2",
    "matplotlib",
    "vllm",
    "ray",
    "nixl_cu12",
    "ibverbs",
)
HIDE = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""
# What needs an extra already when it is imported: the engine's own model code, and what runs inside vLLM.
NEED_EXTRAS = {
    *(f"penstock.bench.{name}" for name in ("gpu_copies", "gpu_decode", "gpu_ttft", "gpu_upload")),
    *(
        f"penstock.device.{name}"
        for name in ("accelerator", "checksum_kernels", "copies", "cuda", "gpu_direct", "registry")
    ),
    *(f"penstock.engine.{name}" for name in ("attention", "checkpoint", "decode_graphs", "hf_runner", "paged_kernel")),
    *(f"penstock.engine.{name}" for name in ("paged_kv", "sampling", "shaped_logits")),
    *("penstock.server.chat_template", "penstock.server.template_process"),
    *(f"penstock.testing.{name}" for name in ("fake_cuda", "null_accelerator", "tensor_bytes")),
    *(
        f"penstock.vllm.{name}"
        for name in ("connector", "device_copies", "kv_events", "layout", "metrics", "scheduler")
    ),
    *(f"penstock.vllm.{name}" for name in ("scheduler", "scheduler_side", "steps", "waiting_queue", "worker")),
}


def run_without_extras(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", HIDE + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=120)


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, as if no extra were installed."""
    return run_without_extras("from penstock.cli import app; app(prog_name='penstock')", *arguments)


def test_the_extras_are_those_of_the_project() -> None:
    declared = PROJECT["optional-dependencies"]
    assert set(declared) - {"all", "dev"} == set(EXTRAS)
    assert Requirement(declared["all"][0]).extras == set(EXTRAS) - {"tokenizer"}, "which the engine brings"
    required = {Requirement(one).name for one in PROJECT["dependencies"]}
    assert not required & {"torch", "transformers", "matplotlib", "tokenizers", "safetensors", "jinja2", "vllm", "ray"}


@pytest.mark.slow
def test_every_module_but_the_engines_is_imported_without_extras() -> None:
    program = """
import importlib, pkgutil, penstock
for one in pkgutil.walk_packages(penstock.__path__, "penstock."):
    try:
        None if one.name == "penstock.__main__" else importlib.import_module(one.name)
    except ModuleNotFoundError:
        print(one.name)
"""
    done = run_without_extras(program)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= NEED_EXTRAS


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve", "no/model"], "engine"),
        (["serve", "no/model", "--executor", "modelled"], "tokenizer"),
        (["router", "no/model", "--port", "0", "--cluster-listen", "127.0.0.1:0", "--secret-file"], "tokenizer"),
        (["vllm", "no/model"], "vllm"),
        (["bench", "io", "--plot", "x.png"], "plots"),
        (["sim", "run", "deploy/sim-engine.toml", "--plot", "x.png"], "plots"),
        (["bench", "serve", "--trace", "tests", "--plot", "x.png"], "plots"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else one,
)
def test_a_command_names_the_extra_that_it_needs(arguments: list[str], extra: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{7:064x}\n")
    secret.chmod(0o600)
    done = penstock(*arguments, *([str(secret)] if arguments[-1] == "--secret-file" else []))
    assert done.returncode == 2 and done.stdout == "", done
    assert re.fullmatch(rf"penstock {arguments[0]}.*: .*pip install 'penstock\[{extra}\]'\n", done.stderr), done.stderr


def test_a_library_call_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_modules("plots") == []
    require_extra("plots", "a picture")
    monkeypatch.setitem(EXTRAS, "plots", ("matplotlib", "no_such_module", "no_such_package.part"))
    from penstock.workloads.plots import new_figure

    with pytest.raises(ExtraMissing) as caught:
        new_figure(1, 1)
    assert str(caught.value) == (
        "a picture needs no_such_module, no_such_package.part, not installed here; pip install 'penstock[plots]'"
    )


@pytest.mark.slow
def test_the_simulator_runs_without_extras() -> None:
    done = penstock("sim", "run", "deploy/sim-engine.toml")
    assert done.returncode == 0 and "ttft" in done.stdout, done


def test_doctor_takes_missing_extras_for_no_problem() -> None:
    program = """
import importlib.metadata
known = importlib.metadata.version
def version(name):
    if name in sys.argv[1].split(","):
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
from penstock.doctor.machine import Machine
from penstock.doctor.machine_checks import check_cuda, check_packages
for check in (check_packages(Machine()), check_cuda(Machine())):
    print(check.status, check.unusable, check.found)
"""
    done = run_without_extras(program, ",".join([*HIDDEN, "opentelemetry-sdk"]))
    packages, cuda = done.stdout.splitlines()
    assert not packages.startswith("problem")
    assert packages.endswith("jinja2, matplotlib, opentelemetry-sdk, safetensors, tokenizers, torch, transformers")
    assert not cuda.startswith("problem") and "no torch" in cuda
    done = run_without_extras(program, "numpy")
    assert done.stdout.startswith("problem True missing: numpy")
