"""`sequoia bench dynamic`: what it brings to choose a tree's shape anew at every step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sequoia.acceptance import PRIOR
from sequoia.cli.benchmarks.arguments import add_json, check_least
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.bench_system import add_system, planned_system
from sequoia.cli.benchmarks.dynamic_figures import Duel, DuelFigures, Ratio, measure
from sequoia.cli.benchmarks.modes import Mode, add_modes, modes
from sequoia.cli.benchmarks.own_arms import named_shape
from sequoia.cli.benchmarks.prompt_set import prompt_set
from sequoia.cli.figures import new_table
from sequoia.cli.rule_timing import worker_to_dict
from sequoia.cli.shape_names import in_short
from sequoia.cli.steps import Steps
from sequoia.cli.up import stop_on_sigterm
from sequoia.client import Client
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.optimal_tree import Rows, optimal_tree
from sequoia.planner import TreePlan
from sequoia.rules import COUPLED, GREEDY, RULES
from sequoia.topology import DynamicShape

_RULES, _SHAPES = (GREEDY.name, COUPLED.name), ("16x5d4",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_system(parser)
    add_modes(parser, _RULES)
    shape = f"NODESxLEVELSdWIDTH; repeatable (default {', '.join(_SHAPES)})"
    parser.add_argument("--shape", dest="shapes", action="append", metavar="SHAPE", help=shape)
    steps = "with each tree, at least; greedy texts are written once (default %(default)s)"
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help=steps)
    parser.add_argument("--prompts", type=int, metavar="N", help="per category (default: all)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="per answer (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="prompts are text to continue, no chat template")
    parser.add_argument("--quick", action="store_true", help="hasty plans, for a first look")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and show."""
    check_least(arguments, steps=1, max_tokens=2)
    shapes, asked = _shapes(arguments.shapes or _SHAPES), modes(arguments, _RULES)
    if refused := [mode.rule for mode in asked if not RULES[mode.rule].takes_any_shape]:
        raise InvalidArgument(f"{refused[0]} is not exact with dynamic trees", "rule")
    asking = Asking(prompt_set(arguments.prompts), arguments.raw, 1, arguments.max_tokens)
    stop_on_sigterm()
    steps = Steps(Console(stderr=True))
    temperatures = tuple(dict.fromkeys(mode.temperature for mode in asked))
    with planned_system(arguments, steps, temperatures) as system, Client(system.address, **system.access) as client:
        pair = client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present", "draft")
        found = [_measured(client, mode, shape, asking, arguments.steps, steps) for mode in asked for shape in shapes]
    if arguments.json:
        workers = {"target": worker_to_dict(pair.verify), "draft": worker_to_dict(pair.draft)}
        print(json.dumps({**workers, "workload": asdict(asking), "results": [each.to_dict() for each in found]}))
    else:
        Console().print(dynamic_table(found))
    return 0


def dynamic_table(found: Sequence[DuelFigures]) -> Table:
    """A row a mode and shape."""
    table = new_table("rule", "shape", "steps", "planned", "dynamic", "tokens", "seconds")
    for column in table.columns:
        column.no_wrap = True
    for each in found:
        table.add_row(
            each.duel.mode.name,
            in_short(each.duel.dynamic),
            " and ".join(map(str, each.num_steps)),
            *(f"{tokens:.2f}" for tokens in each.tokens_per_step),
            _change(each.tokens_ratio),
            _change(each.seconds_ratio),
        )
    table.caption = (
        "tokens per step of the best planned tree of those nodes and levels, and of the dynamic one; what that one "
        "changes in tokens per step and in seconds per token, with standard errors: pairs of answers to one prompt, "
        "resampled"
    )
    return table


def _change(ratio: Ratio) -> str:
    return f"{ratio.value - 1.0:+.1%} ± {ratio.error:.1%}"


def _shapes(names: Sequence[str]) -> list[DynamicShape]:
    shapes = [named_shape(name) for name in dict.fromkeys(names)]
    dynamic = [shape for shape in shapes if isinstance(shape, DynamicShape)]
    if len(dynamic) < len(shapes):
        raise InvalidArgument(f"{', '.join(names)}: give NODESxLEVELSdWIDTH, as in {_SHAPES[0]}", "shape")
    return dynamic


def _measured(
    client: Client, mode: Mode, shape: DynamicShape, asking: Asking, num_steps: int, steps: Steps
) -> DuelFigures:
    duel = Duel(mode, shape, optimal_tree(_acceptance(client, mode), shape.size, shape.levels))
    with steps.step(f"{mode.name}, {shape}: steps with each tree") as on_progress:
        return measure(client, duel, asking, num_steps, on_progress)


def _acceptance(client: Client, mode: Mode) -> Rows:
    """Of the plan in force; what serves without one."""
    document = client.explain(temperature=mode.temperature, rule=mode.rule).plan_json
    return TreePlan.from_json(document).inputs.acceptance if document else (PRIOR,)
