"""The trees that a plan is compared with: its own alternatives, other systems' shapes, the paper's sizes."""

from __future__ import annotations

from sequoia.optimal_tree import Rows, optimal_tree
from sequoia.planner import MAX_LEVELS, TreePlan
from sequoia.pricing import PlanInputs, price
from sequoia.topology import Topology, TreeShape

# Sizes and levels that Chen et al. 2024 (arXiv 2402.12374) use: two with the models on the GPU, the last offloaded.
PAPER_SIZES = ((64, 9), (128, 10), (768, 18))
# Children of every node of a level, level by level (Miao et al. 2023, arXiv 2305.09781: an expansion configuration).
# The first is the one that its authors evaluate, the next two what Chen et al. compare with: k chains of d.
EXPANSIONS = {
    "SpecInfer own": (1, 1, 3, 1, 1, 1, 1, 1),
    "SpecInfer 5x8": (5, 1, 1, 1, 1, 1, 1, 1),
    "SpecInfer 8x8": (8, 1, 1, 1, 1, 1, 1, 1),
    "full binary": (2, 2, 2, 2),
}


def alternatives(plan: TreePlan) -> dict[str, TreeShape | None]:
    """By name, the plan's own tree first; None where no such tree exists, at all or for so few ranks."""
    own = {"plan": plan.chosen, "best tree": plan.best_tree, "reduced": plan.reduced, "runner-up": plan.runner_up}
    return {
        **{name: priced.shape if priced else None for name, priced in own.items()},
        "best chain": best_chain(plan.inputs, max(MAX_LEVELS, plan.chosen.shape.levels)),
        "off": Topology.root_only(),
        **{name: expansion(widths) for name, widths in EXPANSIONS.items()},
        **{f"paper {size}x{levels}": _optimal(plan.inputs.acceptance, size, levels) for size, levels in PAPER_SIZES},
    }


def best_chain(inputs: PlanInputs, max_levels: int) -> Topology | None:
    """The chain with the fewest seconds per token; None when the verify curve has no room for one."""
    most = min(max_levels, inputs.verify_curve.max_tokens)
    chains = [Topology.chain(levels) for levels in range(2, most + 1)]
    return min(chains, key=lambda chain: price(chain, inputs).seconds_per_token, default=None)


def expansion(widths: tuple[int, ...]) -> Topology:
    """The tree in which every node of a level has the same number of children: `widths[depth]`."""
    parents, level = [-1], [0]
    for width in widths:
        first = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return Topology(tuple(parents))


def _optimal(acceptance: Rows, size: int, levels: int) -> Topology | None:
    try:
        return optimal_tree(acceptance, size, levels)
    except ValueError:
        return None
