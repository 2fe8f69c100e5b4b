"""The manifests: valid by Kubernetes' own schemas, and true about the processes that they start."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import Resource, UnknownField, merge, pods, render
from manifests import (
    JOBS,
    OVERLAYS,
    VARIANTS,
    WORKLOADS,
    Process,
    laid_out,
    named,
    pod_labels,
    processes,
    rendered,
    selected,
)
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from coordinator.discovery import LOOKUP_SECONDS, parse_places
from sequoia import health, rpc
from sequoia.cli.redis import _find_binary
from sequoia.v1 import coordinator_pb2, draft_pb2, verify_pb2

KUBERNETES = "1.37"
GRPC_SERVICES = {
    each.full_name
    for module in (coordinator_pb2, draft_pb2, verify_pb2)
    for each in module.DESCRIPTOR.services_by_name.values()
}
_TEXT = {"type": "string"}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_SECRET_KEY = {
    "type": "object",
    "required": ["name", "key"],
    "properties": {"name": _TEXT, "key": _TEXT},
    "additionalProperties": False,
}
_SECRET_OF_TLS = {"type": "object", "properties": {"secret": _SECRET_KEY}, "additionalProperties": False}
# Of the Prometheus operator's own schemas as much as we use: a field that is not here is one that nobody has looked up.
OPERATOR_SPECS: dict[str, dict[str, Any]] = {
    "ServiceMonitor": {
        "required": ["selector", "endpoints"],
        "properties": {
            "selector": {"properties": {"matchLabels": _LABELS}, "additionalProperties": False},
            "endpoints": {
                "items": {
                    "required": ["port"],
                    "properties": {
                        **dict.fromkeys(("port", "path", "interval", "scrapeTimeout"), _TEXT),
                        "scheme": {"enum": ["http", "https"]},
                        "tlsConfig": {
                            "properties": {
                                "serverName": _TEXT,
                                **dict.fromkeys(("ca", "cert"), _SECRET_OF_TLS),
                                "keySecret": _SECRET_KEY,
                            },
                            "additionalProperties": False,
                        },
                    },
                    "additionalProperties": False,
                }
            },
        },
        "additionalProperties": False,
    },
    "PrometheusRule": {
        "required": ["groups"],
        "properties": {
            "groups": {
                "items": {
                    "required": ["name", "rules"],
                    "properties": {
                        "name": {"type": "string"},
                        "rules": {
                            "items": {
                                "required": ["alert", "expr", "for", "labels", "annotations"],
                                "properties": {
                                    **dict.fromkeys(("alert", "expr", "for"), _TEXT),
                                    **dict.fromkeys(("labels", "annotations"), _LABELS),
                                },
                                "additionalProperties": False,
                            }
                        },
                    },
                    "additionalProperties": False,
                }
            }
        },
        "additionalProperties": False,
    },
}


@pytest.fixture(params=("../base", *OVERLAYS, *VARIANTS))
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return rendered(request.param)


def workloads(resources: list[Resource]) -> list[Resource]:
    return [each for each in resources if each["kind"] in WORKLOADS]


def pods_of(resource: Resource) -> dict[str, Any]:
    [pod] = pods(resource)
    return pod


def containers(resources: list[Resource]) -> list[dict[str, Any]]:
    return [each for resource in workloads(resources) for each in pods_of(resource)["containers"]]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
@pytest.mark.parametrize("variant", [*OVERLAYS, *VARIANTS])
def test_kustomize_itself_makes_the_same_of_an_overlay(variant: str, tmp_path: Path) -> None:
    made = "---\n".join(
        subprocess.run(["kubectl", "kustomize", each], capture_output=True, text=True, check=True, timeout=60).stdout
        for each in laid_out(variant, tmp_path)
    )
    assert _by_name(rendered(variant)) == _by_name(list(yaml.safe_load_all(made)))


def _by_name(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
    found = {(each["kind"], each["metadata"]["name"]): each for each in resources}
    assert len(found) == len(resources)
    return found


def test_what_is_no_kustomize_field_is_refused(tmp_path: Path) -> None:
    said = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namePrefixes": "a-"}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(UnknownField, match="namePrefixes"):
        render(tmp_path)


def test_a_patch_that_meets_nothing_is_refused(tmp_path: Path) -> None:
    said = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["a.yaml"],
        "patches": [{"path": "b.yaml"}],
    }
    for name, resource in (("a", "here"), ("b", "nowhere")):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": resource}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(body))
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(UnknownField, match="nowhere"):
        render(tmp_path)


def test_a_patch_with_a_target_meets_what_is_there_and_may_meet_nothing(tmp_path: Path) -> None:
    said = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["a.yaml"],
        "patches": [{"path": "b.yaml", "target": {"kind": "ConfigMap", "name": name}} for name in ("here", "nowhere")],
    }
    for name, body in (("a", {"x": "1"}), ("b", {"y": "2"})):
        resource = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "here"}, "data": body}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(resource))
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(said))
    assert render(tmp_path)[0]["data"] == {"x": "1", "y": "2"}


def test_a_merge_goes_into_named_lists_and_takes_away_what_is_null() -> None:
    base = {"containers": [{"name": "a", "args": ["x", "y"], "image": "i"}], "replicas": 2}
    patch = {"containers": [{"name": "a", "args": ["z"]}], "replicas": None}
    assert merge(base, patch) == {"containers": [{"name": "a", "args": ["z"], "image": "i"}]}


def test_every_resource_is_valid_strictly(resources: list[Resource]) -> None:
    for each in resources:
        if each["apiVersion"].startswith("monitoring.coreos.com/"):
            assert each["apiVersion"] == "monitoring.coreos.com/v1"
            jsonschema.validate(each["spec"], OPERATOR_SPECS[each["kind"]])
        else:
            assert kubernetes_validate.validate(each, KUBERNETES, strict=True) == KUBERNETES


def test_names_are_unique_and_all_is_in_one_namespace(resources: list[Resource]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in resources]
    assert len(set(names)) == len(names)
    assert {each["metadata"].get("namespace") for each in resources if each["kind"] != "Namespace"} == {"sequoia"}
    assert list(named(resources, "Namespace")) == ["sequoia"]


def test_every_flag_and_variable_is_one_that_the_process_takes(resources: list[Resource]) -> None:
    found = list(processes(resources))
    assert {each.module or each.command[0] for each in found} == {
        "verify_worker.server",
        "draft_worker.server",
        "coordinator.server",
        "coordinator.gateway",
        "sequoia",
    }
    for each in found:
        each.check_plain_text()
    [planner] = [each for each in found if each.name == "planner"]
    assert planner.parsed_command().temperature == [0.0, 0.6, 1.0]


def test_what_listens_is_reached_at_the_port_that_it_listens_on(resources: list[Resource]) -> None:
    by_name = {each["name"]: each for each in containers(resources) if each["image"].startswith("sequoia-")}
    for process in processes(resources):
        if not process.module:
            assert "ports" not in by_name[process.name]
            continue
        settings, ports = process.settings(), {each["name"]: each["containerPort"] for each in _ports(by_name, process)}
        host, _, port = settings.listen.rpartition(":")
        assert host == "0.0.0.0", "a probe comes to the pod's own address"
        assert int(port) == ports.get("grpc", ports.get("http"))
        assert getattr(settings, "metrics_port", 0) == ports.get("metrics", 0)


def _ports(by_name: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = by_name[process.name]["ports"]
    return ports


def test_every_probe_asks_a_port_and_a_service_that_are_there(resources: list[Resource]) -> None:
    for container in containers(resources):
        ports = {value for each in container.get("ports", ()) for value in (each["name"], each["containerPort"])}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            for asked in (probe.get(how) for how in ("grpc", "httpGet", "tcpSocket")):
                assert asked is None or asked["port"] in ports
            service = probe.get("grpc", {}).get("service")
            assert service is None or service in GRPC_SERVICES
            command = probe.get("exec", {}).get("command", [])
            if command and container["name"] != "redis":
                assert command[:3] == ["python", "-m", "sequoia.health"]
                assert int(command[3].removeprefix("localhost:")) in ports
                assert probe["timeoutSeconds"] > health._TIMEOUT_SECONDS


def test_what_serves_has_all_three_probes_and_loading_has_its_time(resources: list[Resource]) -> None:
    for resource in workloads(resources):
        if resource["kind"] in JOBS:
            continue
        for container in pods_of(resource)["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    by_name = {each["name"]: each for each in containers(resources)}
    load, wait = (_seconds(by_name[name]["startupProbe"]) for name in ("worker", "coordinator"))
    assert load >= 1800
    [coordinator] = [each for each in processes(resources) if each.name == "coordinator"]
    assert coordinator.settings().start_timeout_seconds < wait, "it says by itself what it waits for in vain"


def _seconds(probe: dict[str, int]) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def test_every_address_is_that_of_a_service_and_leads_to_a_port(resources: list[Resource]) -> None:
    services = named(resources, "Service")
    for service in services.values():
        [workload] = selected(service["spec"]["selector"], resources)
        ports = {each["name"] for container in pods_of(workload)["containers"] for each in container["ports"]}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= ports
    for process in processes(resources):
        for host, port in process.addresses:
            assert port in {each["port"] for each in services[host]["spec"]["ports"]}, (process.name, host)


def test_workers_behind_a_name_have_a_record_each(resources: list[Resource]) -> None:
    services = named(resources, "Service")
    [coordinator] = [each for each in processes(resources) if each.name == "coordinator"]
    for host in (coordinator.settings().verify, coordinator.settings().draft):
        [name] = parse_places(host).names
        assert services[name.host]["spec"]["clusterIP"] == "None"
        # With both families there would be two members for each pod.
        assert services[name.host]["spec"]["ipFamilyPolicy"] == "SingleStack"
        assert not services[name.host]["spec"].get("publishNotReadyAddresses")


def policies(resources: list[Resource], workload: Resource, direction: str) -> Iterator[dict[str, Any]]:
    """The rules for a workload's pods."""
    for policy in named(resources, "NetworkPolicy").values():
        spec = policy["spec"]
        if workload in selected(spec["podSelector"], resources):
            yield from spec.get(direction, ())


def lets_through(rules: Iterator[dict[str, Any]], side: str, other: Resource, port: int) -> bool:
    return any(
        port in {each["port"] for each in rule.get("ports", ())}
        and any(
            peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= pod_labels(other).items()
            for peer in rule.get(side, ())
        )
        for rule in rules
    )


def test_nobody_may_speak_but_those_who_are_told_of_each_other(resources: list[Resource]) -> None:
    default = named(resources, "NetworkPolicy")["sequoia-default-deny"]["spec"]
    assert (default["podSelector"], set(default["policyTypes"])) == ({}, {"Ingress", "Egress"})
    told = {
        (_workload_of(process, resources), host, port)
        for process in processes(resources)
        for host, port in process.addresses
    }
    by_name = {each["metadata"]["name"]: each for each in workloads(resources)}
    for name, host, port in told:
        assert lets_through(policies(resources, by_name[name], "egress"), "to", by_name[host], port), (name, host)
        assert lets_through(policies(resources, by_name[host], "ingress"), "from", by_name[name], port), (name, host)
    for name in by_name:
        for host in by_name:
            ports = {each["containerPort"] for each in pods_of(by_name[host])["containers"][0].get("ports", ())}
            for port in ports:
                may = lets_through(policies(resources, by_name[name], "egress"), "to", by_name[host], port)
                assert may == ((name, host, port) in told), f"{name} to {host}:{port}"


def _workload_of(process: Process, resources: list[Resource]) -> str:
    found = (
        each["metadata"]["name"]
        for each in workloads(resources)
        if tuple(pods_of(each)["containers"][0]["command"]) == process.command[: 3 if process.module else 2]
    )
    return next(found)


def test_whatever_selects_pods_selects_some(resources: list[Resource]) -> None:
    for policy in named(resources, "NetworkPolicy").values():
        assert selected(policy["spec"]["podSelector"], resources)
    for workload in workloads(resources):
        spec, pod = workload["spec"], pods_of(workload)
        if "selector" in spec:
            assert selected(spec["selector"], resources) == [workload]
        for each in pod.get("topologySpreadConstraints", ()):
            assert selected(each["labelSelector"], resources) == [workload]
        for term in _affinity_terms(pod):
            assert [each["metadata"]["name"] for each in selected(term["labelSelector"], resources)] == [
                "sequoia-verify"
            ]


def _affinity_terms(pod: dict[str, Any]) -> list[dict[str, Any]]:
    affinity = pod.get("affinity", {}).get("podAffinity", {})
    preferred = [
        each["podAffinityTerm"] for each in affinity.get("preferredDuringSchedulingIgnoredDuringExecution", ())
    ]
    return [*preferred, *affinity.get("requiredDuringSchedulingIgnoredDuringExecution", ())]


def test_drafts_and_coordinators_are_drawn_to_the_verify_workers(resources: list[Resource]) -> None:
    for name in ("sequoia-draft", "sequoia-coordinator"):
        terms = _affinity_terms(pods_of(named(resources, "Deployment")[name]))
        assert "topology.kubernetes.io/zone" in {each["topologyKey"] for each in terms}


def test_every_workload_that_serves_may_be_disrupted_one_pod_at_a_time(resources: list[Resource]) -> None:
    budgets = named(resources, "PodDisruptionBudget").values()
    covered = [
        each["metadata"]["name"] for budget in budgets for each in selected(budget["spec"]["selector"], resources)
    ]
    assert sorted(covered) == sorted(
        each["metadata"]["name"] for each in workloads(resources) if each["kind"] not in JOBS
    )
    assert {budget["spec"]["maxUnavailable"] for budget in budgets} == {1}


def test_every_pod_is_restricted(resources: list[Resource]) -> None:
    for workload in workloads(resources):
        pod = pods_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "SEQUOIA_REDIS_PORT of a Service would pass for a setting"
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod)
        assert all("hostPath" not in each for each in pod.get("volumes", ()))
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_container_asks_for_what_it_may_have(resources: list[Resource]) -> None:
    for container in containers(resources):
        for group in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][group])
        if container["name"] == "worker":
            requests, limits = (container["resources"][group] for group in ("requests", "limits"))
            assert requests["memory"] == limits["memory"]
            assert requests["cpu"] == limits["cpu"], "its threads are as many as it has cores"
            assert requests["cpu"].isdigit()


def test_threads_are_those_of_the_container_and_not_of_the_machine(resources: list[Resource]) -> None:
    for process in processes(resources):
        if process.name == "worker":
            assert process.environment["SEQUOIA_NUM_THREADS"] == process.environment["OMP_NUM_THREADS"] != ""
            assert process.settings().num_threads >= 1


def test_secrets_are_referred_to_and_never_written(resources: list[Resource]) -> None:
    assert not named(resources, "Secret")
    for container in containers(resources):
        for each in container.get("env", ()):
            is_secret = any(word in each["name"] for word in ("PASSWORD", "TOKEN", "SECRET", "KEY"))
            is_secret &= each["name"] not in ("SEQUOIA_TLS_KEY", "SEQUOIA_TOKEN_FILE")
            assert is_secret == ("secretKeyRef" in each.get("valueFrom", {})), each["name"]
    for process in processes(resources):
        if process.redis:
            assert re.match(r"rediss?://:a-secret@sequoia-redis:6379/0(\?|$)", process.redis)
    assert not any("a-secret" in word for process in processes(resources) for word in process.command)
    [gateway] = [each for each in processes(resources) if each.name == "gateway"]
    pod = pods_of(named(resources, "Deployment")["sequoia-gateway"])
    [mount] = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "api-keys"]
    assert gateway.settings().api_keys.startswith(f"{mount['mountPath']}/")
    [volume] = [each for each in pod["volumes"] if each["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "sequoia-api-keys"


def test_what_is_mounted_is_there_and_what_is_written_is_mounted(resources: list[Resource]) -> None:
    for workload in workloads(resources):
        pod = pods_of(workload)
        volumes = {each["name"] for each in pod.get("volumes", ())}
        volumes |= {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
        mounted = {each["name"] for container in pod["containers"] for each in container.get("volumeMounts", ())}
        assert mounted == volumes
    for process in processes(resources):
        if process.name == "worker":
            assert process.settings().cache_dir == "/cache"


def test_a_pod_ends_after_the_coordinators_have_drained_it(resources: list[Resource]) -> None:
    for name, workload in named(resources, "Deployment").items():
        pod = pods_of(workload)
        [container] = pod["containers"]
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = 25 if name == "sequoia-gateway" else rpc._GRACE_SECONDS
        assert pod["terminationGracePeriodSeconds"] > sleep + grace
        if container["name"] == "worker":
            assert sleep > 2 * LOOKUP_SECONDS + 5, "what a DNS keeps, and one lookup that was too early"


def test_what_scales_by_itself_is_there_and_has_no_number_of_its_own() -> None:
    for overlay in ("gpu", "multi-gpu"):
        resources = rendered(overlay)
        scalers = named(resources, "HorizontalPodAutoscaler")
        assert set(scalers) == {"sequoia-verify", "sequoia-draft", "sequoia-coordinator"}
        for scaler in scalers.values():
            target = named(resources, "Deployment")[scaler["spec"]["scaleTargetRef"]["name"]]
            assert "replicas" not in target["spec"]
            assert scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]


def test_gpus_are_asked_for_where_the_image_is_for_them() -> None:
    for overlay in OVERLAYS:
        for container in containers(rendered(overlay)):
            is_cuda = container["image"].startswith("sequoia-worker-cuda:")
            assert is_cuda == ("nvidia.com/gpu" in container["resources"]["limits"])
            assert is_cuda == ("--device=cuda" in container.get("args", ()))


def test_draft_and_verify_run_in_pools_of_their_own_in_one_zone() -> None:
    deployments = named(rendered("multi-gpu"), "Deployment")
    pools = [pods_of(deployments[f"sequoia-{role}"])["nodeSelector"] for role in ("verify", "draft")]
    assert pools == [{"sequoia/pool": "verify"}, {"sequoia/pool": "draft"}]
    affinity = pods_of(deployments["sequoia-draft"])["affinity"]["podAffinity"]
    assert set(affinity) == {"requiredDuringSchedulingIgnoredDuringExecution"}


def test_redis_asks_for_its_password_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """The container's own command, with the packaged server."""
    [pod] = pods(named(rendered("cpu-dev"), "StatefulSet")["sequoia-redis"])
    [container] = pod["containers"]
    (tmp_path / "valkey-server").symlink_to(_find_binary())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = (
        container["args"][0]
        .replace("/data", str(tmp_path))
        .replace("valkey-server -", f"valkey-server - --port {port}")
    )
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "REDIS_PASSWORD": "a-secret"}
    with subprocess.Popen([*container["command"], script], env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            client = Redis(port=port, password="a-secret", retry=Retry(ConstantBackoff(0.1), 100))
            assert client.ping()
            with pytest.raises(AuthenticationError):
                Redis(port=port).ping()
            server.terminate()
            assert server.wait(20) == 0
        finally:
            server.kill()
