"""The decoder in C behind the engine's interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sequoia.engine.attention import PackedBatch
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.native.dynamic import DynamicGrower
from sequoia.engine.native.growth import Grower
from sequoia.engine.native.layers import Layer, LayerForms, pack_layer
from sequoia.engine.native.panels import Linear, fits, form_of, in_huge_pages, in_memory, pack
from sequoia.engine.native.scratch import Scratch, ScratchAddresses, packed_words
from sequoia.engine.native.targets import native_rows
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.weights import DecoderShape, DecoderWeights, LayerWeights, LinearWeights, is_readable_config
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree, WholeTree

_LANES = 16
_HEADS_AT_ONCE = 4  # of the attention, at most
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # as in decoder.c


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_layers",
                "hidden",
                "intermediate",
                "heads",
                "kv_heads",
                "head_size",
                "activation",
                "num_threads",
            )
        ),
        ("pool_rows", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("epsilon", "attention_scale", "embedding_scale", "unused")),
        ("embedding", ctypes.c_void_p),
        ("output_norm", ctypes.c_void_p),
        ("head", Linear),
        ("layers", ctypes.POINTER(Layer)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_wanted", ctypes.c_int32),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "token_ids",
                "positions",
                "write_rows",
                "first_rows",
                "prefix_lens",
                "own_starts",
                "own_rows",
                "wanted",
            )
        ),
        ("most_rows", ctypes.c_int64),
    )


def can_run(shape: DecoderShape) -> bool:
    """Whether the C engine takes these sizes: whole vectors everywhere."""
    return _takes(shape.hidden, shape.intermediate, shape.num_heads, shape.head_size)


def can_run_config(config: PreTrainedConfig) -> bool:
    """Whether it is likely to run a model that is not loaded yet."""
    text = config.get_text_config()
    if not is_readable_config(config):
        return False
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return _takes(text.hidden_size, text.intermediate_size, text.num_attention_heads, head_size)


def _takes(hidden: int, intermediate: int, num_heads: int, head_size: int) -> bool:
    inputs = (hidden, intermediate, num_heads * head_size)
    return all(map(fits, inputs)) and head_size in range(_LANES, 257, _LANES)


class NativeDecoder:
    """One C call a forward. A token's logits are the same bits whatever else is in the forward.

    `bits` of the weights: 16 (bfloat16), 8 or 4; with 8 and 4 inputs are integers of `activation_bits` (16 or 8). With
    a `stream` its blocks are the layers, `pack_layer` of each, and a forward is a call for each of them, unless all are
    in memory.
    """

    name = "native"
    rows_are_independent = True

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: DecoderWeights,
        *,
        bits: int,
        activation_bits: int,
        num_threads: int,
        stream: BlockStream[Any] | None = None,
    ) -> None:
        self._run_layers, self._run_head = library.sequoia_layers, library.sequoia_head
        self.shape, self._num_threads = weights.shape, num_threads
        self._memory: list[object] = []
        self._bits, self._activation_bits, self._is_in_files = bits, activation_bits, stream is not None
        self._stream = None if stream is None or stream.is_resident else stream
        self._forms = LayerForms(weights.shape, bits, activation_bits)
        self._layers = (Layer * weights.shape.num_layers)()
        for layer, kind in zip(self._layers, weights.kinds, strict=True):
            layer.rotations, layer.window = self._address(weights.rotations[kind.rotation]), kind.window or 0
        if self._stream is None:
            residents = stream.blocks() if stream else map(self._packed, weights.layers)
            for layer, tensors in zip(self._layers, residents, strict=True):
                self._keep(tensors.values())
                self._forms.point(layer, tensors)
        self._model = self._describe(weights)
        self._vocab_size = weights.head.weight.shape[0]
        self._scratch, self._grower = Scratch(), Grower(library, self._vocab_size)
        self._dynamic_grower = DynamicGrower(library, self._vocab_size)
        self.grow = self._grow if self._stream is None else None
        self.make_target = native_rows(library)

    def attach(self, cache: KVCache) -> None:
        """Allocate the cache's rows and read and write them from now on."""
        shape = self.shape
        cache.allocate(shape.num_kv_heads, shape.head_size, torch.bfloat16, torch.device("cpu"))
        for layer, (keys, values) in zip(self._layers, cache.rows, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._model.pool_rows = cache.num_rows

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the logits asked for, (wanted tokens, padded vocabulary) float32."""
        logits = torch.empty(len(batch.logit_tokens), self._vocab_size)
        self._run(batch, logits)
        return logits

    def hidden_rows(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the tokens whose logits are asked for behind the last layer, float32."""
        self._run(batch, None)
        rows = self._scratch.residual(batch.num_tokens, self.shape.hidden)
        return rows.index_select(0, batch.logit_tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of tokens behind the last layer, (tokens, hidden) -> (tokens, padded vocabulary) float32."""
        hidden = hidden.contiguous()
        logits, scratch = torch.empty(len(hidden), self._vocab_size), self._room(len(hidden), 0)
        self._run_head(
            ctypes.byref(self._model),
            ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_int32(len(hidden)),
            ctypes.byref(scratch),
            ctypes.c_void_p(logits.data_ptr()),
        )
        return logits

    def _run(self, batch: PackedBatch, logits: Tensor | None) -> None:
        """All layers, and logits where there is room for them."""
        seen = batch.seen_rows
        arrays = (
            batch.token_ids[0].numpy(),
            batch.positions[0].numpy(),
            batch.write_rows.numpy(),
            seen.first_rows,
            seen.prefix_lens,
            seen.own_starts,
            seen.own_rows,
            batch.logit_tokens.numpy(),
        )
        num_tokens, num_wanted = len(arrays[0]), len(arrays[-1])
        most_rows = int((seen.prefix_lens + np.diff(seen.own_starts)).max())
        wire = _Batch(num_tokens, num_wanted, *(array.ctypes.data for array in arrays), most_rows)
        scratch = self._room(num_tokens, most_rows)
        for first, end in self._parts():
            self._run_layers(
                ctypes.byref(self._model),
                ctypes.byref(wire),
                ctypes.byref(scratch),
                ctypes.c_int32(first),
                ctypes.c_int32(end),
                None if logits is None else ctypes.c_void_p(logits.data_ptr()),
            )

    def _parts(self) -> Iterator[tuple[int, int]]:
        """The layers of a forward, from the first up to the end, as far as they are in memory at a time."""
        if self._stream is None:
            yield 0, self.shape.num_layers
            return
        for index, tensors in enumerate(self._stream.blocks()):
            self._forms.point(self._layers[index], tensors)
            yield index, index + 1

    def _grow(self, wanted: AnyWholeTree, cache: KVCache) -> AnyGrownTree:
        """One C call for all levels; rows and rankings are those of as many forwards."""
        scratch = self._room(wanted.most_nodes, wanted.slot.length + wanted.num_levels)
        if isinstance(wanted, WholeTree):
            return self._grower(self._model, scratch, wanted)
        return self._dynamic_grower(self._model, scratch, wanted)

    def _room(self, num_tokens: int, most_rows: int) -> ScratchAddresses:
        return self._scratch.room(
            residual=num_tokens * self.shape.hidden,
            wide=num_tokens * self._forms.widest,
            narrow=num_tokens * self._forms.longest,
            scores=self._num_threads * _HEADS_AT_ONCE * (most_rows + _LANES),
            packed=packed_words(num_tokens, self._forms.longest),
            input_scales=num_tokens * self._forms.longest // 32,
            input_sums=num_tokens * self._forms.longest // 16,
            taken=(4 * self.shape.num_layers + 1) * self._num_threads,
        )

    def _packed(self, layer: LayerWeights) -> Mapping[str, Tensor]:
        """Its tensors, in memory for good: what every forward reads in huge pages."""
        packed = pack_layer(layer, self._bits)
        return {name: in_huge_pages(each) if each.ndim > 1 else each for name, each in packed.items()}

    def _describe(self, weights: DecoderWeights) -> _Model:
        shape = weights.shape
        return _Model(
            shape.num_layers,
            shape.hidden,
            shape.intermediate,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_size,
            _ACTIVATIONS[shape.activation],
            self._num_threads,
            0,
            shape.epsilon,
            shape.attention_scale,
            shape.embedding_scale,
            0.0,
            self._address(self._embedding(weights.embedding.detach().bfloat16())),
            self._address(weights.output_norm),
            self._head(weights.head),
            ctypes.cast(self._layers, ctypes.POINTER(Layer)),
        )

    def _embedding(self, rows: Tensor) -> Tensor:
        """Few rows of it are read: those of a model whose layers are in files stay where they are, on disk."""
        return rows if self._is_in_files else in_huge_pages(rows)

    def _head(self, weights: LinearWeights) -> Linear:
        panels = in_memory(pack(weights, self._bits))
        self._keep(panels)
        return form_of(weights, self._bits).describe(panels, self._activation_bits)

    def _address(self, tensor: Tensor | None) -> int | None:
        self._keep([tensor])
        return None if tensor is None else tensor.data_ptr()

    def _keep(self, memory: Iterable[Any]) -> None:
        self._memory += memory
