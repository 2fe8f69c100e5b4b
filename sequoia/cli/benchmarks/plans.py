"""`sequoia bench plans`: do plans keep their promises? Trees in turn on a running system, predicted and realised."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sequoia.alternatives import best_chain
from sequoia.cli.access_flags import access_of
from sequoia.cli.benchmarks.arguments import add_json, check_least
from sequoia.cli.benchmarks.prompt_set import prompt_set
from sequoia.cli.figures import new_table
from sequoia.cli.generate import add_address
from sequoia.cli.shape_names import in_short
from sequoia.cli.steps import Steps
from sequoia.client import Client, Message, Prompt, Speculation, SpeculationFigures
from sequoia.errors import FailedPrecondition
from sequoia.optimal_tree import optimal_tree
from sequoia.planner import MAX_LEVELS, PricedTree, TreePlan, price
from sequoia.topology import Topology, TreeShape
from sequoia.v1.coordinator_pb2 import DescribePairResponse

# Not those that the planner measures with: a plan shall hold for texts that it has not seen.
_TEXTS = (
    "The old lighthouse keeper climbed the stairs one last time and",
    "def merge_sorted(left: list[int], right: list[int]) -> list[int]:\n    ",
    "Question: How does a refrigerator keep food cold?\nAnswer:",
    "Packing list for a week in the mountains:\n- rain jacket\n- warm socks\n-",
    "Dear Mr Lindqvist,\n\nI am writing to ask whether the room is still",
    "The experiment was repeated three times. In the first run the temperature",
)
# What the coordinator makes of the plan by itself; predicted as planned, all its steps counted.
AUTO = "auto"
_NUM_RESAMPLES = 2000
# Fewer steps with the tree in an answer are those at its end.
_LEAST_STEPS = 3

Float = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure and its 95 % interval, from resampled answers."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What a tree was predicted to bring at a temperature, and what it brought."""

    temperature: float
    name: str
    predicted: PricedTree
    tokens_per_step: Interval
    seconds_per_token: Interval
    speedup: Interval
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        realised = {name: list(getattr(self, name)) for name in ("tokens_per_step", "seconds_per_token", "speedup")}
        return {
            "temperature": self.temperature,
            "name": self.name,
            "predicted": self.predicted.to_dict(),
            "realised": realised,
            "num_steps": self.num_steps,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_address(parser)
    temperature = "check the plan for this temperature; repeatable (default 0, 0.6 and 1)"
    parser.add_argument(
        "--temperature", dest="temperatures", action="append", type=float, metavar="T", help=temperature
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="answers a prompt (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="per answer (default %(default)s)")
    add_json(parser, "array")


def run(arguments: argparse.Namespace) -> int:
    """Measure and compare."""
    check_least(arguments, rounds=1, max_tokens=8)
    temperatures = tuple(arguments.temperatures or (0.0, 0.6, 1.0))
    steps = Steps(Console(stderr=True))
    found: list[Kept] = []
    with Client(arguments.address, **access_of(arguments)) as client:
        prompts = _prompts(client.describe_pair()) * arguments.rounds
        for temperature in temperatures:
            plan = _plan(client, temperature)
            with steps.step(f"temperature {temperature:g}: {len(prompts)} prompts") as on_progress:
                found += measure(client, plan, temperature, prompts, arguments.max_tokens, on_progress)
    if arguments.json:
        print(json.dumps([each.to_dict() for each in found]))
    else:
        Console().print(kept_table(found))
    return 0


def measure(
    client: Client,
    plan: TreePlan,
    temperature: float,
    prompts: Sequence[Prompt],
    max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[Kept]:
    """Every prompt answered with every tree in turn; each prompt begins with the next tree."""
    trees = {**compared(plan), AUTO: plan.chosen.shape}
    names = list(trees)
    answers: dict[str, list[SpeculationFigures]] = {name: [] for name in names}
    for index, prompt in enumerate(prompts):
        on_progress(index, len(prompts))
        first = index % len(names)
        for name in names[first:] + names[:first]:
            how: Speculation = "auto" if name == AUTO else trees[name] if trees[name].size > 1 else "off"
            generation = client.generate(
                prompt, max_tokens=max_tokens, temperature=temperature, ignore_eos=True, speculation=how
            )
            answers[name].append(generation.speculation)
    return _kept(
        plan,
        temperature,
        trees,
        {name: _totals(None if name == AUTO else trees[name], each) for name, each in answers.items()},
    )


def _prompts(pair: DescribePairResponse) -> list[Prompt]:
    """Conversations, one a category, where the target can have them; texts to go on with where not."""
    if not pair.has_chat_template:
        return list(_TEXTS)
    return [_TEXTS[0], *([Message("user", each.text)] for each in prompt_set(1))]


def compared(plan: TreePlan) -> dict[str, TreeShape]:
    """Off, the plan's best tree, a chain, a smaller and a larger tree; each shape once."""
    inputs, best = plan.inputs, plan.best_tree
    trees: dict[str, TreeShape | None] = {"off": Topology.root_only(), "best tree": best.shape if best else None}
    trees["best chain"] = best_chain(inputs, MAX_LEVELS)
    trees["reduced"] = plan.reduced.shape if plan.reduced else None
    if best is not None:
        size = min(2 * best.shape.size, inputs.verify_curve.max_tokens)
        trees["twice as large"] = optimal_tree(inputs.acceptance, size, min(best.shape.levels + 2, MAX_LEVELS))
    seen: dict[TreeShape, str] = {}
    for name, tree in trees.items():
        if tree is not None:
            seen.setdefault(tree, name)
    return {name: tree for tree, name in seen.items()}


def kept_table(found: Sequence[Kept]) -> Table:
    """A row a tree."""
    table = new_table(
        "T", "tree", "tokens/step", "realised", "error", "ms/token", "realised", "error", "speedup", "realised"
    )
    for each in found:
        tree = each.predicted
        table.add_row(
            f"{each.temperature:g}",
            f"{each.name}: {in_short(tree.shape)}",
            f"{tree.tokens_per_step:.2f}",
            _shown(each.tokens_per_step),
            _error(tree.tokens_per_step, each.tokens_per_step),
            f"{tree.seconds_per_token * 1e3:.1f}",
            _shown(each.seconds_per_token, 1e3),
            _error(tree.seconds_per_token, each.seconds_per_token),
            f"{tree.speedup:.2f}",
            _shown(each.speedup),
        )
    table.caption = "realised: steps with that tree; times: the median answer; brackets: 95 %, answers resampled"
    return table


def _plan(client: Client, temperature: float) -> TreePlan:
    document = client.explain(temperature=temperature).plan_json
    if not document:
        raise FailedPrecondition(f"there is no plan for temperature {temperature:g}; run `sequoia plan` first", "plan")
    return TreePlan.from_json(document)


def _totals(tree: TreeShape | None, answers: Sequence[SpeculationFigures]) -> Float:
    """(answers, 3): steps with that very tree, their tokens, their seconds; None stands for all steps."""
    rows = np.zeros((len(answers), 3))
    for row, figures in zip(rows, answers, strict=True):
        if tree is None:
            num_tokens = figures.num_steps + figures.num_accepted_tokens
            row[:] = figures.num_steps, num_tokens, figures.stage_seconds.total
        for usage in figures.trees:
            if usage.shape == tree and usage.num_steps >= _LEAST_STEPS:
                row[:] = usage.num_steps, usage.num_tokens, usage.stage_seconds.total
    return rows


def _kept(plan: TreePlan, temperature: float, trees: dict[str, TreeShape], totals: dict[str, Float]) -> list[Kept]:
    """Tokens per step of all steps; of a step's seconds, and of their ratio to a plain step's, the median answer's."""
    generator = np.random.default_rng(0)
    num_answers = len(totals["off"])
    # All answers first as they are, then resampled; the same answers for every tree, which keeps the pairs.
    picks = np.vstack([np.arange(num_answers), generator.integers(num_answers, size=(_NUM_RESAMPLES, num_answers))])
    # Of an answer without a whole step nothing is known, of a tree without one nothing is said.
    totals = {name: np.where(each[:, :1] > 0.0, each, np.nan) for name, each in totals.items()}
    step_seconds = {name: each[:, 2] / each[:, 0] for name, each in totals.items()}
    kept = []
    for name, tree in trees.items():
        if np.isnan(totals[name]).all():
            continue
        steps, tokens, _ = np.nansum(np.moveaxis(totals[name][picks], -1, 0), axis=2)
        steps[steps == 0.0] = np.nan
        per_step = tokens / steps
        # What steps with one tree bring differs by chance alone, and is pooled; those of `auto` differ in kind.
        brought = (totals[name][:, 1] / totals[name][:, 0])[picks] if name == AUTO else per_step[:, None]
        seconds = np.nanmedian(step_seconds[name][picks] / brought, axis=1)
        speedup = np.nanmedian((step_seconds["off"] / step_seconds[name])[picks] * brought, axis=1)
        kept.append(
            Kept(
                temperature,
                name,
                price(tree, plan.inputs),
                _interval(per_step),
                _interval(seconds),
                _interval(speedup),
                int(steps[0]),
            )
        )
    return kept


def _interval(values: Float) -> Interval:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))


def _shown(figure: Interval, scale: float = 1.0) -> str:
    digits = 1 if scale > 1.0 else 2
    return f"{figure.value * scale:.{digits}f} ({figure.low * scale:.{digits}f} to {figure.high * scale:.{digits}f})"


def _error(predicted: float, realised: Interval) -> str:
    return f"{predicted / realised.value - 1.0:+.1%}"
