"""A model's weights as they lie on disk, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sequoia.errors import InvalidArgument

# The model's name of a tensor by its key in a file; None for one that others are made of.
Rename = Callable[[str], str | None]
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The safetensors of a folder. Tensors are mapped: of those that nobody touches nothing is in memory."""

    def __init__(self, folder: Path, dtype: torch.dtype, rename: Rename) -> None:
        self.folder, self._dtype, self._rename = folder, dtype, rename

    def fill(self, module: nn.Module, prefix: str, *, leave_out: str | None = None) -> None:
        """Give a module on the meta device its weights, which have that prefix here, but for those whose names begin
        with `leave_out`.

        Raises InvalidArgument naming `model` for weights that are not there or cannot be read.
        """
        for name, parameter in list(module.named_parameters()):
            if leave_out is not None and name.startswith(leave_out):
                continue
            owner, _, own_name = name.rpartition(".")
            tensor = self._read(f"{prefix}{name}")
            if tensor.shape != parameter.shape:
                problem = f"has {prefix}{name} of shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
                raise InvalidArgument(f"{self.folder} {problem}", "model")
            setattr(module.get_submodule(owner), own_name, nn.Parameter(tensor, requires_grad=False))

    def _read(self, name: str) -> Tensor:
        if name not in self._sources:
            raise InvalidArgument(f"{self.folder} lacks the weights {name}", "model")
        path, key = self._sources[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(key).to(self._dtype)
        except (OSError, SafetensorError) as error:
            raise InvalidArgument(f"{path} cannot be read: {error}", "model") from error

    @cached_property
    def _sources(self) -> dict[str, tuple[Path, str]]:
        """The file of every tensor of the model by name, and its key there."""
        named = ((self._rename(key), (path, key)) for key, path in self._files().items())
        return {name: source for name, source in named if name is not None}

    def _files(self) -> dict[str, Path]:
        """Of every tensor by key."""
        index = self.folder / _INDEX
        try:
            if index.exists():
                names: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return {name: self.folder / file for name, file in names.items()}
            with safe_open(self.folder / _ONE_FILE, "pt") as file:
                return dict.fromkeys(file.keys(), self.folder / _ONE_FILE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InvalidArgument(f"{self.folder} has no weights that can be read: {error}", "model") from error
