"""A model laid out for streaming: a file for each layer, written once, as its decoder reads it."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from sequoia.engine.offload.block import write_block
from sequoia.engine.offload.checkpoint import Checkpoint
from sequoia.engine.weights import DecoderWeights, LayerWeights, take_weights
from sequoia.errors import FailedPrecondition

_LOG = logging.getLogger(__name__)

Encode = Callable[[LayerWeights], Mapping[str, Tensor]]


class LaidOut(NamedTuple):
    """What stays in memory, and where the layers are."""

    weights: DecoderWeights  # its `layers` are not to be read
    files: tuple[Path, ...]  # of the layers, in their order


def lay_out(
    module: PreTrainedModel,
    checkpoint: Checkpoint,
    num_positions: int,
    encode: Encode,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> LaidOut:
    """The layers of a readable module on the meta device as files in `folder`, by the first process that asks.

    One layer is in memory at a time; `on_progress` hears (layers written, layers in all). Raises FailedPrecondition
    naming `offload` where the disk does not take them.
    """
    body: Any = module.model
    checkpoint.fill(body.embed_tokens, "model.embed_tokens.")
    checkpoint.fill(body.norm, "model.norm.")
    if module.config.get_text_config().tie_word_embeddings:
        module.get_output_embeddings().weight = body.embed_tokens.weight
    else:
        checkpoint.fill(module.get_output_embeddings(), "lm_head.")
    weights = take_weights(module, num_positions)
    files = tuple(folder / f"{index:04d}.safetensors" for index in range(weights.shape.num_layers))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _LOG.info("laying the model out for offloading", extra={"folder": str(folder)})
            _write(weights, body, checkpoint, encode, folder, on_progress)
    return LaidOut(weights, files)


def _give_back() -> None:
    """What was freed: glibc keeps pieces of a layer in its heap, some hundred megabytes when all are written."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _write(
    weights: DecoderWeights,
    body: Any,
    checkpoint: Checkpoint,
    encode: Encode,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        written = Path(scratch) / "layers"
        written.mkdir()
        try:
            for index, layer in enumerate(body.layers):
                checkpoint.fill(layer, f"model.layers.{index}.")
                tensors = {name: each.contiguous() for name, each in encode(next(weights.layers)).items()}
                write_block(written / f"{index:04d}.safetensors", tensors)
                del tensors
                _give_back()
                on_progress(index + 1, len(body.layers))
        except OSError as error:
            free = shutil.disk_usage(scratch).free
            problem = f"layers cannot be written to {folder.parent}, where {free / 1e9:.1f} GB are free: {error}"
            raise FailedPrecondition(problem, "offload") from error
        os.replace(written, folder)
