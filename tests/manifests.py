"""What deploy/ says, read the way that Kubernetes and our own processes read it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints
from unittest.mock import patch

import yaml
from kustomize import Resource, pods, render

from coordinator.discovery import parse_places
from coordinator.gateway.config import GatewayConfig
from coordinator.server import CoordinatorConfig
from sequoia import cli
from sequoia.access import tls_of
from sequoia.cli.access_flags import ACCESS_FLAGS, access_of
from sequoia.config import load
from sequoia.redis_connection import check_redis
from sequoia.tls import Tls, check_listen, check_peer
from sequoia.worker_config import WorkerConfig

DEPLOY = Path(__file__).parent.parent / "deploy"
OVERLAYS = ("cpu-dev", "gpu", "multi-gpu")
# OVERLAY+COMPONENT+..., and the load test beside them.
SECURED = ("cpu-dev+tls", "gpu+tls", "multi-gpu+tls+clients+loadtest")
VARIANTS = (*SECURED, "cpu-dev+clients+loadtest", "cpu-dev+loadtest")
# Workloads: what has pods. Jobs serve nobody.
JOBS = ("CronJob", "Job")
WORKLOADS = ("Deployment", "StatefulSet", *JOBS)
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
        for url in filter(None, (said.get("address"), said.get("redis") or self.redis)):
            place = url.removeprefix("dns:///").rpartition("@")[2].partition("/")[0]
            host, _, port = place.rpartition(":")
            found.add((host, int(port)))
        return found

    @property
    def redis(self) -> str:
        """The URL that it is told; "" where there is none."""
        return self.environment.get("SEQUOIA_REDIS", "")

    @property
    def tls(self) -> Tls:
        """The files and the permission that it is given."""
        if self.module:
            settings = self.settings()
            return Tls(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.insecure)
        # Its token is not here.
        variables = {name: value for name, value in self.environment.items() if name != "SEQUOIA_TOKEN_FILE"}
        with patch.dict(os.environ, variables, clear=True):
            return tls_of(access_of(self.parsed_command()))

    def check_plain_text(self) -> None:
        """Raises InvalidArgument where the process would refuse to listen there, or to ask there."""
        tls = self.tls
        if self.module and not tls.cert:
            check_listen(self.settings().listen, tls)
        if self.redis:
            check_redis(self.redis, tls)
        for host, port in self.addresses if not tls.ca else ():
            check_peer(f"{host}:{port}", tls)

    def parsed_command(self) -> Any:
        """Of a `sequoia plan` or `sequoia loadtest`. SystemExit: it is wrong."""
        known = {f"SEQUOIA_{name.upper()}" for name in ACCESS_FLAGS}
        self._check_variables(known | ({"SEQUOIA_ADDRESS", "SEQUOIA_REDIS"} if self.arguments[0] == "plan" else set()))
        return cli._parser(self.arguments).parse_args(self.arguments)

    def _check_variables(self, known: set[str]) -> None:
        ours = {name for name in self.environment if name.startswith("SEQUOIA_")}
        assert ours <= known, f"{self.name} has variables that nobody reads: {ours - known}"


@cache
def rendered(variant: str) -> list[Resource]:
    """The resources of OVERLAY+COMPONENT+...; of the load test beside it where `loadtest` is among them."""
    with TemporaryDirectory() as folder:
        return [resource for each in laid_out(variant, Path(folder)) for resource in render(each)]


def laid_out(variant: str, folder: Path) -> list[Path]:
    """Folders to apply, in a copy of deploy/ in which components were added as docs/kubernetes.md tells it."""
    overlay, *added = variant.split("+")
    copied = shutil.copytree(DEPLOY, folder / "deploy")
    found, components = [copied / "k8s" / "overlays" / overlay], [each for each in added if each != "loadtest"]
    _add_components(found[0], [f"../../components/{each}" for each in components])
    if "loadtest" in added:
        found.append(copied / "loadtest")
        _add_components(found[1], components)
    return found


def _add_components(folder: Path, names: list[str]) -> None:
    path = folder / "kustomization.yaml"
    said = yaml.safe_load(path.read_text())
    said["components"] = [*said.get("components", ()), *names]
    path.write_text(yaml.safe_dump(said))


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
