"""The shapes that are compared, and the models of acceptance that predict them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import zip_longest

from coordinator.measuring import MEASURING_TREE
from sequoia.acceptance import AcceptanceCounts
from sequoia.cli.benchmarks.replay import Ranks, count, whole_steps
from sequoia.optimal_tree import Rows, optimal_tree
from sequoia.topology import Topology

# Of all shapes. The planner's own limit is 16, which would cost every text of this length its last 15 tokens.
MAX_LEVELS = 12
SIZES = (4, 8, 16, 32, 64)
# The model whose trees are compared: what the planner makes of counts.
PLANNER = "planner"
# A row of all depths together counts as this many offers at each of them.
_DEPTH_STRENGTH = 16.0


def shapes(acceptance: Rows) -> dict[str, Topology]:
    """By name; some are optimal for this acceptance."""
    return {
        "off": Topology.root_only(),
        **{f"chain of {levels}": Topology.chain(levels) for levels in (2, 4, 6)},
        "4 chains of 5": parallel_chains(4, 5),
        "full 2 x 3": full_tree(2, 4),
        "full 4 x 2": full_tree(4, 3),
        **{f"optimal {size}": optimal_tree(acceptance, size, min(size, MAX_LEVELS)) for size in SIZES},
        "measuring tree": MEASURING_TREE,
    }


@cache
def full_tree(num_children: int, levels: int) -> Topology:
    """Every node above the last level has as many children: SpecInfer's trees (Miao et al. 2023, arXiv 2305.09781)."""
    num_internal = sum(num_children**depth for depth in range(levels - 1))
    return Topology((-1, *(parent for parent in range(num_internal) for _ in range(num_children))))


def parallel_chains(count: int, levels: int) -> Topology:
    """Chains side by side: the root alone has several children; `levels` counts the root."""
    return Topology((-1, *[0] * count, *range(1, count * (levels - 2) + 1)))


def models(texts: Iterable[Ranks]) -> dict[str, Rows]:
    """Acceptance by model, from stepping along the texts.

    Counted with the planner's measuring tree: all depths in one row, every depth in its own, and the planner's way,
    which tells depths apart where the counts compel it. `wide`: counted with a tree that lacks no child that matters.
    """
    seen = list(texts)
    narrow = counted(MEASURING_TREE, seen)
    wide = counted(full_tree(12, 5), seen)
    return {
        "pooled": narrow.by_rank.estimate().rows,
        "by depth": by_depth(narrow),
        PLANNER: narrow.estimate().rows,
        "wide pooled": wide.by_rank.estimate().rows,
        "wide by depth": by_depth(wide),
    }


def counted(topology: Topology, texts: Iterable[Ranks]) -> AcceptanceCounts:
    """What the whole steps of the texts offered and accepted."""
    return count(step for ranks in texts for step in whole_steps(topology, ranks, MAX_LEVELS))


def by_depth(counts: AcceptanceCounts) -> Rows:
    """A row for every depth that was counted, drawn towards the row of all depths."""
    [pooled] = counts.by_rank.estimate().rows
    tables = zip(counts.offered, counts.accepted, strict=True)
    return tuple(_drawn(*table, pooled) for table in tables) or (pooled,)


def _drawn(offered: tuple[float, ...], accepted: tuple[float, ...], pooled: tuple[float, ...]) -> tuple[float, ...]:
    columns = zip_longest(offered, accepted, pooled, fillvalue=0.0)
    return tuple((hits + _DEPTH_STRENGTH * prior) / (offers + _DEPTH_STRENGTH) for offers, hits, prior in columns)
