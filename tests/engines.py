"""Engines over a model in a folder, as a worker builds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import load_model
from sequoia.engine.native.library import NativeUnavailable, library
from sequoia.engine.sources import resolve

CACHE_DIR = resolve("smollm2-135m").cache_dir


def _why_not_native() -> str:
    try:
        library(CACHE_DIR)
    except NativeUnavailable as error:
        return str(error)
    return ""


needs_native = pytest.mark.skipif(bool(_why_not_native()), reason=f"no native engine here: {_why_not_native()}")


def load_engine(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    engine: str = "auto",
    quantization: str = "none",
    is_draft: bool = False,
    deterministic: bool = False,
    num_slots: int = 4,
    slot_rows: int = 256,
    reads_once: bool | None = None,
) -> Engine:
    """One thread."""
    files = resolve(str(folder))
    model = load_model(files, dtype=dtype, device=device)
    arithmetic = Arithmetic(engine, quantization, is_draft, deterministic, num_threads=1)
    num_layers = model.module.config.num_hidden_layers
    decoder = build_decoder(model, arithmetic, slot_rows, files.cache_dir)
    cache = KVCache(num_layers, num_slots, slot_rows)
    return Engine(decoder, cache, model.device, model.dtype, reads_once=reads_once, vocabulary=model.vocabulary)
