"""GGUF files, converted once to dense safetensors: parsing and dequantising takes far longer than loading."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from sequoia.engine.sources import ModelFiles
from sequoia.errors import InvalidArgument

_LOG = logging.getLogger(__name__)


def dense_files(files: ModelFiles, dtype: torch.dtype) -> ModelFiles:
    """The GGUF model as a folder of safetensors in `dtype`, made by the first process that asks and kept in the cache.

    Raises InvalidArgument naming `model` for a file that `transformers` cannot read.
    """
    folder = files.cache_dir / "dense" / f"{files.revision}-{str(dtype).removeprefix('torch.')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _LOG.info("converting %s to %s", files.gguf_file, folder)
            with (
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch,
                _quiet_unless_terminal(),
            ):
                _convert(files, dtype, Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return replace(files, directory=folder, gguf_file=None)


def _convert(files: ModelFiles, dtype: torch.dtype, folder: Path) -> None:
    try:
        module = AutoModelForCausalLM.from_pretrained(
            files.directory,
            gguf_file=files.gguf_file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
        )
        tokenizer = AutoTokenizer.from_pretrained(files.directory, gguf_file=files.gguf_file)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidArgument(f"{files.gguf_file} cannot be read: {error}", "model") from error
    tie_equal_head(module)
    # Else the folder would claim to be quantised still.
    module.config.__dict__.pop("quantization_config", None)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quiet_unless_terminal() -> AbstractContextManager[object]:
    """The reader's progress bar cannot be switched off, and would break up the JSON lines of the log."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def tie_equal_head(module: PreTrainedModel) -> None:
    """Tie a head that equals the embedding: some files hold a tied matrix twice."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    if head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight):
        module.config.tie_word_embeddings = True
        module.tie_weights()
