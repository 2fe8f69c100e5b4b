"""As much of kustomize as deploy/k8s uses, for machines without it. What it does not know it refuses.

`tests/test_kubernetes.py` compares it with the real one where there is one.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

_KIND = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}
# What may be said, and within it; None: anything.
_KNOWN: dict[str, Any] = {
    **dict.fromkeys(("apiVersion", "kind", "namespace", "resources", "components")),
    "labels": dict.fromkeys(("pairs", "includeTemplates")),
    "patches": {"path": None, "target": dict.fromkeys(("kind", "name"))},
    "images": dict.fromkeys(("name", "newTag")),
    "configMapGenerator": {"name": None, "files": None, "options": dict.fromkeys(("disableNameSuffixHash", "labels"))},
}
# Lists that a strategic merge goes into, by the key that tells their elements apart; others are replaced as a whole.
_MERGE_KEYS = {
    **dict.fromkeys(("containers", "volumes", "env"), ("name",)),
    "ports": ("containerPort", "port"),  # of a container, of a Service
    "volumeMounts": ("mountPath",),
}
_CLUSTER_WIDE = ("Namespace",)


class UnknownField(ValueError):
    """A kustomization says something that is not known here."""


def render(folder: Path) -> list[Resource]:
    """The resources that `kubectl kustomize` makes of a folder."""
    return _build(folder, [])


def _build(folder: Path, resources: list[Resource]) -> list[Resource]:
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    _check(said, _KNOWN, folder)
    if _KIND.get(said["kind"]) != said["apiVersion"]:
        raise UnknownField(f"{folder}: {said['kind']} of {said['apiVersion']}")
    for name in said.get("resources", ()):
        path = folder / name
        resources += _build(path, []) if path.is_dir() else _documents(path)
    resources += [_config_map(folder, each) for each in said.get("configMapGenerator", ())]
    for name in said.get("components", ()):
        resources = _build(folder / name, resources)
    for each in said.get("patches", ()):
        for patch in _documents(folder / each["path"]):
            _apply(patch, resources, each.get("target"))
    for resource in resources:
        _transform(resource, said)
    return resources


def _check(said: Any, known: dict[str, Any], folder: Path) -> None:
    if unknown := set(said) - set(known):
        raise UnknownField(f"{folder} says {', '.join(sorted(unknown))}")
    for name in filter(known.get, said):
        for each in said[name] if isinstance(said[name], list) else [said[name]]:
            _check(each, known[name], folder)


def _documents(path: Path) -> list[Resource]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def _config_map(folder: Path, said: dict[str, Any]) -> Resource:
    options = said.get("options", {})
    if not options.get("disableNameSuffixHash"):
        raise UnknownField(f"{folder}: a name with a hash")
    labels = {"labels": dict(options["labels"])} if "labels" in options else {}
    data = {Path(name).name: (folder / name).read_text() for name in said["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": said["name"], **labels}, "data": data}


def _apply(patch: Resource, resources: list[Resource], target: dict[str, str] | None) -> None:
    """Without a target there must be the one that the patch names; with one there may be none."""
    found = [each for each in resources if _identity(each) == _identity(patch)]
    if target is not None:
        wanted = target["kind"], target["name"]
        found = [each for each in resources if (each["kind"], each["metadata"]["name"]) == wanted]
    elif len(found) != 1:
        raise UnknownField(f"a patch for {_identity(patch)} meets {len(found)} resources")
    for each in found:
        merged = merge(each, patch)
        each.clear()
        each.update(merged)


def _identity(resource: Resource) -> tuple[str, str, str]:
    return resource["apiVersion"], resource["kind"], resource["metadata"]["name"]


def merge(base: Any, patch: Any, name: str = "") -> Any:
    """A strategic merge: null takes away, lists of named things are merged by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {key: value for key, value in base.items() if patch.get(key, ...) is not None}
        for key, value in patch.items():
            if value is not None:
                merged[key] = merge(base.get(key), value, key)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and name in _MERGE_KEYS:
        [key] = [each for each in _MERGE_KEYS[name] if each in patch[0]]
        return _merge_lists(base, patch, key)
    if isinstance(patch, dict):
        return {key: merge(None, value, key) for key, value in patch.items() if value is not None}
    return deepcopy(patch)


def _merge_lists(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    """What the patch names comes first, in its order: a variable that is made of another must be named after it."""
    known, named = {each[key]: each for each in base}, [each[key] for each in patch]
    merged = [merge(known.get(each[key]), each) for each in patch]
    return merged + [each for each in base if each[key] not in named]


def _transform(resource: Resource, said: dict[str, Any]) -> None:
    metadata = resource["metadata"]
    if "namespace" in said and resource["kind"] not in _CLUSTER_WIDE:
        metadata["namespace"] = said["namespace"]
    for each in said.get("labels", ()):
        templates = _templates(resource) if each.get("includeTemplates") else []
        for place in [metadata, *templates]:
            place["labels"] = {**place.get("labels", {}), **each["pairs"]}
    tags = {each["name"]: each["newTag"] for each in said.get("images", ())}
    for container in (each for pod in pods(resource) for each in pod["containers"]):
        name = container["image"].partition(":")[0]
        if name in tags:
            container["image"] = f"{name}:{tags[name]}"


def _templates(resource: Resource) -> list[dict[str, Any]]:
    """The metadata of all that a resource makes others from."""
    spec = resource.get("spec", {})
    found = [spec[name] for name in ("template", "jobTemplate") if name in spec]
    found += [spec["jobTemplate"]["spec"]["template"]] if "jobTemplate" in spec else []
    found += spec.get("volumeClaimTemplates", [])
    return [each.setdefault("metadata", {}) for each in found]


def pods(resource: Resource) -> list[dict[str, Any]]:
    """The specification of the pods that a resource makes: one, or none."""
    spec = resource.get("spec", {})
    template = spec.get("template") or spec.get("jobTemplate", {}).get("spec", {}).get("template")
    return [template["spec"]] if isinstance(template, dict) and "spec" in template else []
