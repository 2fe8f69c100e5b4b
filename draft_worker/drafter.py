"""The drafter: keeps a session's KV in step with the committed tokens and grows token trees, level by level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from draft_worker.ahead import Ahead
from draft_worker.calibrator import Calibrator
from draft_worker.choosing import Chooser, Tokens
from draft_worker.dynamic import DynamicGrowth
from draft_worker.growing import AnyGrowth, begun
from draft_worker.growth import grow_levels
from draft_worker.mixture import NgramSource
from draft_worker.planned import PlannedGrowth
from draft_worker.unseen import grow_unseen
from draft_worker.whole import grow_whole
from sequoia.engine.attention import chunk_segment
from sequoia.engine.children import Calibration
from sequoia.engine.executor import Executor, Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.errors import InvalidArgument
from sequoia.rules import Rule
from sequoia.sampling import Decoding
from sequoia.topology import TokenTree, TreeShape
from sequoia.worker import feed

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """What all sessions of a draft model share."""

    prefill_chunk: int  # most prompt tokens in a forward
    vocab_size: int  # tokens the tokenizer knows: padding of the draft's logits may lie outside the target's
    reads_once: bool = False  # grow trees where the logits are, and read them when they are whole
    grows_whole: bool = False  # the engine grows a tree in one turn
    mixes_ngrams: bool = False  # what the session's tokens repeat is mixed into q
    calibrator: Calibrator = field(default_factory=Calibrator)  # taught by all sessions


@dataclass(frozen=True, slots=True)
class Drafted:
    """A tree, and what drafting ahead had to do with it.

    Trees had been begun for the first `num_begun` guesses (0: not attempted, or not one forward done); `hit` is the
    number of the one that came true, `num_levels_saved` the levels that its tree, this one, had when it was asked for.
    """

    tree: TokenTree
    num_begun: int = 0
    hit: int | None = None
    num_levels_saved: int = 0
    ngram_nodes: tuple[int, ...] = ()  # whose tokens go on as the text did before; ascending, without the root


class DraftSession:
    """One session of the drafter. Its KV follows from the committed tokens alone.

    Every committed token without a row (an accepted leaf, tokens of plain steps, the bonus token) rides along in the
    next root forward. Leaves are never forwarded, so a tree of d levels costs d - 1 forwards; drafting ahead forwards
    those that it guesses to be accepted.
    """

    def __init__(
        self,
        slot: KVSlot,
        decoding: Decoding,
        generator: np.random.Generator,
        limits: DraftLimits,
        max_num_tokens: int,
    ) -> None:
        self._slot, self._limits, self._max_num_tokens = slot, limits, max_num_tokens
        self._chooser = Chooser(decoding, limits.vocab_size, generator)
        # Of its own, so that trees that are dropped change nothing in those that follow.
        self._ahead_chooser = replace(self._chooser, generator=generator.spawn(1)[0])
        self._ngrams = NgramSource() if limits.mixes_ngrams else None
        self._committed: Tokens = ()
        self._last: AnyGrowth | None = None
        self._ahead: Ahead | None = None

    @property
    def num_committed(self) -> int:
        """Committed tokens known, in tokens."""
        return len(self._committed)

    @property
    def rule(self) -> Rule:
        """By which children are chosen."""
        return self._chooser.decoding.rule

    @property
    def _calibration(self) -> Calibration:
        return self._limits.calibrator.value(self._chooser.decoding)

    def commit(self, base_len: int, token_ids: Tokens) -> None:
        """Take `token_ids` as the committed tokens from `base_len` on. Raises InvalidArgument when they contradict what
        is known, or are too many.
        """
        self._committed = continued(self._committed, base_len, token_ids, self._max_num_tokens)
        self._slot.made_from(self._committed)

    def prefill(self) -> Job[None]:
        """Make rows for all committed tokens but the root, before anything else is asked for."""
        self._slot.adopt()
        self._learn()
        yield from feed(self._slot, self._committed[self._slot.length : -1], self._limits.prefill_chunk)

    def grow(self, shape: TreeShape) -> Job[Drafted]:
        """The tree of that shape, smaller where a q had fewer tokens than a node has children."""
        self._learn()
        ahead, self._ahead = self._ahead, None
        hit = ahead.find(self._committed, shape) if ahead else None
        if ahead is not None and hit is not None:
            growth = ahead.take(hit)
            num_levels_saved = growth.num_levels_grown
        else:
            growth = yield from self._begin(shape)
            num_levels_saved = 0
        yield from grow_levels(self._slot, growth, self._chooser)
        self._last = growth
        tree = growth.tree()
        ngram_nodes = growth.mixture.trie.nodes_on(tree) if growth.mixture else ()
        return Drafted(tree, ahead.num_begun if ahead else 0, hit, num_levels_saved, ngram_nodes)

    def draft_ahead(self, num_guesses: int) -> Job[None]:
        """Grow trees for the likeliest verdicts on the last tree. To be dropped before anything else is asked for."""
        assert self._last is not None, "there is no tree yet"
        most = self._max_num_tokens
        self._ahead = Ahead(
            self._slot, self._last, self._ahead_chooser, self._calibration, num_guesses, most, self._ngrams
        )
        return self._ahead.job()

    def _begin(self, shape: TreeShape) -> Job[AnyGrowth]:
        """A tree with its first level at least, after the root forward and all that rides along."""
        self._keep_accepted()
        chunk = self._limits.prefill_chunk
        pending = self._committed[self._slot.length :]
        num_fed = (len(pending) - 1) // chunk * chunk
        yield from feed(self._slot, pending[:num_fed], chunk)
        root = pending[num_fed:]  # and what rides along
        logits = yield chunk_segment(self._slot, root, logits=True)
        self._slot.keep(range(len(root)))
        mixture = self._ngrams.mixture(self._committed, shape.levels - 1) if self._ngrams else None
        growth = begun(shape, self._committed, self._calibration, mixture=mixture)
        is_unseen = bool(growth.frontier) and self._chooser.can_grow_unseen(self._committed)
        # Levels of several sessions share forwards, which is quicker than a tree after another.
        if is_unseen and self._limits.grows_whole and self._slot.is_alone:
            yield from grow_whole(self._slot, growth, self._chooser, logits)
        elif is_unseen and self._limits.reads_once and isinstance(growth, PlannedGrowth):
            yield from grow_unseen(self._slot, growth, self._chooser, logits)
        elif growth.frontier:
            growth.add(growth.level(self._chooser, growth.frontier, logits))
        return growth

    def _learn(self) -> None:
        """What the committed tokens say of the last tree's scores and mixture, and what they repeat from now on."""
        last = self._last
        if isinstance(last, DynamicGrowth):
            self._limits.calibrator.learn(self._chooser.decoding, last, self._committed[len(last.committed) :])
        if self._ngrams is None:
            return
        if last is not None and last.mixture is not None and self.num_committed > len(last.committed):
            self._ngrams.learn(last.mixture, self._committed[len(last.committed)])
        self._ngrams.extend(self._committed)

    def _keep_accepted(self) -> None:
        """Keep the last tree's rows that have become committed tokens; the root is always forwarded anew."""
        if self._last is not None:
            self._slot.keep(self._last.rows_for(self._committed[len(self._last.committed) :]))
            self._last = None
        self._slot.truncate(min(self._slot.length, self.num_committed - 1))


def continued(committed: Tokens, base_len: int, token_ids: Tokens, most: int) -> Tokens:
    """The committed tokens, at most `most`, with `token_ids` from `base_len` on. Raises InvalidArgument when they
    contradict what is known, or are too many.
    """
    if base_len + len(token_ids) > most:
        raise InvalidArgument(f"{base_len + len(token_ids)} tokens do not fit a session of {most}", "token_ids")
    known = committed[base_len:]
    if base_len > len(committed) or token_ids[: len(known)] != known:
        raise InvalidArgument(f"does not continue the {len(committed)} committed tokens", "base_len")
    return committed[:base_len] + token_ids


class Drafter:
    """Opens sessions on one draft model."""

    def __init__(self, executor: Executor, limits: DraftLimits, tree_rows: int) -> None:
        self._executor, self._limits, self._tree_rows = executor, limits, tree_rows

    async def run(self, job: Job[Result]) -> Result:
        """The job's result, among those of all sessions."""
        return await self._executor.run(job)

    @contextmanager
    def session(self, committed: Tokens, decoding: Decoding, max_num_tokens: int) -> Iterator[DraftSession]:
        """A session of at most so many tokens with rows of its own. Raises ResourceExhausted while there are none."""
        with self._executor.engine.cache.slot(committed, max_num_tokens + self._tree_rows) as slot:
            session = DraftSession(slot, decoding, np.random.default_rng(), self._limits, max_num_tokens)
            session.commit(0, committed)
            yield session
