"""Why this tree: the plan beside its alternatives, as promised and as realised lately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from sequoia.alternatives import alternatives
from sequoia.cli.figures import new_table, promises
from sequoia.cli.shape_names import in_short
from sequoia.planner import TreePlan
from sequoia.pricing import PlanInputs, PricedTree, price
from sequoia.topology import DynamicShape, Topology, TreeShape

_NOTE = (
    "SpecInfer (Miao et al. 2023): every node of a level has as many children as the next; own: 3 below the third "
    "node, else 1; KxD: K chains of D. full binary: 2 each. paper: the sizes and levels of Chen et al. 2024, as the "
    "best trees for this acceptance. NxLdW: dynamic, of width W. built-in: serves until there is a plan."
)

_LATELY = " lately: as realised on the running pair (over so many steps)."


@dataclass(frozen=True, slots=True)
class Realised:
    """What a tree made of its steps lately; older ones count less, so that the numbers are no whole ones."""

    num_steps: float
    num_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """One tree. `priced` is None when it cannot be used here, and `remark` says why."""

    name: str
    shape: TreeShape | None
    priced: PricedTree | None
    realised: Realised | None
    realised_speedup: float | None
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: what was predicted, and under `realised` what came of it."""
        size = {"size": self.shape.size, "levels": self.shape.levels} if self.shape else {}
        predicted = self.priced.to_dict() if self.priced else {}
        return {"name": self.name, **size, **predicted, "realised": self._realised(), "remark": self.remark}

    def _realised(self) -> dict[str, float | None] | None:
        if self.realised is None:
            return None
        return {
            "steps": self.realised.num_steps,
            "tokens_per_step": self.realised.num_tokens / self.realised.num_steps,
            "seconds_per_token": self.realised.seconds / self.realised.num_tokens,
            "speedup": self.realised_speedup,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is known of one kind of request. Without a running system there is nothing but the plan."""

    plan: TreePlan | None
    built_in: Topology
    realised: Mapping[TreeShape, Realised] = field(default_factory=dict)
    situation: str = ""
    planned_situation: str = ""
    state: str = ""
    state_reason: str = ""
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0

    def rows(self) -> list[Row]:
        """The plan's tree and its alternatives, then what else was used lately."""
        named = {**(alternatives(self.plan) if self.plan else {}), "built-in": self.built_in}
        used = {f"other, {number}": tree for number, tree in enumerate(self._unnamed(named), start=1)}
        return [self._row(name, shape) for name, shape in {**named, **used}.items()]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "situation": self.situation,
            "planned_situation": self.planned_situation,
            "state": self.state,
            "state_reason": self.state_reason,
            "draft_ahead": {"attempts": self.num_ahead_hits + self.num_ahead_misses, "hits": self.num_ahead_hits},
            "trees": [row.to_dict() for row in self.rows()],
            "inputs": self.plan and self.plan.inputs.to_dict(),
        }

    def _unnamed(self, named: Mapping[str, TreeShape | None]) -> Iterator[TreeShape]:
        return (shape for shape in self.realised if shape not in named.values())

    def _row(self, name: str, shape: TreeShape | None) -> Row:
        if shape is None:
            return Row(name, None, None, None, None, "no such tree")
        realised, speedup = self.realised.get(shape), self._realised_speedup(shape)
        if self.plan is None:
            return Row(name, shape, None, realised, speedup, "no plan")
        try:
            return Row(name, shape, price(shape, self.plan.inputs), realised, speedup)
        except ValueError:
            is_unknown = isinstance(shape, DynamicShape)
            return Row(name, shape, None, realised, speedup, "not measured" if is_unknown else "beyond the curve")

    def _realised_speedup(self, shape: TreeShape) -> float | None:
        here, plain = self.realised.get(shape), self.realised.get(Topology.root_only())
        if here is None or plain is None:
            return None
        return (plain.seconds / plain.num_tokens) / (here.seconds / here.num_tokens)


def explanation_view(explanation: Explanation) -> Group:
    """The table, and below it what it follows from."""
    return Group(_trees_table(explanation), _facts_table(explanation))


def _trees_table(explanation: Explanation) -> Table:
    columns, note = ["tokens/step", "ms/token", "speedup"], _NOTE
    if explanation.realised:
        columns, note = [each for name in columns for each in (name, "lately")], _NOTE + _LATELY
    table = new_table("", "tree", *columns)
    # Eight columns fit a terminal of 80 only without padding.
    table.padding = 0 if explanation.realised else (0, 1)
    for column in table.columns:
        column.no_wrap = column.header != "tokens/step"
    for row in explanation.rows():
        table.add_row(row.name, *(_both(row) if explanation.realised else _predicted(row)))
    table.caption, table.caption_justify = note, "left"
    return table


def _both(row: Row) -> tuple[str, ...]:
    tree, *predicted = _predicted(row)
    return (tree, *(cell for pair in zip(predicted, _realised(row), strict=True) for cell in pair))


def _predicted(row: Row) -> tuple[str, ...]:
    if row.priced is not None and row.shape is not None:
        return (_short(row.priced.kind, row.shape), *promises(row.priced))
    return (_short("", row.shape), row.remark, "-", "-")


def _short(kind: str, shape: TreeShape | None) -> str:
    if shape is None or shape.size == 1:
        return kind or "-"
    return f"{kind} {in_short(shape)}".lstrip()


def _realised(row: Row) -> tuple[str, ...]:
    if row.realised is None:
        return ("-", "-", "-")
    tokens = row.realised.num_tokens / row.realised.num_steps
    pace = row.realised.seconds / row.realised.num_tokens
    speedup = "-" if row.realised_speedup is None else f"{row.realised_speedup:.2f}"
    return (f"{tokens:.2f} ({row.realised.num_steps:.0f})", f"{pace * 1e3:.4g}", speedup)


def _facts_table(explanation: Explanation) -> Table:
    table = new_table("", "")
    state = f"{explanation.state}: {explanation.state_reason}" if explanation.state else ""
    hits, num_attempts = explanation.num_ahead_hits, explanation.num_ahead_hits + explanation.num_ahead_misses
    situations = {
        "situation": explanation.situation,
        "planned for": explanation.planned_situation,
        "state": state,
        "drafted ahead": f"{hits} hits in {num_attempts} attempts, all requests" if num_attempts else "",
    }
    inputs = (
        _inputs_facts(explanation.plan.inputs) if explanation.plan else {"plan": "none yet; `sequoia plan` makes one"}
    )
    for name, fact in {**situations, **inputs}.items():
        if fact:
            table.add_row(name, fact)
    return table


def _inputs_facts(inputs: PlanInputs) -> dict[str, str]:
    verify, draft = inputs.verify_curve, inputs.draft_curve
    seconds = {"draft": inputs.draft_rtt_seconds, "verify": inputs.verify_rtt_seconds, "host": inputs.host_seconds}
    ahead = "never" if inputs.draft_ahead_hit_rate is None else f"right for {inputs.draft_ahead_hit_rate:.0%} of steps"
    return {
        **{f"acceptance{_depth(inputs, depth)}": _ranks(row) for depth, row in enumerate(inputs.acceptance)},
        "verify": f"{verify.at(1) * 1e3:.4g} ms for 1 token, {verify.seconds[-1] * 1e3:.4g} for {verify.max_tokens}",
        "draft": f"{draft.at(1) * 1e3:.4g} ms for 1 row, {draft.seconds[-1] * 1e3:.4g} for {draft.max_tokens}",
        "a step besides": ", ".join(f"{name} {each * 1e3:.3g} ms" for name, each in seconds.items()),
        "tokens factor": f"{inputs.tokens_factor:.3g}",
        "dynamic": ", ".join(f"{in_short(each.shape)}: {each.tokens_per_step:.3g}" for each in inputs.dynamic),
        "draft ahead": f"{ahead}{', device shared' if inputs.shares_device else ''}",
    }


def _depth(inputs: PlanInputs, depth: int) -> str:
    if len(inputs.acceptance) == 1:
        return " by rank"
    return f", depth {depth}{' and below' if depth == len(inputs.acceptance) - 1 else ''}"


def _ranks(row: tuple[float, ...]) -> str:
    shown = ", ".join(f"{each:.3f}" for each in row[:8])
    return shown if len(row) <= 8 else f"{shown}, ... ({len(row)} ranks, {sum(row):.3f} in all)"
