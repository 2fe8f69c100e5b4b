"""Model files as `transformers` reads them: what is stored otherwise is converted once, and kept in the cache."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

from sequoia.engine import gguf, packed
from sequoia.engine.sources import ModelFiles, resolve
from sequoia.errors import InvalidArgument

_LOG = logging.getLogger(__name__)


def dense_files(files: ModelFiles, dtype: torch.dtype) -> ModelFiles:
    """The model as a folder of safetensors; where it is converted, in `dtype`, by the first process that asks.

    Raises InvalidArgument naming `model` for what cannot be read.
    """
    if files.gguf_file:
        return _made_once(files, files.revision, dtype, lambda folder: gguf.convert(files, dtype, folder))
    if packed.is_packed(files.directory):
        target = resolve(packed.target_of(files.directory), cache_dir=files.cache_dir)
        if packed.is_packed(target.directory):
            raise InvalidArgument(f"{files.directory} refers to {target.reference}, which refers to another", "model")
        theirs = dense_files(target, dtype).directory
        both = f"{files.revision}-{target.revision}"
        return _made_once(files, both, dtype, lambda folder: packed.unpack(files.directory, theirs, dtype, folder))
    return files


def _made_once(files: ModelFiles, version: str, dtype: torch.dtype, make: Callable[[Path], None]) -> ModelFiles:
    folder = files.cache_dir / "dense" / f"{version}-{str(dtype).removeprefix('torch.')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _LOG.info("converting %s to %s", files.reference, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
                make(Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return replace(files, directory=folder, gguf_file=None)
