"""The Helm chart: linted and rendered by Helm's own library for each file of values, and validated against Kubernetes'
schemas; the flags that it gives to Penstock are ones that Penstock has. Nothing is applied to a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from penstock.cli import app

helm = pytest.importorskip("helm_python", reason="Helm's library is not installed: pip install 'penstock[dev]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'penstock[dev]'")
yaml = pytest.importorskip("yaml")

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "penstock"
KUBERNETES = "1.33"
CUSTOM = {"LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1", "PodMonitor": "monitoring.coreos.com/v1"}
ALL = ["laptop", "gpu-host", "eight-hosts"]
VLLM_GROUP = {"name": "big", "kind": "vllm", "replicas": 2, "size": 2, "gpus": 8}
Manifest = dict[str, Any]


def values_of(name: str) -> Manifest:
    found: Manifest = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return found


def rendered(values: Manifest) -> list[Manifest]:
    with helm.Chart.load(CHART) as chart:
        texts = chart.render(values, name="kv", namespace="serving")
    documents = (one for name, text in texts.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text))
    return [one for one in documents if one]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The pod templates of all workloads."""
    for one in manifests:
        if one["kind"] in ("DaemonSet", "Deployment"):
            yield one["spec"]["template"]
        if one["kind"] == "LeaderWorkerSet":
            parts = one["spec"]["leaderWorkerTemplate"]
            yield from (parts[name] for name in ("leaderTemplate", "workerTemplate") if name in parts)


def validate(manifest: Manifest) -> None:
    """Against Kubernetes' schema, which knows every field; of a custom kind, whose schema is not there, the pods."""
    if manifest["kind"] not in CUSTOM:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    assert manifest["apiVersion"] == CUSTOM[manifest["kind"]]
    for at, template in enumerate(pods([manifest])):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{at}"} | template["metadata"],
             "spec": template["spec"]}, KUBERNETES, strict=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_lint_finds_nothing(name: str) -> None:
    report = helm.lint(CHART, values_of(name), strict=True)
    assert [one for one in report["messages"] if one["severity"] >= 2] == [] and report["errors"] == []


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_what_kubernetes_takes(name: str) -> None:
    manifests = rendered(values_of(name))
    for one in manifests:
        validate(one)
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(names)) == len(names) >= 4
    broken = of_kind(manifests, "DaemonSet")[0]
    broken["spec"]["template"]["spec"]["nodeSelectr"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


def test_eight_hosts_have_every_part() -> None:
    manifests = rendered(values_of("eight-hosts"))
    kinds = {one["kind"] for one in manifests}
    assert kinds == {"DaemonSet", "Deployment", "LeaderWorkerSet", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor",
                     "Service"}  # fmt: skip
    pool = next(pods(of_kind(manifests, "DaemonSet")))["spec"]
    assert pool["hostNetwork"] and sum("hostPath" in one for one in pool["volumes"]) == 2
    groups = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "LeaderWorkerSet")}
    assert {name: one["replicas"] for name, one in groups.items()} == {"kv-prefill": 4, "kv-decode": 4}
    for name, one in groups.items():
        engine = one["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
        assert engine["args"].count("--pool") == 8 and "--pool-key-file" in engine["args"]
        assert ("--relay-listen" in engine["args"]) == (name == "kv-decode")
        assert engine["resources"]["limits"] == {
            "nvidia.com/gpu": "1",
            "memory": engine["resources"]["limits"]["memory"],
        }


@pytest.mark.parametrize("name", ALL)
def test_pods_have_probes_and_no_rights_that_they_do_not_need(name: str) -> None:
    found = list(pods(rendered(values_of(name))))
    assert found
    for template in found:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["automountServiceAccountToken"] is False
        secret = next(one["secret"] for one in spec["volumes"] if one["name"] == "secrets")
        assert secret["defaultMode"] == 0o440, "what Penstock takes for a file that is root's and a group's"
        for one in spec["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(one)
            assert one["securityContext"]["readOnlyRootFilesystem"] is True
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", ALL)
def test_selectors_find_the_pods_that_they_mean(name: str) -> None:
    manifests = rendered(values_of(name))
    labels = [template["metadata"]["labels"] for template in pods(manifests)]
    for one in (*of_kind(manifests, "Service"), *of_kind(manifests, "PodDisruptionBudget")):
        selector = one["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        assert sum(selector.items() <= given.items() for given in labels) == 1, one
    for one in (*of_kind(manifests, "NetworkPolicy"), *of_kind(manifests, "PodMonitor")):
        selector = one["spec"].get("podSelector", one["spec"].get("selector"))["matchLabels"]
        assert all(selector.items() <= given.items() for given in labels)


@pytest.mark.parametrize("values", [*map(values_of, ALL), {"pool": {"metricsPort": 0, "hostNetwork": False}}])
def test_flags_are_penstocks(values: Manifest) -> None:
    group = typer.main.get_command(app)
    for template in pods(rendered(values)):
        for one in template["spec"]["containers"]:
            command, *arguments = one["args"]
            known = {flag for parameter in group.load(command).params for flag in parameter.opts}  # type: ignore[attr-defined]
            ours = [flag for flag in arguments if flag.startswith("--")]
            passed_on = {"--host", "--port", "--nnodes", "--node-rank", "--master-addr", "--headless"}
            assert ours and set(ours) <= known | (passed_on if command == "vllm" else set())


def test_each_process_of_a_pool_node_has_its_ports() -> None:
    pool = {"processes": 3, "port": 7070, "metricsPort": 9464, "hostNetwork": False}
    manifests = rendered({"pool": pool, "podMonitor": {"enabled": True}})
    for one in manifests:
        validate(one)
    (node,) = (one["spec"]["containers"][0] for one in pods(of_kind(manifests, "DaemonSet")))
    assert node["args"][node["args"].index("--processes") + 1] == "3"
    ports = {one["name"]: one["containerPort"] for one in node["ports"]}
    pools = {"pool": 7070, "pool-1": 7071, "pool-2": 7072}
    metrics = {"metrics": 9464, "metrics-1": 9465, "metrics-2": 9466}
    assert ports == pools | metrics
    (service,) = (one for one in of_kind(manifests, "Service") if one["metadata"]["name"] == "kv-pool")
    assert {one["targetPort"]: one["port"] for one in service["spec"]["ports"]} == pools
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert {one["port"] for one in policy["spec"]["ingress"][1]["ports"]} == {"api", *metrics}
    (monitor,) = of_kind(manifests, "PodMonitor")
    assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} == {"api", *metrics}


def test_a_router_without_engines_is_reached_and_not_restarted() -> None:
    """Its /health says 503 until an engine has registered."""
    manifests = rendered(values_of("laptop"))
    (router,) = (one["spec"]["containers"][0] for one in pods(of_kind(manifests, "Deployment")))
    assert router["readinessProbe"]["httpGet"]["path"] == "/health"
    assert "tcpSocket" in router["livenessProbe"] and "tcpSocket" in router["startupProbe"]
    (service,) = (one for one in of_kind(manifests, "Service") if one["metadata"]["name"] == "kv-router-cluster")
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_a_group_of_several_hosts_is_vllms_alone() -> None:
    base = values_of("gpu-host")
    manifests = rendered(base | {"engines": [VLLM_GROUP]})
    for one in manifests:
        validate(one)
    leader, worker = (one["spec"]["containers"][0] for one in pods(of_kind(manifests, "LeaderWorkerSet")))
    assert "--headless" in worker["args"] and "--headless" not in leader["args"]
    assert "readinessProbe" in leader and "readinessProbe" not in worker
    with pytest.raises(helm.HelmRenderError, match="size is 2; allowed: 1 for kind penstock"):
        rendered(base | {"engines": [VLLM_GROUP | {"kind": "penstock", "role": "mixed"}]})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engines": [{"name": "x", "kind": "penstock", "role": "mixed"}]}, "pool.addresses is empty"),
        ({"engines": [{"name": "x", "kind": "penstock", "role": "both"}]}, "role is both; allowed: prefill, decode"),
        ({"router": {"enabled": False}, "engines": [{"name": "x", "kind": "penstock", "role": "mixed"}]},
         "router.enabled is false"),
        ({"pool": {"processes": "numa"}}, "pool.processes is numa; allowed: a number"),
        ({"pool": {"processes": 0}}, "pool.processes is 0; allowed: a number"),
        ({"pool": {"args": ["--processes", "2"]}}, "pool.args has --processes; allowed: pool.processes"),
        ({"pool": {"processes": 3, "port": 7070, "metricsPort": 7072}}, "allowed: 3 ports in a row for each"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(values: Manifest, said: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=said):
        rendered(values)
