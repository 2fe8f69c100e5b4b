"""A decoder in a few torch operations a layer: the same weights as the `transformers` modules, fused, without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from sequoia.engine.attention import PackedBatch
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.weights import DecoderWeights, LayerKind, LayerWeights, LinearWeights, layer_of

Multiply = Callable[[Tensor], Tensor]  # (rows, inputs) -> (rows, outputs)
Attention = Callable[..., tuple[Tensor, None]]  # of the `transformers` registry, see attention.py

# Query (tokens, heads, head size), pools of keys and values (kv heads, pool rows, head size), window -> like the query.
Attend = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class PlacedTokens(NamedTuple):
    """The tokens of a forward with their positions and the pool rows they are written to, (tokens,) int64 each."""

    token_ids: Tensor
    positions: Tensor
    write_rows: Tensor


class _Layer(NamedTuple):
    weights: LayerWeights
    kind: LayerKind
    qkv: Multiply
    out: Multiply
    gate_up: Multiply
    down: Multiply


class LeanDecoder:
    """Any device and dtype. `pack` makes a linear layer's product, `attention` is a function of the registry.

    With a `stream` its blocks are the layers, `layer_tensors` of each, packed again in every forward unless all are in
    memory.
    """

    name = "lean"
    grow = None
    make_target = None

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        pack: Callable[[LinearWeights], Multiply],
        attention: Attention,
        rows_are_independent: bool = False,
        stream: BlockStream[Any] | None = None,
    ) -> None:
        self.shape, self.rows_are_independent = weights.shape, rows_are_independent
        self._embedding, self._output_norm = weights.embedding.detach(), weights.output_norm
        self._rotations = weights.rotations
        self._attention: Any = attention
        self._activation = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}[weights.shape.activation]
        self._pack, self._kinds = pack, weights.kinds
        self._stream = None if stream is None or stream.is_resident else stream
        layers = map(layer_of, stream.blocks()) if stream else weights.layers
        self._resident = (
            [] if self._stream else [self._packed(*each) for each in zip(layers, weights.kinds, strict=True)]
        )
        self._head = pack(weights.head)

    def attach(self, cache: KVCache) -> None:
        """Allocate the cache's rows."""
        shape = self.shape
        cache.allocate(shape.num_kv_heads, shape.head_size, self._embedding.dtype, self._embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations between layers."""
        return self._embedding.dtype

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the logits asked for, (wanted tokens, padded vocabulary)."""
        return self.logits(self.hidden_rows(batch, cache))

    def hidden_rows(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the tokens whose logits are asked for behind the last layer."""
        tokens = PlacedTokens(batch.token_ids[0], batch.positions[0], batch.write_rows)
        return self.hidden(tokens, cache, partial(self._attend_segments, batch))[batch.logit_tokens]

    def hidden(self, tokens: PlacedTokens, cache: KVCache, attend: Attend) -> Tensor:
        """Write the tokens' rows. Returns what the last layer makes of them, (tokens, hidden)."""
        hidden = self._embedding[tokens.token_ids]
        if self.shape.embedding_scale != 1.0:
            hidden = hidden * self.shape.embedding_scale
        rotations = {kind: _of_heads(table[tokens.positions]) for kind, table in self._rotations.items()}
        for layer, rows in zip(self._layers(), cache.rows, strict=True):
            query, key, value = self._project(layer, hidden, rotations[layer.kind.rotation])
            keys, values = rows
            keys.index_copy_(1, tokens.write_rows, key.transpose(0, 1))
            values.index_copy_(1, tokens.write_rows, value.transpose(0, 1))
            attended = layer.out(attend(query, keys, values, layer.kind.window).flatten(1))
            hidden = hidden + self._normalized(attended, layer.weights.attention_output_norm)
            fed = self._feed(layer, hidden)
            hidden = hidden + self._normalized(fed, layer.weights.mlp_output_norm)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Of tokens behind the last layer, (tokens, hidden) -> (tokens, padded vocabulary)."""
        return self._head(self._normalized(hidden, self._output_norm))

    def _layers(self) -> Iterator[_Layer]:
        """One after another, in memory while it is used."""
        if self._stream is None:
            yield from self._resident
            return
        for tensors, kind in zip(self._stream.blocks(), self._kinds, strict=True):
            yield self._packed(layer_of(tensors), kind)

    def _packed(self, weights: LayerWeights, kind: LayerKind) -> _Layer:
        packed = [self._pack(linear) for linear in (weights.qkv, weights.out, weights.gate_up, weights.down)]
        # The packed copy is the only one.
        nothing = LinearWeights(torch.empty(0), None)
        return _Layer(replace(weights, qkv=nothing, out=nothing, gate_up=nothing, down=nothing), kind, *packed)

    def _project(self, layer: _Layer, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Query, key and value, (tokens, their heads, head size) each."""
        shape, weights = self.shape, layer.weights
        qkv = layer.qkv(self._normalized(hidden, weights.attention_norm)).unflatten(-1, (-1, shape.head_size))
        query, key, value = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        query = _rotated(self._normalized(query, weights.query_norm), rotation)
        return query, _rotated(self._normalized(key, weights.key_norm), rotation), value

    def _attend_segments(
        self, batch: PackedBatch, query: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        attended, _ = self._attention(
            None,
            query.transpose(0, 1)[None],
            keys,
            values,
            None,
            scaling=self.shape.attention_scale,
            packed_batch=batch,
            sliding_window=window,
        )
        return attended[0]

    def _feed(self, layer: _Layer, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._normalized(hidden, layer.weights.mlp_norm)).chunk(2, dim=-1)
        return layer.down(self._activation(gate) * up)

    def _normalized(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return hidden
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.epsilon)
        return (wide * scale * weight).to(hidden.dtype)


def _of_heads(rotations: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, 2, half) -> cosines and sines, (tokens, 1, half) each."""
    return rotations[:, None, 0], rotations[:, None, 1]


def _rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(tokens, heads, size), rotated by position."""
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = rotation
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(heads.dtype)


def linear_module(weights: LinearWeights) -> nn.Linear:
    """The weights as torch's own module."""
    outputs, inputs = weights.weight.shape
    module = nn.Linear(inputs, outputs, bias=weights.bias is not None, device="meta")
    module.weight = nn.Parameter(weights.weight, requires_grad=False)
    if weights.bias is not None:
        module.bias = nn.Parameter(weights.bias, requires_grad=False)
    return module
