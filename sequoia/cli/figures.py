"""Figures of a generation as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from coordinator.trees import LEAST_SPEEDUP
from sequoia.client import Generation, StageSeconds
from sequoia.planner import PricedTree, TreePlan


def figures_table(generation: Generation) -> Table:
    """What one answer took and what speculation did for it."""
    usage, figures = generation.usage, generation.speculation
    table = new_table("", "")
    table.add_row("tokens", f"{usage.num_completion_tokens} after a prompt of {usage.num_prompt_tokens}")
    table.add_row("tokens/s", f"{usage.tokens_per_second:.1f}")
    table.add_row("first token", f"{usage.time_to_first_token_seconds:.3f} s")
    table.add_row("tokens/step", f"{figures.mean_tokens_per_step:.2f} over {figures.num_steps} steps")
    table.add_row("tree", f"{figures.tree_size} nodes x {figures.tree_levels} levels")
    table.add_row("rule", generation.rule if generation.seed is None else f"{generation.rule}, seed {generation.seed}")
    table.add_row("share of a step", shares(figures.stage_seconds))
    if figures.fallback_reason:
        table.add_row("plain steps", f"{figures.num_fallback_steps}: {figures.fallback_reason}")
    return table


def shares(stages: StageSeconds) -> str:
    """How the steps' wall time divides over the stages, prefill left out."""
    total = stages.draft + stages.verify + stages.network + stages.host
    named = (("draft", stages.draft), ("verify", stages.verify), ("network", stages.network), ("host", stages.host))
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in named) if total else "no steps"


def new_table(*columns: str) -> Table:
    """A plain table; no header when every column is unnamed."""
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def plans_table(temperatures: Sequence[float], plans: Sequence[TreePlan]) -> Table:
    """One row a plan, with what it promises."""
    table = new_table("temperature", "plan", "tokens/step", "ms/token", "speedup", "best that speculates")
    for temperature, plan in zip(temperatures, plans, strict=True):
        figures = (f"{plan.tokens_per_step:.2f}", f"{plan.seconds_per_token * 1e3:.1f}", f"{plan.speedup:.2f}")
        table.add_row(
            f"{temperature:g}", _shape(plan), *figures, _promise(plan.best_tree) if plan.best_tree else "none"
        )
    return table


def verdict(plan: TreePlan) -> str:
    """The plan in a sentence."""
    if plan.kind != "off" and plan.speedup >= LEAST_SPEEDUP:
        return f"speculate: {_promise(plan)}"
    if plan.best_tree is None:
        return "do not speculate"
    return f"do not speculate: the best is {_promise(plan.best_tree)}"


def _promise(tree: PricedTree) -> str:
    return f"{_shape(tree)}, predicted {tree.tokens_per_step:.2f} tokens/step and speedup {tree.speedup:.2f}"


def _shape(tree: PricedTree) -> str:
    return tree.kind if tree.kind == "off" else f"{tree.kind} of {tree.topology.size} x {tree.topology.levels}"
