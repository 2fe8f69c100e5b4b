"""Figures as tables for people, and what every picture needs. Loads no grpc: plans are shown without a system too."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from coordinator.gaits import LEAST_SPEEDUP
from sequoia.cli.shape_names import in_words
from sequoia.planner import PricedTree, TreePlan
from sequoia.rules import ParameterError
from sequoia.topology import DynamicShape

if TYPE_CHECKING:
    from sequoia.generation import Generation
    from sequoia.speculation_figures import StageSeconds


def figures_table(generation: Generation) -> Table:
    """What one answer took and what speculation did for it."""
    usage, figures = generation.usage, generation.speculation
    table = new_table("", "")
    cached = f", {usage.num_cached_prompt_tokens} of them read before" if usage.num_cached_prompt_tokens else ""
    table.add_row("tokens", f"{usage.num_completion_tokens} after a prompt of {usage.num_prompt_tokens}{cached}")
    table.add_row("tokens/s", f"{usage.tokens_per_second:.1f}")
    table.add_row("first token", f"{usage.time_to_first_token_seconds:.3f} s")
    table.add_row("tokens/step", f"{figures.mean_tokens_per_step:.2f} over {figures.num_steps} steps")
    table.add_row("tree", in_words(figures.tree))
    table.add_row("rule", generation.rule if generation.seed is None else f"{generation.rule}, seed {generation.seed}")
    table.add_row("share of a step", shares(figures.stage_seconds))
    table.add_row("ms of a step", parts(figures.stage_seconds, figures.num_steps))
    if figures.num_ahead_attempts:
        table.add_row("drafted ahead", f"{figures.num_ahead_hits} hits in {figures.num_ahead_attempts} attempts")
    if figures.num_ngram_tokens:
        accepted = f"{figures.num_accepted_ngram_tokens} of {figures.num_accepted_tokens} accepted tokens"
        table.add_row("n-grams", f"{accepted}, {figures.num_ngram_tokens} of {figures.num_drafted_tokens} drafted")
    if figures.fallback_reason:
        table.add_row("plain steps", f"{figures.num_fallback_steps}: {figures.fallback_reason}")
    return table


def shares(stages: StageSeconds) -> str:
    """How the steps' wall time divides over the stages, prefill left out."""
    total = stages.total
    named = (("draft", stages.draft), ("verify", stages.verify), ("network", stages.network), ("host", stages.host))
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in named) if total else "no steps"


def parts(stages: StageSeconds, num_steps: int) -> str:
    """What a step consists of, on average: the models' forwards, work on their logits, and all else."""
    named = (("forwards", stages.forwards), ("logits and trees", stages.work), ("all else", stages.overhead))
    each = (f"{name} {seconds / num_steps * 1e3:.2f}" for name, seconds in named)
    return ", ".join(each) if num_steps else "no steps"


def new_table(*columns: str) -> Table:
    """A plain table; no header when every column is unnamed."""
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def plans_table(temperatures: Sequence[float], plans: Sequence[TreePlan]) -> Table:
    """One row a plan, with what it promises."""
    table = new_table("T", "plan", "tokens/step", "ms/token", "speedup", "best tree", "reduced")
    for temperature, plan in zip(temperatures, plans, strict=True):
        others = (f"{_sizes(each)}: {each.speedup:.2f}" if each else "none" for each in (plan.best_tree, plan.reduced))
        table.add_row(f"{temperature:g}", shape(plan.chosen), *promises(plan.chosen), *others)
    return table


def plan_table(plan: TreePlan) -> Table:
    """One plan, a row a figure, by the names they have in its JSON form."""
    tree, off_seconds = plan.chosen, plan.inputs.verify_curve.at(1)
    table = new_table("", "")
    table.add_row("kind", tree.kind)
    table.add_row("size", f"{tree.shape.size}")
    table.add_row("levels", f"{tree.shape.levels}")
    if isinstance(tree.shape, DynamicShape):
        table.add_row("width", f"{tree.shape.width}")
    else:
        table.add_row("parents", ",".join(map(str, tree.shape.parents)))
    table.add_row("tokens_per_step", promises(tree)[0])
    table.add_row("seconds_per_token", f"{tree.seconds_per_token:.4g} (plain decoding: {off_seconds:.4g})")
    table.add_row("speedup", f"{tree.speedup:.2f}")
    for name, other in plan.alternatives.items():
        table.add_row(name, _promise(other) if other else "none")
    return table


def verdict(plan: TreePlan) -> str:
    """The plan in a sentence."""
    if plan.chosen.kind != "off" and plan.chosen.speedup >= LEAST_SPEEDUP:
        return f"speculate: {_promise(plan.chosen)}"
    if plan.best_tree is None:
        return "do not speculate"
    return f"do not speculate: the best is {_promise(plan.best_tree)}"


def promises(tree: PricedTree) -> tuple[str, str, str]:
    """Tokens per step, with the 95 % interval where it is known; milliseconds per token; speedup."""
    margin = f" ± {1.96 * tree.tokens_error:.2f}" if tree.tokens_error else ""
    return f"{tree.tokens_per_step:.2f}{margin}", f"{tree.seconds_per_token * 1e3:.4g}", f"{tree.speedup:.2f}"


def shape(tree: PricedTree) -> str:
    """Kind, size and levels, and a dynamic tree's width."""
    return {"off": "off", "dynamic": str(tree.shape)}.get(tree.kind, f"{tree.kind} of {_sizes(tree)}")


def _sizes(tree: PricedTree) -> str:
    return str(tree.shape) if tree.kind == "dynamic" else f"{tree.shape.size} x {tree.shape.levels}"


def check_plot(file: Path) -> None:
    """Before the work that a picture takes, not after. Raises ParameterError naming --plot."""
    if file.suffix not in (".svg", ".png"):
        raise ParameterError(f"{file} ends neither in .svg nor in .png", "--plot")
    if not file.absolute().parent.is_dir():
        raise ParameterError(f"there is no folder {file.absolute().parent}; make it first", "--plot")
    if file.is_dir():
        raise ParameterError(f"{file} is a folder; name a file", "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ParameterError("needs matplotlib: pip install sequoia-serving[bench]", "--plot")


def _promise(tree: PricedTree) -> str:
    return f"{shape(tree)}, predicted {tree.tokens_per_step:.2f} tokens/step and speedup {tree.speedup:.2f}"
