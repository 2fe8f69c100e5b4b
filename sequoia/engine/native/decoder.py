"""The decoder in C behind the engine's interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.attention import PackedBatch
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.native.dynamic import DynamicGrower
from sequoia.engine.native.growth import Grower
from sequoia.engine.native.panels import Linear, fits, in_huge_pages, pack
from sequoia.engine.native.scratch import Scratch, ScratchAddresses, packed_words
from sequoia.engine.native.targets import native_rows
from sequoia.engine.weights import DecoderShape, DecoderWeights, LayerWeights, LinearWeights
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree, WholeTree

_LANES = 16
_HEADS_AT_ONCE = 4  # of the attention, as in decoder.c
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # as in decoder.c


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "attention_norm",
                "mlp_norm",
                "query_norm",
                "key_norm",
                "attention_output_norm",
                "mlp_output_norm",
                "rotations",
                "keys",
                "values",
            )
        ),
        ("window", ctypes.c_int64),
    )


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
        ("layers", ctypes.POINTER(_Layer)),
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
    inputs = (shape.hidden, shape.intermediate, shape.num_heads * shape.head_size)
    return all(map(fits, inputs)) and shape.head_size in range(_LANES, 257, _LANES)


class NativeDecoder:
    """One C call a forward. A token's logits are the same bits whatever else is in the forward.

    `bits` of the weights: 16 (bfloat16), 8 or 4; with 8 and 4 inputs are integers of `activation_bits` (16 or 8).
    """

    name = "native"
    rows_are_independent = True

    def __init__(
        self, library: ctypes.CDLL, weights: DecoderWeights, *, bits: int, activation_bits: int, num_threads: int
    ) -> None:
        self._forward, self.shape, self._num_threads = library.sequoia_forward, weights.shape, num_threads
        self._memory: list[object] = []
        self._bits, self._activation_bits = bits, activation_bits
        layers = [self._layer(layer, weights.rotations) for layer in weights.layers]
        self._layers = (_Layer * len(layers))(*layers)
        self._model = self._describe(weights)
        self._vocab_size = weights.head.weight.shape[0]
        linears = [linear for layer in layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        self._widest = max(linear.outputs for linear in linears)
        self._longest = max(linear.inputs for linear in linears)
        self._scratch, self._grower = Scratch(), Grower(library, self._vocab_size)
        self._dynamic_grower = DynamicGrower(library, self._vocab_size)
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
        logits = torch.empty(num_wanted, self._vocab_size)
        scratch = self._room(num_tokens, most_rows)
        self._forward(
            ctypes.byref(self._model), ctypes.byref(wire), ctypes.byref(scratch), ctypes.c_void_p(logits.data_ptr())
        )
        return logits

    def grow(self, wanted: AnyWholeTree, cache: KVCache) -> AnyGrownTree:
        """One C call for all levels; rows and rankings are those of as many forwards."""
        scratch = self._room(wanted.most_nodes, wanted.slot.length + wanted.num_levels)
        if isinstance(wanted, WholeTree):
            return self._grower(self._model, scratch, wanted)
        return self._dynamic_grower(self._model, scratch, wanted)

    def _room(self, num_tokens: int, most_rows: int) -> ScratchAddresses:
        return self._scratch.room(
            residual=num_tokens * self.shape.hidden,
            wide=num_tokens * self._widest,
            narrow=num_tokens * self._longest,
            scores=self._num_threads * _HEADS_AT_ONCE * (most_rows + _LANES),
            packed=packed_words(num_tokens, self._longest),
            input_scales=num_tokens * self._longest // 32,
            input_sums=num_tokens * self._longest // 16,
            taken=(4 * self.shape.num_layers + 1) * self._num_threads,
        )

    def _layer(self, layer: LayerWeights, rotations: dict[str, Tensor]) -> _Layer:
        return _Layer(
            *(self._pack(linear) for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)),
            *map(
                self._address,
                (
                    layer.attention_norm,
                    layer.mlp_norm,
                    layer.query_norm,
                    layer.key_norm,
                    layer.attention_output_norm,
                    layer.mlp_output_norm,
                    rotations[layer.rotation],
                ),
            ),
            None,
            None,
            layer.window or 0,
        )

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
            self._address(in_huge_pages(weights.embedding.detach().bfloat16())),
            self._address(weights.output_norm),
            self._pack(weights.head),
            ctypes.cast(self._layers, ctypes.POINTER(_Layer)),
        )

    def _pack(self, linear: LinearWeights) -> Linear:
        panels = pack(linear, self._bits, self._activation_bits)
        self._keep(panels.memory)
        return panels.linear

    def _address(self, tensor: Tensor | None) -> int | None:
        self._keep([tensor])
        return None if tensor is None else tensor.data_ptr()

    def _keep(self, memory: Iterable[Any]) -> None:
        self._memory += memory
