"""The images: what is in them, who they run as; and the same system by docker compose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import Resource, pods, render
from manifests import DEPLOY, OVERLAYS, Process

ROOT = DEPLOY.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# Image and target of the Dockerfile.
IMAGES = {"sequoia-control": "control", "sequoia-worker-cpu": "worker-cpu", "sequoia-worker-cuda": "worker-cuda"}
# What the image of the control plane runs.
CONTROL_PLANE = (
    "coordinator.server",
    "coordinator.gateway.server",
    "coordinator.planner_job",
    "coordinator.planner_watch",
    "sequoia.cli.plan",
    "sequoia.cli.explain",
    "sequoia.cli.generate",
    "sequoia.health",
)


def stages() -> dict[str, list[str]]:
    """The instructions of every stage, continued lines joined, without comments."""
    text = re.sub(r"\\\n\s*", "", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(None, text.splitlines()):
        if line.startswith("FROM "):
            name = line.split()[-1]
            found[name] = []
        found.setdefault(name, []).append(line)
    return found


def history(stage: str) -> list[str]:
    """All instructions behind an image, the first first."""
    own = stages()[stage]
    parent = own[0].split()[1]
    return [*(history(parent) if parent in stages() else []), *own]


def environment(stage: str) -> dict[str, str]:
    """What an image sets."""
    words = [word for line in history(stage) if line.startswith("ENV ") for word in line.split()[1:]]
    return dict(word.split("=", 1) for word in words)


def images(resources: list[Resource]) -> set[str]:
    return {container["image"] for each in resources for pod in pods(each) for container in pod["containers"]}


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    assert program, "it comes with the dev extra"
    found = subprocess.run(
        [program, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.stdout, found.returncode) == ("", 0)


def test_yaml_is_clean() -> None:
    off = ", ".join(f"{name}: disable" for name in ("document-start", "comments"))
    rules = f"{{extends: default, rules: {{line-length: {{max: 120}}, {off}}}}}"
    command = [sys.executable, "-m", "yamllint", "--strict", "-d", rules, str(DEPLOY)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


@pytest.mark.parametrize("stage", IMAGES.values())
def test_an_image_runs_as_nobody_in_particular(stage: str) -> None:
    users = [line.split()[1] for line in history(stage) if line.startswith("USER ")]
    assert users[-1] == "10001:10001"


def test_bases_are_pinned() -> None:
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    bases = {lines[0].split()[1] for name, lines in stages().items() if name}
    assert bases <= {"${PYTHON_IMAGE}", *stages()}


def test_the_control_plane_has_no_torch_and_the_workers_have_the_one_that_is_tested() -> None:
    [tested] = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not any("torch" in line or "worker]" in line for line in history("control-builder"))
    for stage in ("worker-cpu-builder", "worker-cuda-builder"):
        assert f"ARG TORCH={tested}" in history(stage)


def test_every_package_is_copied_and_let_in() -> None:
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {line.split()[1] for line in stages()["builder"] if line.startswith("COPY ")} - {"pyproject.toml"}
    assert copied == packages
    let_in = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert let_in == packages | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_control_plane_needs_nothing_that_only_workers_have() -> None:
    """What the extra `worker` brings cannot be imported here."""
    said = PROJECT["project"]["optional-dependencies"]["worker"]
    # The tokenizers library brings the hub's too.
    absent = sorted({re.split(r"[>=<]", each)[0].replace("-", "_") for each in said} - {"huggingface_hub"})
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(CONTROL_PLANE)}"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=path, check=True, timeout=60)
    assert {"torch", "transformers"} <= set(absent)


def test_every_image_that_is_run_is_made_here_or_pinned() -> None:
    of_compose = {each["image"] for each in COMPOSE["services"].values()}
    folders = [DEPLOY / "loadtest", *(DEPLOY / "k8s" / "overlays" / overlay for overlay in OVERLAYS)]
    found = set().union(of_compose, *(images(render(folder)) for folder in folders))
    assert {each.partition(":")[0] for each in found} == {*IMAGES, "valkey/valkey"}
    for each in found:
        name, _, tag = each.partition(":")
        assert tag == PROJECT["project"]["version"] if name in IMAGES else re.fullmatch(r"\d+\.\d+\.\d+-\w+", tag)


def test_an_image_listens_where_its_health_is_asked() -> None:
    for stage in IMAGES.values():
        [health] = [line for line in history(stage) if line.startswith("HEALTHCHECK ")]
        assert health.endswith('CMD ["python", "-m", "sequoia.health"]')
        listen = environment(stage)["SEQUOIA_LISTEN"]
        exposed = {port for line in history(stage) if line.startswith("EXPOSE ") for port in line.split()[1:]}
        assert listen.rpartition(":")[2] in exposed


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"][name]
    return found


def composed(name: str) -> Process:
    said = service(name)
    variables = {
        key: re.sub(r"\$\{\w+:\?[^}]*\}", "a-secret", str(value)) for key, value in said["environment"].items()
    }
    return Process(name, tuple(said["command"]), variables)


OURS = ("verify", "draft", "coordinator", "gateway")


@pytest.mark.parametrize("name", OURS)
def test_compose_starts_our_processes_with_settings_that_they_have(name: str) -> None:
    process = composed(name)
    process.check_plain_text()
    assert service(name)["image"].partition(":")[0] in IMAGES
    assert service(name).get("build", {"target": "control"})["target"] in IMAGES.values()
    for host, port in process.addresses:
        listens = "0.0.0.0:6379" if host == "redis" else composed(host).settings().listen
        assert listens.endswith(f":{port}")


def test_compose_gives_nobody_more_than_it_needs() -> None:
    for name, said in COMPOSE["services"].items():
        assert said["read_only"] is True, name
        assert (said["cap_drop"], said["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert said["user"] == ("999:1000" if name == "redis" else "10001:10001")
        assert all(each.startswith("127.0.0.1:") for each in said.get("ports", ()))


def test_compose_has_no_secret_of_its_own() -> None:
    assert composed("coordinator").settings().redis == "redis://:a-secret@redis:6379/0"
    assert service("redis")["environment"]["REDIS_PASSWORD"].startswith("${REDIS_PASSWORD:?")
