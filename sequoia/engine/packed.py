"""Drafts in a small form, to be shipped: matrices in 8 bits, the tokenizer by reference to the target's."""

from __future__ import annotations

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
_LARGEST = 127
# Inputs of a row that share a scale; a row whose length is no multiple of it is one group.
_GROUP = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def is_packed(folder: Path) -> bool:
    """Whether the model in `folder` is in this form."""
    return (folder / FILE).exists()


def target_of(folder: Path) -> str:
    """The reference of the model whose tokenizer the packed one shares. Raises InvalidArgument naming `model`."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            return str((file.metadata() or {})["target"])
    except (OSError, KeyError, SafetensorError) as error:
        raise InvalidArgument(f"{folder / FILE} cannot be read: {error}", "model") from error


def pack(folder: Path, target: str) -> None:
    """Turn the dense model in `folder` into a packed one; `target` has its tokenizer."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / _WEIGHTS).items():
        tensors |= _rounded(name, weight) if weight.ndim == 2 else {name: weight}
    save_file(tensors, folder / FILE, {"target": target})
    for name in (_WEIGHTS, *_TOKENIZER_FILES):
        (folder / name).unlink(missing_ok=True)


def unpack(folder: Path, target_folder: Path, dtype: torch.dtype, into: Path) -> None:
    """The packed model in `folder` as a dense one in a new folder; that of the target gives its tokenizer."""
    stored = load_file(folder / FILE)
    into.mkdir()
    dense = {name: _restored(name, stored).to(dtype) for name in stored if not name.endswith(_SCALES)}
    save_file(dense, into / _WEIGHTS, {"format": "pt"})
    ours = [folder / name for name in ("config.json", "generation_config.json", VOCABULARY)]
    for path in filter(Path.exists, [*ours, *(target_folder / name for name in _TOKENIZER_FILES)]):
        shutil.copy(path, into)


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
