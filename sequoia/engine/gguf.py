"""GGUF files as dense safetensors."""

from __future__ import annotations

import io
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from sequoia.engine.sources import ModelFiles
from sequoia.errors import InvalidArgument


def convert(files: ModelFiles, dtype: torch.dtype, folder: Path) -> None:
    """Write the model into a new folder, in `dtype`. Raises InvalidArgument naming `model`."""
    with _quiet_unless_terminal():
        _convert(files, dtype, folder)


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
