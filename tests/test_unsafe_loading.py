"""Nothing of ours unpickles or runs what a file or a peer has sent, or goes past TLS: by all modules' syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sequoia", "coordinator", "draft_worker", "verify_worker")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# Modules that make objects, or run code, of bytes.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
# By the last names of what is called.
CALLS = {("torch", "load"), ("torch", "jit", "load"), ("jit", "load"), ("numpy", "load"), ("np", "load")}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"AutoModelForCausalLM", "AutoModel", "PreTrainedModel"}


def offences(source: str) -> Iterator[str]:
    """What is forbidden in a module, and in which line."""
    for node in ast.walk(ast.parse(source)):
        for what in _of(node):
            yield f"line {getattr(node, 'lineno', 0)}: {what}"


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (each.name for each in node.names if each.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".")[0]
        named = {(module, each.name) for each in node.names}
        yield from ([module] if module in MODULES else [])
        yield from (".".join(each) for each in named & CALLS)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    names = _names(node.func)
    if names in CALLS or (len(names) == 1 and names[0] in BUILTINS):
        yield ".".join(names)
    given = {each.arg: each.value for each in node.keywords if each.arg}
    for name in ("allow_pickle", "trust_remote_code"):
        if isinstance(value := given.get(name), ast.Constant) and value.value is True:
            yield f"{name}=True"
    if names[-1:] == ("from_pretrained",) and LOADERS & set(names):
        safe = given.get("use_safetensors")
        if "gguf_file" not in given and not (isinstance(safe, ast.Constant) and safe.value is True):
            yield "weights that need be neither safetensors nor GGUF"


def _names(node: ast.expr) -> tuple[str, ...]:
    """`a.b.c` as its parts; what is not so simple by its end."""
    if isinstance(node, ast.Attribute):
        return (*_names(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_makes_objects_of_bytes_that_are_code(file: Path) -> None:
    assert not list(offences(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_channels_and_servers_are_made_in_one_place_which_asks_where_they_lead(file: Path) -> None:
    makers = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    found = {name for call in calls for name in _names(call.func)[-1:]} & makers
    assert not found or file == ROOT / "sequoia" / "rpc.py"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, marshal as m",
        "from shelve import open",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "numpy.fromfile(x, allow_pickle=True)",
        "import yaml",
        "def f():\n    import cloudpickle",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(x)",
        "transformers.AutoModel.from_pretrained(x, use_safetensors=False)",
        "eval(text)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    ["json.load(file)", "tomllib.load(f)", "re.compile(x)", "model.eval()", "f(trust_remote_code=config.trust)"],
)
def test_what_is_harmless_is_not(source: str) -> None:
    assert not list(offences(source))
