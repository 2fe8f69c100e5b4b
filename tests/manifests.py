"""What deploy/ says, read the way that Kubernetes and our own processes read it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from kustomize import Resource, pods

from coordinator.discovery import parse_places
from coordinator.gateway.config import GatewayConfig
from coordinator.server import CoordinatorConfig
from sequoia import cli
from sequoia.config import load
from sequoia.tls import Tls, check_listen, check_peer
from sequoia.worker_config import WorkerConfig

DEPLOY = Path(__file__).parent.parent / "deploy"
OVERLAYS = ("cpu-dev", "gpu", "multi-gpu")
# Workloads: what has pods.
WORKLOADS = ("Deployment", "StatefulSet", "CronJob")
SETTINGS: dict[str, type] = {
    "verify_worker.server": WorkerConfig,
    "draft_worker.server": WorkerConfig,
    "coordinator.server": CoordinatorConfig,
    "coordinator.gateway": GatewayConfig,
}


@dataclass(frozen=True)
class Process:
    """A container of ours: what it runs, with what in its environment."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def module(self) -> str:
        """Of `python -m MODULE`; empty for a command."""
        return self.command[2] if self.command[:2] == ("python", "-m") else ""

    @property
    def arguments(self) -> list[str]:
        """Behind the module, or behind `sequoia`."""
        return list(self.command[3 if self.module else 1 :])

    def settings(self) -> Any:
        """As the process itself would fill them. SystemExit: a flag, a variable or a value is wrong."""
        assert importlib.util.find_spec(self.module), self.module
        self._check_variables({f"SEQUOIA_{name.upper()}" for name in get_type_hints(SETTINGS[self.module])})
        return load(SETTINGS[self.module], self.name, self.arguments, self.environment)

    @property
    def addresses(self) -> set[tuple[str, int]]:
        """Host and port of every server that it is told of."""
        said = vars(self.parsed_command()) if not self.module else dataclasses.asdict(self.settings())
        found: set[tuple[str, int]] = set()
        for role in ("verify", "draft"):
            found.update(parse_places(said.get(role) or "").names)
        for url in filter(None, (said.get("address"), said.get("redis") or self.environment.get("SEQUOIA_REDIS"))):
            place = url.removeprefix("dns:///").rpartition("@")[2].partition("/")[0]
            host, _, port = place.rpartition(":")
            found.add((host, int(port)))
        return found

    def check_plain_text(self) -> None:
        """Raises InvalidArgument where the process would refuse to listen there, or to ask there."""
        settings = self.settings()
        tls = Tls(settings.tls_cert, settings.tls_key, insecure=settings.insecure)
        check_listen(settings.listen, tls)
        for host, port in self.addresses:
            check_peer(f"{host}:{port}", tls)

    def parsed_command(self) -> Any:
        """Of a `sequoia plan`. SystemExit: it is wrong."""
        self._check_variables({"SEQUOIA_ADDRESS", "SEQUOIA_REDIS"})
        return cli._parser(self.arguments).parse_args(self.arguments)

    def _check_variables(self, known: set[str]) -> None:
        ours = {name for name in self.environment if name.startswith("SEQUOIA_")}
        assert ours <= known, f"{self.name} has variables that nobody reads: {ours - known}"


def processes(resources: Iterable[Resource]) -> Iterator[Process]:
    """All containers of our images."""
    found = list(resources)
    for resource in found:
        for pod in pods(resource):
            for container in pod["containers"]:
                if container["image"].startswith("sequoia-"):
                    environment = _environment(container, found)
                    words = (*container["command"], *container.get("args", ()))
                    expanded = tuple(expand(word, environment) for word in words)
                    yield Process(container["name"], expanded, environment)


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)`, which must be there: Kubernetes leaves others as they stand."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], text)


def _environment(container: Resource, resources: Iterable[Resource]) -> dict[str, str]:
    """In the order in which they stand: a variable is made of those before it."""
    environment: dict[str, str] = {}
    for each in container.get("env", ()):
        value = each["value"] if "value" in each else _referred(each["valueFrom"], container, resources)
        environment[each["name"]] = expand(value, environment)
    return environment


def _referred(said: Mapping[str, Any], container: Resource, resources: Iterable[Resource]) -> str:
    [(kind, reference)] = said.items()
    if kind == "configMapKeyRef":
        return str(named(resources, "ConfigMap")[reference["name"]]["data"][reference["key"]])
    if kind == "resourceFieldRef":
        group, name = reference["resource"].split(".")
        return str(container["resources"][group][name])
    assert kind == "secretKeyRef", kind
    return "a-secret"


def named(resources: Iterable[Resource], kind: str) -> dict[str, Resource]:
    """All of a kind, by name."""
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == kind}


def pod_labels(resource: Resource) -> dict[str, str]:
    """Of the pods that it makes."""
    spec = resource["spec"]
    template = spec.get("template") or spec["jobTemplate"]["spec"]["template"]
    labels: dict[str, str] = template["metadata"]["labels"]
    return labels


def selected(selector: Mapping[str, Any], resources: Iterable[Resource]) -> list[Resource]:
    """Workloads whose pods have these labels; `matchLabels` or bare ones."""
    wanted = selector.get("matchLabels", selector).items()
    return [each for each in resources if each["kind"] in WORKLOADS and wanted <= pod_labels(each).items()]
