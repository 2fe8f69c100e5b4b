"""A whole dynamic tree in one C call: what dynamic.c reads and writes."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from sequoia.engine.children import Float, ScoredTokens
from sequoia.engine.native.growth import BATCH_ARRAYS, LevelLogits, address, place, ranker_for, root_logits_of
from sequoia.engine.native.trie import NativeTrie
from sequoia.engine.whole_tree import GrownDynamicTree, WholeDynamicTree, log_limits, most_children

_NODE = np.dtype(
    [("score", np.float64), ("parent", np.int64), ("token", np.int64), ("index", np.int64), ("standing", np.int64)]
)


class _Tree(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "num_levels", "width", "most_children")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_valid_rows", "root_position")),
        *((name, ctypes.c_double) for name in ("least_chance", "least_gain", "hit")),
    )


class _Grown(ctypes.Structure):
    _fields_ = (
        ("nodes", ctypes.c_void_p),
        ("num_nodes", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("num_tokens", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("num_ranked", ctypes.c_int64),
        ("num_forwards", ctypes.c_int64),
        ("ranking_seconds", ctypes.c_double),
    )


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("logits", "batch", "own_rows", "order", "places", "frontier"))


class DynamicGrower:
    """`sequoia_grow_dynamic` of one model."""

    def __init__(self, library: ctypes.CDLL, padded_vocab_size: int) -> None:
        self._grow, self._padded_vocab_size = library.sequoia_grow_dynamic, padded_vocab_size
        self._logits = LevelLogits(padded_vocab_size)

    def __call__(
        self, model: ctypes.Structure, scratch: ctypes.Structure, wanted: WholeDynamicTree
    ) -> GrownDynamicTree:
        """Write the rows of the nodes that are forwarded. `scratch` has room for a forward of `shape.width`."""
        shape, most = wanted.shape, most_children(wanted.shape)
        num_nodes = shape.size + shape.width * most
        nodes, logits = np.empty(num_nodes, _NODE), self._logits.room(shape.width)
        token_ids = np.empty((shape.num_rows, wanted.num_ranked), np.int64)
        num_tokens, scores = np.empty(shape.num_rows, np.int64), np.empty(token_ids.shape)
        sizes = BATCH_ARRAYS * shape.width + 1, shape.width * shape.levels, shape.size, num_nodes, shape.width
        numbers = [np.empty(size, np.int64) for size in sizes]
        root_logits, trie = root_logits_of(wanted), NativeTrie.of(wanted)
        limits = *log_limits(shape), math.log(wanted.calibration.hit)
        grown = _Grown(address(nodes), 0, *map(address, (token_ids, num_tokens, scores)))
        self._grow(
            ctypes.byref(model),
            ctypes.byref(scratch),
            ctypes.byref(_Tree(shape.size, shape.levels, shape.width, most, *place(wanted), *limits)),
            ctypes.byref(ranker_for(wanted, self._padded_vocab_size)),
            None if trie is None else ctypes.byref(trie.structure),
            ctypes.c_void_p(root_logits.data_ptr()),
            ctypes.byref(_Memory(logits.data_ptr(), *map(address, numbers))),
            ctypes.byref(grown),
        )
        return _read(grown, nodes, token_ids, num_tokens, scores, None if trie is None else trie.shares)


def _read(
    grown: _Grown,
    nodes: np.ndarray,
    token_ids: np.ndarray,
    num_tokens: np.ndarray,
    scores: np.ndarray,
    trie_shares: Float | None,
) -> GrownDynamicTree:
    kept = nodes[: grown.num_nodes]
    by_index = {index: node for node, index in enumerate(kept["index"].tolist()) if index >= 0}
    counts = num_tokens[: grown.num_ranked].tolist()
    return GrownDynamicTree(
        parents=kept["parent"].tolist(),
        token_ids=kept["token"][1:].tolist(),
        forwarded=[by_index.get(index, -1) for index in range(1, grown.num_ranked)],
        ranked={
            node: ScoredTokens(*(tuple(each[index, : counts[index]].tolist()) for each in (token_ids, scores)))
            for index, node in by_index.items()
        },
        num_forwards=grown.num_forwards,
        ranking_seconds=grown.ranking_seconds,
        trie_shares=trie_shares,
    )
