"""Decoders whose layers pass through a few buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from sequoia.engine.decoder import Decoder
from sequoia.engine.decoders import (
    BITS,
    Arithmetic,
    build_lean,
    build_transformers,
    check_engine,
    check_quantization,
    why_not_native,
)
from sequoia.engine.model import LoadedModel
from sequoia.engine.native.decoder import NativeDecoder
from sequoia.engine.native.layers import pack_layer
from sequoia.engine.native.library import library
from sequoia.engine.offload.block import Block
from sequoia.engine.offload.host import HostBlock
from sequoia.engine.offload.layout import HollowModel, OnProgress, Store, lay_out
from sequoia.engine.offload.modules import HollowModules, StreamedModules, modules_shape
from sequoia.engine.offload.stream import AnyBlock, B, BlockStream
from sequoia.engine.weights import DecoderShape, is_readable, layer_tensors, on_device
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
    stream: BlockStream[Any]


def build_offloaded(
    model: LoadedModel,
    arithmetic: Arithmetic,
    num_positions: int,
    cache_dir: Path,
    room: Room,
    *,
    tier: str = "disk",
    num_resident: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Offloaded:
    """A decoder of a hollow model, its layers on a slower tier but for those that there is `room` for.

    tier: `disk`, for a model on the CPU, or `host`, the host's memory. num_resident: layers in fast memory; None: as
    many as there is room for. `on_progress` hears (layers prepared, layers in all). Raises InvalidArgument naming
    `offload`, `engine`, `quantization`, `memory-limit` or `resident-layers` for what cannot be done, FailedPrecondition
    naming `offload` for files that cannot be written or read.
    """
    if not is_readable(model.module) or arithmetic.engine == "transformers":
        return _of_modules(model, arithmetic, cache_dir, room, tier, num_resident, on_progress)
    reason = _why_not_native(model, arithmetic, tier, cache_dir)
    if reason and arithmetic.engine not in ("auto", "lean"):
        raise InvalidArgument(f"{arithmetic.engine} cannot stream this model: {reason}; use auto", "engine")
    if reason:
        check_quantization(arithmetic, reason)
    assert model.checkpoint is not None
    hollow = HollowModel(model.module, model.checkpoint, num_positions)
    if tier == "host":
        return _from_host(model, hollow, arithmetic, room, num_resident, on_progress)
    bits = BITS[arithmetic.quantization]
    form, encode = ("plain", layer_tensors) if reason else (f"panels{bits}", partial(pack_layer, bits=bits))
    write = partial(hollow.encode, encode)
    blocks = _on_disk(hollow.num_layers, write, _folder(model, cache_dir, form), on_progress)
    stream = _stream(blocks, room(hollow.weights.shape), num_resident)
    if reason:
        return Offloaded(build_lean(model, arithmetic, hollow.weights, stream), stream)
    decoder = NativeDecoder(
        library(cache_dir),
        hollow.weights,
        bits=bits,
        activation_bits=16,
        num_threads=arithmetic.num_threads,
        stream=stream,
    )
    return Offloaded(decoder, stream)


def _of_modules(
    model: LoadedModel,
    arithmetic: Arithmetic,
    cache_dir: Path,
    room: Room,
    tier: str,
    num_resident: int | None,
    on_progress: OnProgress,
) -> Offloaded:
    """By the model's own modules, from either tier."""
    check_engine(model, arithmetic)
    if arithmetic.quantization != "none":
        problem = f"{arithmetic.quantization} needs the native engine where weights are streamed"
        raise InvalidArgument(f"{problem}; use none", "quantization")
    assert model.checkpoint is not None
    hollow = HollowModules(model.module, model.checkpoint)
    decoder = build_transformers(model, arithmetic)
    blocks: list[Any] = []
    if tier == "host":
        hollow.encode(lambda _, tensors: blocks.append(HostBlock(tensors, model.device)), on_progress)
        module: nn.Module = model.module
        module.to(model.device)
    else:
        folder = _folder(model, cache_dir, "modules")
        blocks = _on_disk(len(hollow.layers), hollow.encode, folder, on_progress)
    stream: BlockStream[Any] = _stream(blocks, room(modules_shape(model.module)), num_resident)
    return Offloaded(StreamedModules(decoder, hollow, stream), stream)


def _folder(model: LoadedModel, cache_dir: Path, form: str) -> Path:
    return cache_dir / "offload" / f"{model.revision}-{model.dtype_name}-{form}-{_VERSION}"


def _on_disk(
    num_layers: int, write: Callable[[Store, OnProgress], None], folder: Path, on_progress: OnProgress
) -> list[Block]:
    return list(map(Block, lay_out(num_layers, write, folder, on_progress)))


def _why_not_native(model: LoadedModel, arithmetic: Arithmetic, tier: str, cache_dir: Path) -> str:
    if tier == "host":
        return "from the host's memory lean reads layers only"
    return "lean was asked for" if arithmetic.engine == "lean" else why_not_native(model, cache_dir)


def _from_host(
    model: LoadedModel,
    hollow: HollowModel,
    arithmetic: Arithmetic,
    room: Room,
    num_resident: int | None,
    on_progress: OnProgress,
) -> Offloaded:
    blocks: list[HostBlock] = []
    hollow.encode(layer_tensors, lambda _, tensors: blocks.append(HostBlock(tensors, model.device)), on_progress)
    stream = _stream(blocks, room(hollow.weights.shape), num_resident)
    return Offloaded(build_lean(model, arithmetic, on_device(hollow.weights, model.device), stream), stream)


def _stream(blocks: Sequence[AnyBlock[B]], num_bytes: int, num_resident: int | None) -> BlockStream[B]:
    """With so many blocks in fast memory, or as many as that many bytes hold."""
    with ExitStack() as opened:
        for block in blocks:
            opened.callback(block.close)
        stream = BlockStream(blocks, num_resident=_resident(blocks, num_bytes, num_resident), num_buffers=NUM_BUFFERS)
        opened.pop_all()
        return stream


def _resident(blocks: Sequence[AnyBlock[B]], num_bytes: int, wanted: int | None) -> int:
    """Raises InvalidArgument naming `memory-limit` or `resident-layers` where they do not fit."""
    count, largest = len(blocks), max(block.num_bytes for block in blocks)
    fitting = min(count, num_bytes // largest)
    if fitting < min(count, NUM_BUFFERS):
        needed = NUM_BUFFERS * largest
        problem = f"it leaves {num_bytes / 2**20:.0f} MiB for layers, and streaming takes {needed / 2**20:.0f}"
        raise InvalidArgument(f"{problem}; allow more, or shorter contexts and fewer slots", "memory-limit")
    # With room for all there is nothing to stream; else some of the room is for buffers.
    most = count if fitting == count else fitting - NUM_BUFFERS
    if wanted is not None and wanted > most:
        raise InvalidArgument(f"{wanted} of {count} are more than the {most} that fit", "resident-layers")
    return most if wanted is None else wanted
