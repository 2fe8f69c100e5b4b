"""A model laid out for streaming: layer by layer, as its decoder reads them; on disk a file each, written once."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from sequoia.engine.offload.block import Tensors, write_block
from sequoia.engine.offload.checkpoint import Checkpoint
from sequoia.engine.weights import LayerWeights, take_weights
from sequoia.errors import FailedPrecondition

_LOG = logging.getLogger(__name__)

Encode = Callable[[LayerWeights], Mapping[str, Tensor]]
Store = Callable[[int, Tensors], None]  # a layer's tensors, by its index
OnProgress = Callable[[int, int], None]  # (layers done, layers in all)


class HollowModel:
    """A readable module on the meta device; all but its layers comes into memory at once.

    Raises InvalidArgument naming `model` for weights that are not there or cannot be read, here and with the layers.
    """

    def __init__(self, module: PreTrainedModel, checkpoint: Checkpoint, num_positions: int) -> None:
        self._body: Any = module.model
        self._checkpoint = checkpoint
        checkpoint.fill(self._body.embed_tokens, "model.embed_tokens.")
        checkpoint.fill(self._body.norm, "model.norm.")
        if module.config.get_text_config().tie_word_embeddings:
            module.get_output_embeddings().weight = self._body.embed_tokens.weight
        else:
            checkpoint.fill(module.get_output_embeddings(), "lm_head.")
        self.weights = take_weights(module, num_positions)  # the layers of it are not to be read

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.weights.shape.num_layers

    def encode(self, encode: Encode, store: Store, on_progress: OnProgress) -> None:
        """Store one layer after another, by its index, each out of memory before the next one. Once only."""
        for index, layer in enumerate(self._body.layers):
            self._checkpoint.fill(layer, f"model.layers.{index}.")
            store(index, {name: each.contiguous() for name, each in encode(next(self.weights.layers)).items()})
            give_back()
            on_progress(index + 1, self.num_layers)


def lay_out(
    num_layers: int, encode: Callable[[Store, OnProgress], None], folder: Path, on_progress: OnProgress
) -> list[Path]:
    """A file for each layer in `folder`, written by the first process that asks with what `encode` stores.

    Raises FailedPrecondition naming `offload` where the disk does not take them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _LOG.info("laying the model out for offloading", extra={"folder": str(folder)})
            _write(encode, folder, on_progress)
    return [folder / _name(index) for index in range(num_layers)]


def give_back() -> None:
    """What was freed: glibc keeps pieces of a layer in its heap, some hundred megabytes when all are written."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _write(encode: Callable[[Store, OnProgress], None], folder: Path, on_progress: OnProgress) -> None:
    """Whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        written = Path(scratch) / "layers"
        written.mkdir()
        try:
            encode(lambda index, tensors: write_block(written / _name(index), tensors), on_progress)
        except OSError as error:
            free = shutil.disk_usage(scratch).free
            problem = f"layers cannot be written to {folder.parent}, where {free / 1e9:.1f} GB are free: {error}"
            raise FailedPrecondition(problem, "offload") from error
        os.replace(written, folder)


def _name(index: int) -> str:
    return f"{index:04d}.safetensors"
