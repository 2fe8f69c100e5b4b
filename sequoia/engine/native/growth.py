"""A whole token tree in one C call: what growth.c reads and writes."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.children import DRAFT_WIDTH
from sequoia.engine.native.trie import NativeTrie
from sequoia.engine.sampling import COUPLED_WIDTH
from sequoia.engine.whole_tree import AnyWholeTree, GrownTree, WholeTree
from sequoia.topology import Int

_KINDS = {"top": 0, "coupled": 1, "drawn": 2}  # as in ranking.h
_WIDTHS = {"top": COUPLED_WIDTH, "coupled": COUPLED_WIDTH, "drawn": DRAFT_WIDTH}
BATCH_ARRAYS = 7  # of a level's forward, as in growth.c


class _Ranker(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "width", "num_candidates", "is_cut")),
        ("vocab_size", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "sharpness", "least_log")),
        ("seed", ctypes.c_uint64),
        ("token_ids", ctypes.c_void_p),
    )


class _Tree(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_nodes", "num_levels")),
        *((name, ctypes.c_void_p) for name in ("parents", "ranks", "level_starts")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_valid_rows", "root_position")),
    )


class _Grown(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "num_tokens", "q_ids", "q_weights")),
        ("num_forwards", ctypes.c_int64),
        ("ranking_seconds", ctypes.c_double),
    )


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("logits", "batch", "own_rows", "rows", "living", "standing"))


class LevelLogits:
    """Memory for a level's logits, which is used again from tree to tree."""

    def __init__(self, padded_vocab_size: int) -> None:
        self._width, self._memory = padded_vocab_size, torch.empty(0)

    def room(self, num_rows: int) -> Tensor:
        """For that many rows at least."""
        if self._memory.numel() < num_rows * self._width:
            self._memory = torch.empty(num_rows * self._width)
        return self._memory


class Grower:
    """`sequoia_grow` of one model."""

    def __init__(self, library: ctypes.CDLL, padded_vocab_size: int) -> None:
        self._grow, self._padded_vocab_size = library.sequoia_grow, padded_vocab_size
        self._logits = LevelLogits(padded_vocab_size)

    def __call__(self, model: ctypes.Structure, scratch: ctypes.Structure, wanted: WholeTree) -> GrownTree:
        """Write the rows of the tree's nodes. `scratch` has room for a forward of its widest level."""
        plan = _plan(wanted)
        num_nodes, num_levels = len(plan[0]), len(wanted.levels)
        token_ids, num_tokens = np.empty((num_nodes, wanted.num_ranked), np.int64), np.empty(num_nodes, np.int64)
        is_drawn = wanted.children == "drawn"
        q_shape = (num_nodes if is_drawn else 0, DRAFT_WIDTH)
        q = np.empty(q_shape, np.uint32), np.empty(q_shape, np.float32)
        grown = _Grown(*map(address, (token_ids, num_tokens)), *map(address, q))
        logits, numbers = self._logits.room(max(map(len, wanted.levels))), _numbers(num_nodes, num_levels)
        root_logits, trie = root_logits_of(wanted), NativeTrie.of(wanted)
        self._grow(
            ctypes.byref(model),
            ctypes.byref(scratch),
            ctypes.byref(_Tree(num_nodes, num_levels, *map(address, plan), *place(wanted))),
            ctypes.byref(ranker_for(wanted, self._padded_vocab_size)),
            None if trie is None else ctypes.byref(trie.structure),
            ctypes.c_void_p(None if wanted.exponentials is None else address(wanted.exponentials)),
            ctypes.c_void_p(root_logits.data_ptr()),
            ctypes.byref(_Memory(logits.data_ptr(), *map(address, numbers))),
            ctypes.byref(grown),
        )
        shares = None if trie is None else trie.shares
        drawn_from = q if is_drawn else None
        return GrownTree(token_ids, num_tokens, drawn_from, grown.num_forwards, grown.ranking_seconds, shares)


def _numbers(num_nodes: int, num_levels: int) -> tuple[Int, ...]:
    """The integers of `Memory` of growth.c."""
    sizes = (BATCH_ARRAYS * num_nodes + 1, num_nodes * num_levels, num_nodes, num_nodes, num_nodes)
    return tuple(np.empty(size, np.int64) for size in sizes)


def _plan(wanted: WholeTree) -> tuple[Int, Int, Int]:
    """Parents, ranks and level starts of `Tree` of growth.c."""
    nodes = [node for level in wanted.levels for node in level]
    index = {node: place for place, node in enumerate(nodes)}
    parents = [-1, *(index[wanted.topology.parents[node]] for node in nodes[1:])]
    ranks = [wanted.topology.ranks[node] for node in nodes]
    starts = np.cumsum([0, *map(len, wanted.levels)])
    return np.array(parents, np.int64), np.array(ranks, np.int64), starts.astype(np.int64)


def place(wanted: AnyWholeTree) -> tuple[int, int, int]:
    """The slot's first row, its number of valid ones, and the root's position."""
    return wanted.slot.first_row, wanted.slot.length, wanted.slot.length - 1


def root_logits_of(wanted: AnyWholeTree) -> Tensor:
    """As the model's own rows have them, contiguous."""
    vocabulary = wanted.vocabulary
    return wanted.root_logits if vocabulary is None else wanted.root_logits[:, vocabulary.token_ids]


def _choosable(wanted: AnyWholeTree, padded_vocab_size: int) -> tuple[int, int | None]:
    """How many of the model's first rows are tokens that may be chosen, and where their ids are."""
    vocabulary = wanted.vocabulary
    if vocabulary is None:
        return min(wanted.vocab_size, padded_vocab_size), None
    return vocabulary.num_known_below(wanted.vocab_size), vocabulary.token_ids.data_ptr()


def ranker_for(wanted: AnyWholeTree, padded_vocab_size: int) -> ctypes.Structure:
    """`Ranker` of ranking.h."""
    sampling, width = wanted.sampling, _WIDTHS[wanted.children]
    num_choosable, token_ids = _choosable(wanted, padded_vocab_size)
    return _Ranker(
        _KINDS[wanted.children],
        wanted.num_ranked,
        min(width, sampling.top_k or width),
        bool(sampling.top_k or sampling.min_p),
        num_choosable,
        sampling.temperature,
        sampling.top_p,
        wanted.sharpness,
        math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
        sampling.seed or 0,
        token_ids,
    )


def address(array: np.ndarray) -> int:
    """Of its first entry."""
    return array.ctypes.data
