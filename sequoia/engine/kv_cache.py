"""The KV cache: one preallocated pool of rows, of which every session has its own, as many as it may need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sequoia.engine.kv_memory import KVMemory, Run
from sequoia.engine.transfer import upload
from sequoia.errors import ResourceExhausted


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer: (kv heads, pool rows, head size). Allocated by the first forward."""

    def __init__(self, pool: KVCache) -> None:
        super().__init__()
        self._pool = pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate as many rows as the pool has, in the shapes and dtype the model produces."""
        keys, values = (x.new_empty((x.shape[1], self._pool.num_rows, x.shape[3])) for x in (key_states, value_states))
        self.use(keys, values)

    def use(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values in these, (kv heads, pool rows, head size) each."""
        self.keys, self.values = keys, values
        for pool in self.rows:
            pool[:, self._pool.zero_row] = 0.0
        self.is_initialized = True

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values, allocated."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the packed batch's rows, (1, kv heads, tokens, head size), and return the whole pool."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.rows
        keys.index_copy_(1, self._pool.write_rows, key_states[0])
        values.index_copy_(1, self._pool.write_rows, value_states[0])
        return keys, values

    def get_seq_length(self) -> int:
        """Unused: the lengths belong to the slots."""
        return 0

    def get_max_length(self) -> int:
        """Rows in the pool."""
        return self._pool.num_rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the model builds no mask."""
        return query_length, 0


class KVSlot:
    """One session's rows. `length` of them are valid; row r of a committed sequence is at position r.

    Once it has been left, the rows are others': a forward that was under way then still ends, and what its job makes of
    it changes nothing any more.
    """

    def __init__(self, cache: KVCache, run: Run) -> None:
        self._cache, self._run = cache, run
        self.first_row = run.start
        self.is_left = False

    @property
    def length(self) -> int:
        """Valid rows, from the first."""
        return self._run.length

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self._run.num_rows

    @property
    def is_alone(self) -> bool:
        """Whether no other session has a slot."""
        return self._cache.num_slots_used == 1

    def adopt(self) -> int:
        """Have the rows that another session has made from the same first tokens, as far as there are any.

        On the engine's thread, before anything else is done with the slot; once more does nothing. Returns how many
        rows did not have to be made.
        """
        run = self._run
        if (source := run.source) is not None and not self.is_left:
            self._cache.copy(source.start, run.start, run.num_shared)
            self._lengthen(run.num_shared)
            self._cache.memory.copied(run)
        return run.num_shared

    def made_from(self, token_ids: tuple[int, ...]) -> None:
        """Tell what the valid rows were made from: other sessions that begin like this one may have them."""
        with self._cache.memory.changing:
            self._run.tokens = token_ids

    def keep(self, rows: Sequence[int]) -> None:
        """Make `rows` (ascending, counted from `length`) the next valid ones; all others behind are dropped."""
        source = [self.length + row for row in rows]
        moved = [(s, self.length + i) for i, s in enumerate(source) if s != self.length + i]
        if moved and not self.is_left:
            self._cache.move([self.first_row + s for s, _ in moved], [self.first_row + t for _, t in moved])
        self._lengthen(len(rows))

    def pretend(self, num_rows: int) -> None:
        """Make rows of zeros the next valid ones: a context to measure behind. After the first forward only."""
        start = self.first_row + self.length
        self._cache.clear(start, start + num_rows)
        self._lengthen(num_rows)

    def truncate(self, length: int) -> None:
        """Drop all rows from `length` on."""
        with self._cache.memory.changing:
            assert 0 <= length <= self.length
            self._run.length = length

    def leave(self) -> None:
        """Its session has ended."""
        with self._cache.memory.changing:
            run, self._run, self.is_left = self._run, replace(self._run), True
        self._cache.memory.leave(run)

    def _lengthen(self, num_rows: int) -> None:
        with self._cache.memory.changing:
            self._run.length += num_rows


class KVCache(Cache):
    """The pool behind a model, for `num_slots` sessions at a time. Written by the engine thread only.

    A session has at most `slot_rows` rows; `num_session_rows` is how many all have together, None: as many as all may
    want. Slots are taken and returned on the event loop. A row is read only after it was written, so a slot needs no
    clearing between sessions; with `reuses` a session gets rows that others have made from the same first tokens.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        slot_rows: int,
        num_session_rows: int | None = None,
        *,
        reuses: bool = True,
    ) -> None:
        self.slot_rows, self.num_slots = slot_rows, num_slots
        self.num_session_rows = num_slots * slot_rows if num_session_rows is None else num_session_rows
        self.memory = KVMemory(self.num_session_rows, reuses=reuses)
        self.write_rows = torch.empty(0, dtype=torch.int64)
        self._layers = [KVLayer(self) for _ in range(num_layers)]
        self._whole: Tensor | None = None
        super().__init__(layers=[*self._layers])

    @property
    def num_rows(self) -> int:
        """Rows in the pool: those of the sessions, the scratch row and the zero row."""
        return self.num_session_rows + 2

    @property
    def scratch_row(self) -> int:
        """A row that padding is written to and nobody reads."""
        return self.num_rows - 2

    @property
    def zero_row(self) -> int:
        """A row of zeros that nobody writes: what padding reads."""
        return self.num_rows - 1

    @property
    def num_slots_used(self) -> int:
        """Sessions at this moment."""
        return self.memory.num_sessions

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, (kv heads, pool rows, head size) each. Allocated ones only."""
        return [layer.rows for layer in self._layers]

    def allocate(self, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the rows of every layer, all in one tensor: a move is one operation then, not one a layer."""
        shape = (len(self._layers), 2, num_kv_heads, self.num_rows, head_size)
        self._whole = torch.empty(shape, dtype=dtype, device=device)
        self.write_rows = torch.empty(0, dtype=torch.int64, device=device)
        for layer, (keys, values) in zip(self._layers, self._whole, strict=True):
            layer.use(keys, values)

    @contextmanager
    def slot(self, token_ids: tuple[int, ...] = (), num_rows: int | None = None) -> Iterator[KVSlot]:
        """Rows for the life of a session that begins with these tokens: `num_rows`, or as many as one may have.

        Raises ResourceExhausted when there are as many sessions as can be, or too few rows for one more.
        """
        if self.num_slots_used >= self.num_slots:
            raise ResourceExhausted(f"all {self.num_slots} KV slots are in use; try again, or raise --num-slots")
        slot = KVSlot(self, self.memory.take(self.slot_rows if num_rows is None else num_rows, token_ids))
        try:
            yield slot
        finally:
            slot.leave()

    @torch.inference_mode()
    def clear(self, start: int, end: int) -> None:
        """Fill pool rows with zeros in every layer."""
        for pool in self._pools:
            pool[..., start:end, :] = 0.0

    @torch.inference_mode()
    def copy(self, source: int, target: int, num_rows: int) -> None:
        """Copy adjoining pool rows in every layer to others."""
        for pool in self._pools:
            pool[..., target : target + num_rows, :] = pool[..., source : source + num_rows, :]

    @torch.inference_mode()
    def move(self, source: list[int], target: list[int]) -> None:
        """Copy pool rows in every layer; the source is read whole before anything is written."""
        source_rows, target_rows = upload((np.array(source), np.array(target)), self.write_rows.device)
        for pool in self._pools:
            pool.index_copy_(-2, target_rows, pool.index_select(-2, source_rows))

    @property
    def _pools(self) -> list[Tensor]:
        """All rows, each tensor (..., pool rows, head size)."""
        return [pool for rows in self.rows for pool in rows] if self._whole is None else [self._whole]
