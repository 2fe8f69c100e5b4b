"""Decoders whose layers pass through a few buffers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sequoia.engine.decoder import Decoder
from sequoia.engine.decoders import BITS, Arithmetic, build_lean, check_quantization, why_not_native
from sequoia.engine.model import LoadedModel
from sequoia.engine.native.decoder import NativeDecoder
from sequoia.engine.native.layers import pack_layer
from sequoia.engine.native.library import library
from sequoia.engine.offload.block import Block
from sequoia.engine.offload.hollow import fill_buffers
from sequoia.engine.offload.layout import Encode, LaidOut, lay_out
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.weights import DecoderShape, is_readable, layer_tensors
from sequoia.errors import InvalidArgument

# Blocks that are read ahead, and the one in use.
NUM_BUFFERS = 3
# Of what is in the files: another one is written again.
_VERSION = 1

# Bytes of memory for the layers of a model of that shape.
Room = Callable[[DecoderShape], int]


class Offloaded(NamedTuple):
    """A decoder, and the stream that its layers come from."""

    decoder: Decoder
    stream: BlockStream


def build_offloaded(
    model: LoadedModel,
    arithmetic: Arithmetic,
    num_positions: int,
    cache_dir: Path,
    room: Room,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Offloaded:
    """A decoder of a hollow model, its layers on disk but for those that there is `room` for.

    `on_progress` hears (layers laid out, layers in all), when they are for the first time. Raises InvalidArgument
    naming `offload`, `engine`, `quantization` or `memory-limit` for what cannot be done, FailedPrecondition naming
    `offload` for files that cannot be written or read.
    """
    if not is_readable(model.module) or arithmetic.engine == "transformers":
        kind = model.module.config.model_type
        raise InvalidArgument(f"the modules of transformers, which run {kind} models, cannot be streamed", "offload")
    fill_buffers(model.module)
    reason = "lean was asked for" if arithmetic.engine == "lean" else why_not_native(model, cache_dir)
    if reason and arithmetic.engine not in ("auto", "lean"):
        raise InvalidArgument(f"{arithmetic.engine} cannot stream this model: {reason}; use auto", "engine")
    if reason:
        check_quantization(arithmetic, reason)
        laid = _laid_out(model, num_positions, layer_tensors, "plain", cache_dir, on_progress)
        stream = _stream(laid, room)
        return Offloaded(build_lean(model, arithmetic, laid.weights, stream), stream)
    bits = BITS[arithmetic.quantization]
    laid = _laid_out(model, num_positions, partial(pack_layer, bits=bits), f"panels{bits}", cache_dir, on_progress)
    stream = _stream(laid, room)
    decoder = NativeDecoder(
        library(cache_dir),
        laid.weights,
        bits=bits,
        activation_bits=8 if arithmetic.is_draft else 16,
        num_threads=arithmetic.num_threads,
        stream=stream,
    )
    return Offloaded(decoder, stream)


def _laid_out(
    model: LoadedModel,
    num_positions: int,
    encode: Encode,
    form: str,
    cache_dir: Path,
    on_progress: Callable[[int, int], None],
) -> LaidOut:
    assert model.checkpoint is not None
    folder = cache_dir / "offload" / f"{model.revision}-{model.dtype_name}-{form}-{_VERSION}"
    return lay_out(model.module, model.checkpoint, num_positions, encode, folder, on_progress)


def _stream(laid: LaidOut, room: Room) -> BlockStream:
    resident_bytes = room(laid.weights.shape)
    with ExitStack() as opened:
        blocks = [Block(path) for path in laid.files]
        for block in blocks:
            opened.callback(block.close)
        largest = max(block.num_bytes for block in blocks)
        fitting = min(len(blocks), resident_bytes // largest)
        # With room for all there is nothing to stream; else some of the room is for buffers.
        num_resident = fitting if fitting == len(blocks) else max(0, fitting - NUM_BUFFERS)
        if fitting < NUM_BUFFERS:
            needed = NUM_BUFFERS * largest
            problem = f"it leaves {resident_bytes / 2**20:.0f} MiB for layers, and streaming takes {needed / 2**20:.0f}"
            raise InvalidArgument(f"{problem}; allow more, or shorter contexts and fewer slots", "memory-limit")
        stream = BlockStream(blocks, num_resident=num_resident, num_buffers=NUM_BUFFERS)
        opened.pop_all()
        return stream
