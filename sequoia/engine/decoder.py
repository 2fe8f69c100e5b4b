"""What runs the layers of a model: the engine's interface, and the modules of `transformers` behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from sequoia.engine.attention import PackedBatch
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.verification import MakeTarget
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree


class Decoder(Protocol):
    """A model's layers with their weights. Called by the engine's thread only."""

    name: str
    rows_are_independent: bool  # a token's logits are the same bits whatever else is in the forward

    def attach(self, cache: KVCache) -> None:
        """Allocate the cache's rows, in the shapes and the dtype of this model."""

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the logits asked for, (wanted tokens, padded vocabulary)."""

    @property
    def grow(self) -> Callable[[AnyWholeTree, KVCache], AnyGrownTree] | None:
        """Grows a whole tree in one call; None where only forwards can be had."""

    @property
    def hidden_rows(self) -> Callable[[PackedBatch, KVCache], Tensor] | None:
        """`forward` without the head, (wanted tokens, hidden): for `logits`, later; None where it makes all at once."""

    @property
    def logits(self) -> Callable[[Tensor], Tensor] | None:
        """The head: (tokens, hidden) -> (tokens, padded vocabulary), the same as `forward` had made."""

    @property
    def make_target(self) -> MakeTarget | None:
        """The quickest way to verify this model's logits; None where it is the engine's own."""


class TransformersDecoder:
    """The model's own modules: every architecture, at 10 ms of overhead for 30 layers."""

    name = "transformers"
    grow = None
    make_target = None
    hidden_rows = None
    logits = None

    def __init__(self, module: PreTrainedModel, *, rows_are_independent: bool = False) -> None:
        self._module, self.rows_are_independent = module, rows_are_independent

    def attach(self, cache: KVCache) -> None:
        """Nothing: the first forward shows the shapes."""

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """One call of the module."""
        cache.write_rows = batch.write_rows
        output = self._module(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=batch.logit_tokens,
            packed_batch=batch,
        )
        return output.logits[0]
