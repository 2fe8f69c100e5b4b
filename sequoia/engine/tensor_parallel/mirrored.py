"""The two places where ranks meet: what runs the layers, and the KV rows. The rest of the engine knows of no ranks."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sequoia.engine.attention import PackedBatch
from sequoia.engine.decoder import TransformersDecoder
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.tensor_parallel.ranks import Command, Ranks
from sequoia.engine.tensor_parallel.segments import from_numbers, to_numbers
from sequoia.topology import Int


class LeadingDecoder:
    """The first rank's decoder."""

    grow = None
    make_target = None
    hidden_rows = None
    logits = None

    def __init__(self, decoder: TransformersDecoder, ranks: Ranks) -> None:
        self._decoder, self._ranks = decoder, ranks
        self.name, self.rows_are_independent = decoder.name, decoder.rows_are_independent

    def attach(self, cache: KVCache) -> None:
        """Nothing: the first forward shows the shapes."""

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """The same forward in all ranks. Its logits are whole in each."""
        with self._ranks.all_do(Command.FORWARD, to_numbers(batch.segments)):
            return self._decoder.forward(batch, cache)


class LeadingCache(KVCache):
    """The first rank's rows: what changes them without a forward changes them in all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        num_layers: int,
        num_slots: int,
        slot_rows: int,
        num_session_rows: int | None = None,
        *,
        reuses: bool = True,
    ) -> None:
        super().__init__(num_layers, num_slots, slot_rows, num_session_rows, reuses=reuses)
        self._ranks = ranks

    def clear(self, start: int, end: int) -> None:
        """As ever."""
        with self._ranks.all_do(Command.CLEAR, np.array([start, end])):
            super().clear(start, end)

    def copy(self, source: int, target: int, num_rows: int) -> None:
        """As ever."""
        with self._ranks.all_do(Command.COPY, np.array([source, target, num_rows])):
            super().copy(source, target, num_rows)

    def move(self, source: list[int], target: list[int]) -> None:
        """As ever."""
        with self._ranks.all_do(Command.MOVE, np.array([source, target]).reshape(-1)):
            super().move(source, target)


def follow(ranks: Ranks, engine: Engine) -> None:
    """Any rank but the first: do what that one does until it ends. Raises Unavailable when it is gone."""
    while (received := ranks.receive()).command != Command.END:
        _do(received.command, received.numbers, engine)


def _do(command: Command, numbers: Int, engine: Engine) -> None:
    cache = engine.cache
    if command == Command.FORWARD:
        engine.forward(from_numbers(numbers, cache))
    elif command == Command.CLEAR:
        cache.clear(*numbers.tolist())
    elif command == Command.COPY:
        cache.copy(*numbers.tolist())
    else:
        source, target = numbers.reshape(2, -1).tolist()
        cache.move(source, target)
