"""Drafts in a small form, to be shipped: matrices in 8 bits; what is the target's, weights too, by reference to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sequoia.engine.draft_vocabulary import FILE as VOCABULARY
from sequoia.engine.draft_vocabulary import rows_of
from sequoia.errors import InvalidArgument

FILE = "packed.safetensors"
_WEIGHTS = "model.safetensors"
_SCALES = ".scales"
_LARGEST = 127
# Inputs of a row that share a scale; a row whose length is no multiple of it is one group.
_GROUP = 64
# Where a weight is: in the file, among the target's, or among them with the rows of the tokens that the draft knows.
_STORED, _WHOLE, _ROWS = "stored", "whole", "rows"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def is_packed(folder: Path) -> bool:
    """Whether the model in `folder` is in this form."""
    return (folder / FILE).exists()


def target_of(folder: Path) -> str:
    """The reference of the model that the packed one refers to. Raises InvalidArgument naming `model`."""
    return _metadata(folder)["target"]


def pack(folder: Path, target: str, target_folder: Path) -> None:
    """Turn the dense model in `folder` into a packed one: its tokenizer, and weights that it shares, are the target's.

    The dense target is in `target_folder`; `target` is its reference.
    """
    theirs, token_ids = load_file(target_folder / _WEIGHTS), _token_ids(folder)
    stored: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, weight in load_file(folder / _WEIGHTS).items():
        sources[name] = _source(weight, theirs.get(name), token_ids)
        if sources[name] == _STORED:
            stored |= _rounded(name, weight) if weight.ndim == 2 else {name: weight}
    save_file(stored, folder / FILE, {"target": target, "sources": json.dumps(sources)})
    for name in (_WEIGHTS, *_TOKENIZER_FILES):
        (folder / name).unlink(missing_ok=True)


def unpack(folder: Path, target_folder: Path, dtype: torch.dtype, into: Path) -> None:
    """The packed model in `folder` as a dense one in a new folder; what it shares is taken from the dense target.

    Raises InvalidArgument naming `model` for a target that lacks it.
    """
    sources: dict[str, str] = json.loads(_metadata(folder)["sources"])
    stored, theirs, token_ids = load_file(folder / FILE), load_file(target_folder / _WEIGHTS), _token_ids(folder)
    if missing := {name for name, source in sources.items() if source != _STORED} - set(theirs):
        raise InvalidArgument(f"{folder} is no draft of {target_folder}, which lacks {min(missing)}", "model")
    dense = {name: _restored(name, stored) if source == _STORED else theirs[name] for name, source in sources.items()}
    for name in (name for name, source in sources.items() if source == _ROWS):
        dense[name] = rows_of(dense[name], token_ids)
    into.mkdir()
    save_file({name: each.to(dtype) for name, each in dense.items()}, into / _WEIGHTS, {"format": "pt"})
    ours = [folder / name for name in ("config.json", "generation_config.json", VOCABULARY)]
    for path in filter(Path.exists, [*ours, *(target_folder / name for name in _TOKENIZER_FILES)]):
        shutil.copy(path, into)


def _metadata(folder: Path) -> dict[str, str]:
    try:
        with safe_open(folder / FILE, "pt") as file:
            found = file.metadata() or {}
        return {name: found[name] for name in ("target", "sources")}
    except (OSError, KeyError, SafetensorError) as error:
        raise InvalidArgument(f"{folder / FILE} cannot be read: {error}", "model") from error


def _token_ids(folder: Path) -> Tensor:
    """(known,) int64; empty for a model that knows all tokens."""
    path = folder / VOCABULARY
    return load_file(path)["token_ids"] if path.exists() else torch.empty(0, dtype=torch.int64)


def _source(weight: Tensor, theirs: Tensor | None, token_ids: Tensor) -> str:
    if theirs is None:
        return _STORED
    if torch.equal(weight, theirs):
        return _WHOLE
    # The row that stands for unknown tokens follows from all of the target's.
    is_table = len(weight) == len(token_ids) + 1 and weight.shape[1:] == theirs.shape[1:]
    return _ROWS if is_table and torch.equal(weight[:-1], theirs[token_ids]) else _STORED


def _rounded(name: str, weight: Tensor) -> dict[str, Tensor]:
    """(outputs, inputs) as int8 of the same shape, and (outputs, groups) float16: half-steps at the largest of each."""
    groups = weight.float().unflatten(1, (-1, _group(weight)))
    scales = (groups.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float16).tiny).half()
    values = (groups / scales.float()[..., None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return {name: values.flatten(1), name + _SCALES: scales}


def _restored(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    values, scales = stored[name], stored.get(name + _SCALES)
    if scales is None:
        return values
    return (values.unflatten(1, (-1, _group(values))).float() * scales.float()[..., None]).flatten(1)


def _group(weight: Tensor) -> int:
    num_inputs = weight.shape[1]
    return num_inputs if num_inputs % _GROUP else _GROUP
