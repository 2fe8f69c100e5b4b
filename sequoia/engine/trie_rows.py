"""Mixtures of whole rows at once, where the logits are and without a look at them: `trie.mix` for a device."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.transfer import upload
from sequoia.engine.trie import NOWHERE, Trie


class TrieRows(NamedTuple):
    """A trie on a device, without its root: each (nodes - 1,)."""

    parents: Tensor  # int64
    token_ids: Tensor  # int64
    log_odds: Tensor  # float64

    @staticmethod
    def of(trie: Trie, device: torch.device) -> TrieRows:
        """That trie."""
        integers = (np.array(each[1:], np.int64) for each in (trie.parents, trie.token_ids))
        return TrieRows(*upload((*integers, np.array(trie.log_odds[1:], np.float64)), device))

    def follow(self, standing: Tensor, token_ids: Tensor) -> Tensor:
        """The nodes (rows,) that tokens (rows,) lead to from those in `standing` (rows,), int64; or NOWHERE."""
        leads = (self.parents == standing[:, None]) & (self.token_ids == token_ids[:, None])
        return torch.where(leads.any(1), leads.int().argmax(1) + 1, NOWHERE)

    def mix(self, logits: Tensor, standing: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`mix` of rows (rows, vocabulary) at the nodes `standing` (rows,): their logits, and the shares.

        The shares, (rows, nodes - 1) float64, are those of every node of the trie: 0 where a row says nothing of it.
        """
        vocab_size = logits.shape[1]
        ids = self.token_ids.clamp(max=vocab_size - 1).expand(len(logits), -1)
        own = logits.gather(1, ids).double() / temperature
        mass = (logits.float() / temperature).logsumexp(1, keepdim=True).double()
        added = mass + self.log_odds
        raised = torch.logaddexp(own, added)
        applies = (self.parents == standing[:, None]) & (self.token_ids < vocab_size) & own.isfinite() & mass.isfinite()
        least = torch.where(applies, raised * temperature, -math.inf).to(logits.dtype)
        shares = torch.where(applies, (added - raised).exp(), 0.0)
        # A token may stand on several nodes, of which at most one applies to a row.
        return logits.scatter_reduce(1, ids, least, "amax"), shares
