"""The verifier: scores a session's trees with the target model and commits what it accepts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sequoia.engine.attention import tree_segment
from sequoia.engine.executor import Executor, Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.sampling import Choices, RandomChoices
from sequoia.engine.tree_logits import MOST_AT_ONCE, TreeLogits
from sequoia.engine.verification import MakeTarget, TargetRows, verify_tree
from sequoia.errors import InvalidArgument
from sequoia.sampling import Decoding
from sequoia.topology import TokenTree, Verdict
from sequoia.worker import feed


@dataclass(frozen=True, slots=True)
class VerifyLimits:
    """What all sessions of a target model share."""

    prefill_chunk: int  # most prompt tokens in a forward
    vocab_size: int  # tokens the tokenizer knows: padding of the logits has no probability
    make_target: MakeTarget = TargetRows
    make_target_later: MakeTarget | None = None  # for logits of large trees, made where they are looked at; None: never


class VerifySession:
    """One session of the verifier. `committed` grows by every verdict; the last of them is the next root."""

    def __init__(
        self,
        slot: KVSlot,
        committed: tuple[int, ...],
        decoding: Decoding,
        choices: Choices,
        limits: VerifyLimits,
        max_num_tokens: int,
    ) -> None:
        self._slot, self._decoding, self._choices, self._limits = slot, decoding, choices, limits
        self._committed, self._max_num_tokens = committed, max_num_tokens
        self.num_reused_tokens = 0  # of the first ones; known after the first verdict
        slot.made_from(committed)

    @property
    def prefix_len(self) -> int:
        """KV rows before the root: committed tokens less the root."""
        return len(self._committed) - 1

    @property
    def root_only(self) -> TokenTree:
        """The tree of a plain step."""
        return TokenTree.root_only(self._committed[-1])

    def ended_by(self, bonus_token_id: int) -> bool:
        """Whether this token, the last committed one, ends the answer, or leaves no room for another."""
        is_full = len(self._committed) >= self._max_num_tokens
        return is_full or bonus_token_id in self._decoding.sampling.stop_token_ids

    def verify(self, tree: TokenTree) -> Job[Verdict]:
        """One target forward over the tree (more only for a long prompt), the verdict, and the KV rows it keeps."""
        self._check(tree)
        self.num_reused_tokens = self._slot.adopt()
        pending = self._committed[self._slot.length : self.prefix_len]
        chunk = self._limits.prefill_chunk
        num_fed = len(pending) // chunk * chunk
        yield from feed(self._slot, pending[:num_fed], chunk)
        chain = pending[num_fed:]
        later = self._limits.make_target_later if tree.topology.size > MOST_AT_ONCE else None
        answer = yield tree_segment(self._slot, chain, tree, logits_later=later is not None)
        vocab_size, make_target = self._limits.vocab_size, later or self._limits.make_target
        rows = TreeLogits(tree.topology, answer, vocab_size) if later else answer[:, :vocab_size]
        verdict = verify_tree(tree, rows, self._decoding, self._committed, self._choices, make_target)
        self._slot.keep([*range(len(chain)), *(len(chain) + node for node in (0, *verdict.accepted_nodes))])
        self._committed += verdict.tokens(tree)
        self._slot.made_from(self._committed)
        return verdict

    def _check(self, tree: TokenTree) -> None:
        if tree.token_ids[0] != self._committed[-1]:
            raise InvalidArgument(f"the root must be the last committed token {self._committed[-1]}", "tree.token_ids")
        if self.prefix_len + tree.topology.levels > self._max_num_tokens:
            raise InvalidArgument(f"it reaches past the {self._max_num_tokens} tokens of this session", "tree")
        rule = self._decoding.rule
        if rule.needs_q and tree.q is None and tree.topology.size > 1:
            raise InvalidArgument(f"{rule.name} needs the distributions the children were drawn from", "tree.q")


class Verifier:
    """Opens sessions on one target model."""

    def __init__(self, executor: Executor, limits: VerifyLimits, tree_rows: int) -> None:
        self.executor = executor
        self._limits, self._tree_rows = limits, tree_rows

    @contextmanager
    def session(self, committed: tuple[int, ...], decoding: Decoding, max_num_tokens: int) -> Iterator[VerifySession]:
        """A session of at most so many tokens with rows of its own. Raises ResourceExhausted while there are none."""
        with self.executor.engine.cache.slot(committed, max_num_tokens + self._tree_rows) as slot:
            choices = RandomChoices(np.random.default_rng())
            yield VerifySession(slot, committed, decoding, choices, self._limits, max_num_tokens)
