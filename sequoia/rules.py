"""The rules: how the drafter proposes children, how the verifier accepts them, and what each rule can honour.

Every rule leaves the target's distribution as it is; they differ in what they accept and in what they need on the wire.
The functions are in sequoia.engine: `choose_level` proposes, `verify_tree` accepts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `refuses` are the sampling parameters that a request under it must leave at their defaults."""

    name: str
    children: Literal["top", "drawn", "coupled"]
    needs_q: bool  # the distributions the children were drawn from travel with the tree
    refuses: frozenset[str]

    @property
    def greedy(self) -> bool:
        """Whether it serves temperature 0, and only that."""
        return self is GREEDY

    @property
    def takes_any_shape(self) -> bool:
        """Whether it is exact whatever decides a tree's shape; draws that are chosen among would be biased."""
        return self.children != "drawn"


_NO_SEED = frozenset({"seed"})

# Temperature 0: the draft's top-k children; the walk follows the target's argmax.
GREEDY = Rule("greedy", "top", needs_q=False, refuses=frozenset())
# Children drawn from q without replacement; recursive rejection from the root down (Chen et al. 2024, algorithm 2).
SEQUOIA = Rule("sequoia", "drawn", needs_q=True, refuses=_NO_SEED)
# The same tree, verified from the leaves up (Weng et al. 2025).
TRAVERSAL = Rule("traversal", "drawn", needs_q=True, refuses=_NO_SEED)
# Both sides add the same seeded noise; the walk follows argmax(log p + noise), which no draft can change.
COUPLED = Rule("coupled", "coupled", needs_q=False, refuses=frozenset())
# The walk follows tokens drawn from p; any children will do, so it serves drafts without probabilities.
SAMPLE_AND_WALK = Rule("sample_and_walk", "top", needs_q=False, refuses=_NO_SEED)

RULES = {each.name: each for each in (GREEDY, SEQUOIA, TRAVERSAL, COUPLED, SAMPLE_AND_WALK)}
SAMPLED_RULES = tuple(each for each in RULES.values() if not each.greedy)
# By measured seconds per token on two pairs (docs/exactness.md); every answer then has a seed to repeat it by.
DEFAULT_RULE = COUPLED
# For comparison only, never served: what a benchmark may be asked to measure besides.
BASELINES = ("specinfer", "naive_top_k")


class ParameterError(ValueError):
    """A parameter that cannot be right, or not beside the others; `field` names it."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.message, self.field = message, field


def choose_rule(name: str, *, greedy: bool, seeded: bool, default: Rule) -> Rule:
    """The rule of a request that names one, or none (""). Raises ParameterError naming `rule` or `seed`."""
    if name and name not in RULES:
        reason = "is a baseline for benchmarks" if name in BASELINES else "is no rule"
        raise ParameterError(f"{name} {reason}; use one of {', '.join(RULES)}, or leave it out", "rule")
    if greedy or name == GREEDY.name:
        if not greedy or name not in ("", GREEDY.name):
            raise ParameterError(
                f"{GREEDY.name} goes with temperature 0, and the other rules with any above; leave it out", "rule"
            )
        return GREEDY
    if seeded and name not in ("", COUPLED.name):
        raise ParameterError(
            f"only {COUPLED.name} reproduces a seed's text, not {name}; leave one of the two out", "seed"
        )
    if seeded:
        return COUPLED
    return RULES[name] if name else default


def matrix(parameters: Iterable[str]) -> str:
    """The table of rule by parameter in Markdown, from what the rules refuse."""
    header = ["parameter", *(f"`{name}`" for name in RULES)]
    rows = [
        [f"`{each}`", *("refused" if each in rule.refuses else "exact" for rule in RULES.values())]
        for each in parameters
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
