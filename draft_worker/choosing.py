"""The children of a tree's nodes, chosen by the rule from the draft's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, stack

from draft_worker.mixture import Mixture
from sequoia.engine.children import (
    coupled_children,
    draft_distributions,
    draw_children,
    scored_coupled_children,
    scored_top_children,
    top_children,
)
from sequoia.engine.sampling import Path, adjusted_logits
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DraftDistributions

# The likeliest tokens besides a node's children that are remembered: what may follow when none of those is accepted.
NUM_SPARES = 2

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """The children chosen under some nodes of one depth, and the q they were drawn from, if the rule needs it."""

    children: tuple[Tokens, ...]  # one tuple a node
    spares: tuple[Tokens, ...]  # the likeliest tokens besides, best first, at most NUM_SPARES a node
    q: DraftDistributions | None = None  # one row a node
    scores: tuple[tuple[float, ...], ...] = ()  # where asked for: of children and spares the log of each one's chance


def choose_level(
    logits: Tensor,
    decoding: Decoding,
    paths: Sequence[Path],
    counts: Sequence[int],
    generator: np.random.Generator,
    mixture: Mixture | None = None,
) -> Level:
    """The children of nodes of one depth by the rule: `counts[i]` of them, or fewer where q has fewer.

    `logits` are the draft's (nodes, vocabulary); `paths` end with the nodes' own tokens; q is that of the mixture.
    """
    sampling, logits = decoding.sampling, _adjusted(logits, decoding.sampling, paths, mixture)
    if decoding.rule.children == "drawn":
        q = draft_distributions(logits, sampling)
        drawn = tuple(draw_children(q, row, count, generator) for row, count in enumerate(counts))
        return Level(drawn, tuple(undrawn(q, row, tokens) for row, tokens in enumerate(drawn)), q)
    wanted = [count + NUM_SPARES for count in counts]
    if decoding.rule.children == "coupled":
        ranked = coupled_children(logits, sampling, paths[0].position, wanted)
    else:
        ranked = tuple(top_children(row, count) for row, count in zip(logits, wanted, strict=True))
    both = list(zip(ranked, counts, strict=True))
    return Level(tuple(row[:count] for row, count in both), tuple(row[count:] for row, count in both))


def undrawn(q: DraftDistributions, row: int, drawn: Tokens) -> Tokens:
    """The likeliest tokens of q's row that were not drawn; its candidates stand in descending order."""
    support = q.token_ids[row][q.weights[row] > 0].tolist()
    return tuple(token for token in support if token not in drawn)[:NUM_SPARES]


def score_level(
    logits: Tensor,
    decoding: Decoding,
    paths: Sequence[Path],
    counts: Sequence[int],
    sharpness: float,
    mixture: Mixture | None = None,
) -> Level:
    """As `choose_level`, with scores; for rules that take any shape."""
    assert decoding.rule.takes_any_shape, "draws must not be chosen among"
    sampling, logits = scoring(decoding), _adjusted(logits, decoding.sampling, paths, mixture)
    wanted = [count + NUM_SPARES for count in counts]
    if decoding.rule.children == "coupled":
        ranked = scored_coupled_children(logits, sampling, paths[0].position, wanted, sharpness)
    else:
        ranked = scored_top_children(logits, sampling, wanted, sharpness)
    both = list(zip(ranked, counts, strict=True))
    return Level(
        tuple(row.token_ids[:count] for row, count in both),
        tuple(row.token_ids[count:] for row, count in both),
        scores=tuple(row.scores for row in ranked),
    )


def scoring(decoding: Decoding) -> Sampling:
    """What children are scored by. Where the likeliest are proposed nothing is cut, or a tree would not be full."""
    sampling = decoding.sampling
    return sampling if decoding.rule.children == "coupled" else Sampling(sampling.temperature or 1.0)


def _adjusted(logits: Tensor, sampling: Sampling, paths: Sequence[Path], mixture: Mixture | None) -> Tensor:
    if sampling.adjusts(paths[0].num_generated):
        logits = stack([adjusted_logits(row, sampling, path) for row, path in zip(logits, paths, strict=True)])
    if mixture is None:
        return logits
    return mixture.mixed(logits, [path.drafted for path in paths], sampling.temperature)


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses children for the sessions' rule. `vocab_size`: the draft's padding may lie outside the target's."""

    decoding: Decoding
    vocab_size: int
    generator: np.random.Generator

    def level(
        self, logits: Tensor, paths: Sequence[Path], counts: Sequence[int], mixture: Mixture | None = None
    ) -> Level:
        """`choose_level` of the draft's logits (nodes, padded vocabulary)."""
        return choose_level(logits[:, : self.vocab_size], self.decoding, paths, counts, self.generator, mixture)

    def scored_level(
        self,
        logits: Tensor,
        paths: Sequence[Path],
        counts: Sequence[int],
        sharpness: float,
        mixture: Mixture | None = None,
    ) -> Level:
        """`score_level` of the draft's logits (nodes, padded vocabulary)."""
        return score_level(logits[:, : self.vocab_size], self.decoding, paths, counts, sharpness, mixture)

    def can_grow_unseen(self, committed: Tokens) -> bool:
        """Whether no node's children depend on which tokens lead to it, but for the draft's logits."""
        return not self.decoding.sampling.adjusts(len(committed) - self.decoding.num_prompt_tokens)
