"""Drafts in a small form, to be shipped: matrices in 6 bits; what is the target's, weights too, by reference to it."""

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
from sequoia.errors import InvalidArgument

FILE = "packed.safetensors"
_WEIGHTS = "model.safetensors"
_SCALES = ".scales"
_LARGEST = 31
# Inputs of a row that share a scale; a row whose length is no multiple of it is one group.
_GROUP = 64
# What reading a file of somebody else may raise.
_DAMAGES = (OSError, KeyError, IndexError, ValueError, RuntimeError, SafetensorError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def is_packed(folder: Path) -> bool:
    """Whether the model in `folder` is in this form."""
    return (folder / FILE).exists()


def can_refer_to(target_folder: Path) -> bool:
    """Whether the dense model in that folder is in one file."""
    return (target_folder / _WEIGHTS).exists()


def target_of(folder: Path) -> str:
    """The reference of the model that the packed one refers to. Raises InvalidArgument naming `model`."""
    return _metadata(folder)["target"]


def pack(folder: Path, target: str, target_folder: Path) -> None:
    """Turn the dense model in `folder` into a packed one: its tokenizer, and weights that it shares, are the target's.

    The dense target is in `target_folder`; `target` is its reference. What is the target's in the draft's dtype is
    shared: unpacked, it has the target's own.
    """
    weights, token_ids = load_file(folder / _WEIGHTS), _token_ids(folder)
    dtype = next(iter(weights.values())).dtype
    theirs = {name: each.to(dtype) for name, each in load_file(target_folder / _WEIGHTS).items()}
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, weight in weights.items():
        twin = _twin(name, weight, theirs, token_ids)
        if twin is not None:
            shared[name] = twin
            if torch.equal(weight, theirs[twin]):
                continue
            weight = weight[token_ids]
        is_rounded = weight.ndim == 2 and weight.shape[1] % 4 == 0
        stored |= _rounded(name, weight) if is_rounded else {name: weight}
    save_file(stored, folder / FILE, {"target": target, "shared": json.dumps(shared), "bits": "6"})
    for name in (_WEIGHTS, *_TOKENIZER_FILES):
        (folder / name).unlink(missing_ok=True)


def unpack(folder: Path, target_folder: Path, dtype: torch.dtype, into: Path) -> None:
    """The packed model in `folder` as a dense one in a new folder; what it shares is taken from the dense target.

    Raises InvalidArgument naming `model` for a target that is not the one it was packed with, or a damaged file.
    """
    try:
        dense = _dense(folder, load_file(target_folder / _WEIGHTS), dtype)
    except _DAMAGES as error:
        raise InvalidArgument(f"{folder} is no draft of {target_folder}, or damaged: {error!r}", "model") from error
    into.mkdir()
    save_file(dense, into / _WEIGHTS, {"format": "pt"})
    ours = [folder / name for name in ("config.json", "generation_config.json", VOCABULARY)]
    for path in filter(Path.exists, [*ours, *(target_folder / name for name in _TOKENIZER_FILES)]):
        shutil.copy(path, into)


def _dense(folder: Path, theirs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights by name; `theirs` are the target's."""
    shared: dict[str, str] = json.loads(_metadata(folder)["shared"])
    stored, token_ids = load_file(folder / FILE), _token_ids(folder)
    dense = {name: theirs[twin].to(dtype).clone() for name, twin in shared.items()}
    for name in (name for name in stored if not name.endswith(_SCALES)):
        weight = _restored(name, stored).to(dtype)
        if name in shared:
            dense[name][token_ids] = weight
        else:
            dense[name] = weight
    return dense


def _metadata(folder: Path) -> dict[str, str]:
    try:
        with safe_open(folder / FILE, "pt") as file:
            found = file.metadata() or {}
        return {name: found[name] for name in ("target", "shared", "bits")}
    except (OSError, KeyError, SafetensorError) as error:
        raise InvalidArgument(f"{folder / FILE} cannot be read: {error}", "model") from error


def _token_ids(folder: Path) -> Tensor:
    """(known,) int64; empty for a model that proposes all tokens."""
    path = folder / VOCABULARY
    return load_file(path)["token_ids"] if path.exists() else torch.empty(0, dtype=torch.int64)


def _twin(name: str, weight: Tensor, theirs: Mapping[str, Tensor], token_ids: Tensor) -> str | None:
    """The weight of the target that is the same, but for rows of `token_ids`. A tied head is the embedding."""
    is_other = torch.ones(len(weight), dtype=torch.bool)
    if len(token_ids) and len(weight) > token_ids[-1]:  # a row for every token
        is_other[token_ids] = False
    for twin in [name] if name in theirs else theirs:
        each = theirs[twin]
        if each.shape == weight.shape and torch.equal(each[is_other], weight[is_other]):
            return twin
    return None


def _rounded(name: str, weight: Tensor) -> dict[str, Tensor]:
    """(outputs, inputs) as bytes, and a scale for every group of inputs, (outputs, groups) float16."""
    num_inputs = weight.shape[1]
    groups = weight.float().unflatten(1, (-1, num_inputs if num_inputs % _GROUP else _GROUP))
    scales = (groups.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float16).tiny).half()
    values = (groups / scales.float()[..., None]).round().clamp(-_LARGEST, _LARGEST)
    return {name: _to_bytes(values.flatten(1).int() + _LARGEST), name + _SCALES: scales}


def _restored(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    weight, scales = stored[name], stored.get(name + _SCALES)
    if scales is None:
        return weight
    values = (_from_bytes(weight) - _LARGEST).unflatten(1, (scales.shape[1], -1))
    return (values.float() * scales.float()[..., None]).flatten(1)


def _to_bytes(values: Tensor) -> Tensor:
    """(rows, 4 n) int32 of 6 bits as (rows, 3 n) uint8."""
    a, b, c, d = values.unflatten(1, (-1, 4)).unbind(2)
    return (torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], 2) & 255).to(torch.uint8).flatten(1)


def _from_bytes(stored: Tensor) -> Tensor:
    """What `_to_bytes` was given."""
    a, b, c = stored.int().unflatten(1, (-1, 3)).unbind(2)
    return torch.stack([a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2], 2).flatten(1)
