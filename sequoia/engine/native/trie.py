"""A trie as C reads it: `Trie` of ranking.h."""

from __future__ import annotations

import ctypes

import numpy as np

from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.engine.trie import Trie
from sequoia.engine.whole_tree import AnyWholeTree
from sequoia.topology import Int


class _Trie(ctypes.Structure):
    _fields_ = (
        ("num_nodes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("parents", "token_ids", "logit_rows", "log_odds")),
        ("temperature", ctypes.c_double),
        ("shares", ctypes.c_void_p),
    )


class NativeTrie:
    """The structure and the arrays behind it, `shares` (nodes,) among them, which C fills in."""

    def __init__(self, trie: Trie, temperature: float, vocabulary: DraftVocabulary | None) -> None:
        token_ids = np.array(trie.token_ids, np.int64)
        rows = token_ids if vocabulary is None else _known_rows(vocabulary, token_ids)
        self._arrays = (np.array(trie.parents, np.int64), token_ids, rows, np.array(trie.log_odds))
        self.shares = np.zeros(len(token_ids))
        addresses = (array.ctypes.data for array in self._arrays)
        self.structure = _Trie(len(token_ids), *addresses, temperature or 1.0, self.shares.ctypes.data)

    @staticmethod
    def of(wanted: AnyWholeTree) -> NativeTrie | None:
        """That of a tree; None where nothing is mixed in."""
        if wanted.trie is None:
            return None
        return NativeTrie(wanted.trie, wanted.sampling.temperature, wanted.vocabulary)


def _known_rows(vocabulary: DraftVocabulary, token_ids: Int) -> Int:
    """The model's row of each token; of those that it does not know the one behind all that it knows."""
    rows = vocabulary.rows.numpy()
    return np.where(token_ids < vocabulary.size, rows[np.minimum(token_ids, vocabulary.size - 1)], vocabulary.num_known)
