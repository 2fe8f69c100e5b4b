"""A whole token tree in one C call: what growth.c reads and writes."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.children import DRAFT_WIDTH
from sequoia.engine.sampling import COUPLED_WIDTH
from sequoia.engine.whole_tree import GrownTree, WholeTree
from sequoia.topology import Int

_KINDS = {"top": 0, "coupled": 1, "drawn": 2}  # as in ranking.h
_WIDTHS = {"top": 0, "coupled": COUPLED_WIDTH, "drawn": DRAFT_WIDTH}
_BATCH_ARRAYS = 7  # of a level's forward, as in growth.c


class _Ranker(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "width", "num_candidates", "is_cut")),
        ("vocab_size", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "least_log")),
        ("seed", ctypes.c_uint64),
    )


class _Tree(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_nodes", "num_levels")),
        *((name, ctypes.c_void_p) for name in ("parents", "ranks", "level_starts")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_valid_rows", "root_position")),
    )


class _Trie(ctypes.Structure):
    _fields_ = (
        ("num_nodes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("parents", "token_ids", "log_odds")),
        ("temperature", ctypes.c_double),
        ("standing", ctypes.c_void_p),
    )


class _Grown(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "num_tokens", "q_ids", "q_weights")),
        ("num_forwards", ctypes.c_int64),
        ("ranking_seconds", ctypes.c_double),
    )


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("logits", "batch", "own_rows", "rows", "living"))


class Grower:
    """`sequoia_grow` with the memory for a level's logits, which is used again from tree to tree."""

    def __init__(self, library: ctypes.CDLL, padded_vocab_size: int) -> None:
        self._grow, self._padded_vocab_size = library.sequoia_grow, padded_vocab_size
        self._logits = torch.empty(0)

    def __call__(self, model: ctypes.Structure, scratch: ctypes.Structure, wanted: WholeTree) -> GrownTree:
        """Write the rows of the tree's nodes. `scratch` has room for a forward of its widest level."""
        plan = _plan(wanted)
        num_nodes, num_levels = len(plan[0]), len(wanted.levels)
        token_ids, num_tokens = np.empty((num_nodes, wanted.num_ranked), np.int64), np.empty(num_nodes, np.int64)
        is_drawn = wanted.children == "drawn"
        q_shape = (num_nodes if is_drawn else 0, DRAFT_WIDTH)
        q = np.empty(q_shape, np.uint32), np.empty(q_shape, np.float32)
        grown = _Grown(*map(_address, (token_ids, num_tokens)), *map(_address, q))
        logits, numbers = self._room(max(map(len, wanted.levels))), _numbers(num_nodes, num_levels)
        trie = _trie_arrays(wanted, num_nodes)
        self._grow(
            ctypes.byref(model),
            ctypes.byref(scratch),
            ctypes.byref(_Tree(num_nodes, num_levels, *map(_address, plan), *_place(wanted))),
            ctypes.byref(ranker_for(wanted, self._padded_vocab_size)),
            None if trie is None else ctypes.byref(_trie(wanted, trie)),
            ctypes.c_void_p(None if wanted.exponentials is None else _address(wanted.exponentials)),
            ctypes.c_void_p(wanted.root_logits.data_ptr()),
            ctypes.byref(_Memory(logits.data_ptr(), *map(_address, numbers))),
            ctypes.byref(grown),
        )
        return GrownTree(token_ids, num_tokens, q if is_drawn else None, grown.num_forwards, grown.ranking_seconds)

    def _room(self, num_rows: int) -> Tensor:
        if self._logits.numel() < num_rows * self._padded_vocab_size:
            self._logits = torch.empty(num_rows * self._padded_vocab_size)
        return self._logits


def _numbers(num_nodes: int, num_levels: int) -> tuple[Int, ...]:
    """The integers of `Memory` of growth.c."""
    sizes = (_BATCH_ARRAYS * num_nodes + 1, num_nodes * num_levels, num_nodes, num_nodes)
    return tuple(np.empty(size, np.int64) for size in sizes)


def _plan(wanted: WholeTree) -> tuple[Int, Int, Int]:
    """Parents, ranks and level starts of `Tree` of growth.c."""
    nodes = [node for level in wanted.levels for node in level]
    index = {node: place for place, node in enumerate(nodes)}
    parents = [-1, *(index[wanted.topology.parents[node]] for node in nodes[1:])]
    ranks = [wanted.topology.ranks[node] for node in nodes]
    starts = np.cumsum([0, *map(len, wanted.levels)])
    return np.array(parents, np.int64), np.array(ranks, np.int64), starts.astype(np.int64)


def _trie_arrays(wanted: WholeTree, num_nodes: int) -> tuple[np.ndarray, ...] | None:
    """The arrays of `Trie` of ranking.h: parents, tokens, odds, and room for the tree's nodes."""
    trie = wanted.trie
    if trie is None:
        return None
    of_trie = np.array(trie.parents, np.int64), np.array(trie.token_ids, np.int64), np.array(trie.log_odds)
    return (*of_trie, np.empty(num_nodes, np.int64))


def _trie(wanted: WholeTree, arrays: tuple[np.ndarray, ...]) -> ctypes.Structure:
    parents, token_ids, log_odds, standing = map(_address, arrays)
    return _Trie(len(arrays[0]), parents, token_ids, log_odds, wanted.sampling.temperature or 1.0, standing)


def _place(wanted: WholeTree) -> tuple[int, int, int]:
    return wanted.slot.first_row, wanted.slot.length, wanted.slot.length - 1


def ranker_for(wanted: WholeTree, padded_vocab_size: int) -> ctypes.Structure:
    """`Ranker` of ranking.h."""
    sampling, width = wanted.sampling, _WIDTHS[wanted.children]
    return _Ranker(
        _KINDS[wanted.children],
        wanted.num_ranked,
        min(width, sampling.top_k or width),
        bool(sampling.top_k or sampling.min_p),
        min(wanted.vocab_size, padded_vocab_size),
        sampling.temperature,
        sampling.top_p,
        math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
        sampling.seed or 0,
    )


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
