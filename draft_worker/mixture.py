"""A draft model's distributions mixed with what the session's own tokens repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from draft_worker.ngram import LONGEST, SHORTEST, NgramIndex, Tokens
from sequoia.engine.largest import on_host
from sequoia.engine.transfer import Array
from sequoia.engine.trie import NOWHERE, Trie, mix
from sequoia.engine.trie_rows import TrieRows

# What a match is trusted before anything is known, by its length: 2 to 8 tokens.
_PRIOR = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15)
# Steps that the prior counts for, and steps after which older ones fade.
_PRIOR_STEPS, _MEMORY_STEPS = 4, 32
# Trust stays within these: it can be won back, and the model's q is never lost.
_LEAST, _MOST = 0.01, 0.95
# A shorter match says less than any draft model does.
_LEAST_LENGTH = 3
# Nodes of a trie, at most.
_MOST_NODES = 48


class Trust:
    """How much of a mixture is the trie's, by the length of the match: where that has been right and the model wrong.

    One step of expectation maximisation a step (Dempster et al. 1977): the weight of a mixture's part moves towards the
    share of the token's probability that came from it. A token that both predict says nothing, so it leaves the trust
    where it was.
    """

    def __init__(self) -> None:
        self._trust = list(_PRIOR)
        self._num_steps = [_PRIOR_STEPS] * len(_PRIOR)

    def of(self, length: int) -> float:
        """That in a match of so many tokens, in (0, 1)."""
        return min(max(self._trust[min(length, LONGEST) - SHORTEST], _LEAST), _MOST)

    def learn(self, length: int, share: float) -> None:
        """`share` of the probability that the next token had, behind a match of that length, came from the trie."""
        place = min(length, LONGEST) - SHORTEST
        self._num_steps[place] = min(self._num_steps[place] + 1, _MEMORY_STEPS)
        self._trust[place] += (share - self._trust[place]) / self._num_steps[place]


class Mixture:
    """What one tree's distributions are mixed with.

    It depends on the committed tokens, and on those that a guess at them adds, never on what is drawn from it. So q is
    as good as any other: the rules that need it draw from the mixture and send the mixture.

    Tokens that the draft model does not know have no probability, and none here either: they are not proposed.
    """

    def __init__(self, trie: Trie) -> None:
        self.trie = trie
        self.shares: dict[int, float] = {}  # of the root's children on the trie: the part that is the trie's

    def read(self, shares: Array) -> None:
        """Take the shares from another that has mixed: (trie nodes - 1,) float64, of each but its root."""
        self.shares = {
            token: float(shares[node - 1]) for token, node in self.trie.children[0].items() if shares[node - 1]
        }

    def mixed(self, logits: Tensor, paths: Sequence[Tokens], temperature: float) -> Tensor:
        """The logits (rows, vocabulary) of nodes that these tokens lead to, of the mixture where they are on the trie.

        They are those given where none is, and float32 or float64 on the host where one is. At temperature 0 the
        mixture is that of temperature 1.
        """
        standing = [(row, node) for row, path in enumerate(paths) if (node := self.trie.find(path)) != NOWHERE]
        standing = [(row, node) for row, node in standing if self.trie.children[node]]
        if not standing:
            return logits
        values = np.array(on_host(logits))
        for row, node in standing:
            shares = mix(values[row], self.trie, node, temperature or 1.0)
            self.shares = self.shares if node else shares
        return torch.from_numpy(values)


class DeviceMixture:
    """A mixture for rows that the host does not see until the tree is whole."""

    def __init__(self, mixture: Mixture, temperature: float, device: torch.device) -> None:
        self._mixture, self._temperature = mixture, temperature or 1.0
        self._rows = TrieRows.of(mixture.trie, device)
        self._standing = torch.zeros(1, dtype=torch.int64, device=device)
        self.root_shares = torch.empty(0)  # (trie nodes - 1,) float64, once the root's row is mixed

    def descend(self, parent_rows: Tensor, token_ids: Tensor) -> None:
        """To the next depth: which of the rows before is the parent of each, and its own token, (rows,)."""
        self._standing = self._rows.follow(self._standing[parent_rows], token_ids)

    def mixed(self, logits: Tensor) -> Tensor:
        """The logits (rows, vocabulary) of this depth, the root's first, mixed."""
        result, shares = self._rows.mix(logits, self._standing, self._temperature)
        self.root_shares = self.root_shares if len(self.root_shares) else shares[0]
        return result

    def read(self, root_shares: Array) -> None:
        """They are on the host now."""
        self._mixture.read(root_shares)


class NgramSource:
    """A session's index, and how far it is trusted beside its draft model. Both follow from committed tokens and q."""

    def __init__(self) -> None:
        self._index, self._trust = NgramIndex(), Trust()

    def extend(self, committed: Tokens) -> None:
        """Take all committed tokens."""
        self._index.extend(committed)

    def mixture(self, tokens: Tokens, depth: int) -> Mixture | None:
        """For a tree of that depth behind `tokens`, which begin with the committed ones; None where nothing matches."""
        trie = self._index.continuations(tokens, depth, _MOST_NODES)
        if trie is None or trie.lengths[0] < _LEAST_LENGTH:
            return None
        return Mixture(replace(trie, trust=tuple(map(self._trust.of, trie.lengths))))

    def learn(self, mixture: Mixture, token: int) -> None:
        """The token that was committed where the mixture's root predicted one."""
        self._trust.learn(mixture.trie.lengths[0], mixture.shares.get(token, 0.0))
