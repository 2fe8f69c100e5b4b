"""`sequoia bench steps`: what a step consists of, from the figures that every answer carries."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sequoia.cli.benchmarks.arguments import add_json, pair_title
from sequoia.cli.benchmarks.arm_figures import Spread
from sequoia.cli.benchmarks.arm_measuring import OFF
from sequoia.cli.benchmarks.asking import add_asking, asking
from sequoia.cli.benchmarks.bench_system import add_system, bench_system
from sequoia.cli.benchmarks.modes import TreeWorkload, add_modes, add_shapes, modes, trees
from sequoia.cli.benchmarks.step_figures import PARTS, StepFigures, measure
from sequoia.cli.figures import check_plot, new_table
from sequoia.cli.rule_timing import worker_to_dict
from sequoia.cli.steps import Steps
from sequoia.cli.up import stop_on_sigterm
from sequoia.client import Client
from sequoia.errors import FailedPrecondition
from sequoia.rules import COUPLED, GREEDY, SEQUOIA
from sequoia.v1.coordinator_pb2 import DescribePairResponse

_RULES = (GREEDY.name, SEQUOIA.name, COUPLED.name)
_SHAPES = (OFF, "chain of 4", "16x6")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_system(parser)
    add_modes(parser, _RULES)
    add_shapes(parser, _SHAPES)
    add_asking(parser)
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the parts of a step into this .svg or .png")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, draw."""
    workload = TreeWorkload(modes(arguments, _RULES), trees(arguments, _SHAPES), asking(arguments))
    if arguments.plot is not None:
        check_plot(arguments.plot)
    stop_on_sigterm()
    steps = Steps(Console(stderr=True))
    with bench_system(arguments, steps) as system, Client(system.address, **system.access) as client:
        pair = client.describe_pair()
        _check_draft(pair, workload)
        with steps.step(f"{workload.asking.num_answers} prompts, {len(workload.cells)} answers each") as on_progress:
            found = measure(client, workload, on_progress)
    if arguments.plot is not None:
        _draw(pair, found, arguments.plot)
    if arguments.json:
        print(json.dumps(_to_dict(pair, workload, found)))
    else:
        Console().print(*step_tables(found), sep="\n")
    return 0


def step_tables(found: Sequence[StepFigures]) -> list[Table]:
    """A table a mode: a row a part, a column a tree."""
    return [_table([each for each in found if each.mode == mode]) for mode in dict.fromkeys(f.mode for f in found)]


def _table(found: Sequence[StepFigures]) -> Table:
    table = new_table("ms of a step", *(each.shape for each in found))
    for name, title in PARTS.items():
        table.add_row(title, *(_milliseconds(each.parts[name]) for each in found))
    table.add_row("total", *(_milliseconds(each.total) for each in found), end_section=True)
    table.add_row("work by verify forward", *(_percent(each.work_share) for each in found))
    table.add_row("steps", *(str(each.num_steps) for each in found))
    table.title = found[0].mode.name
    table.caption = (
        "medians (quartiles) over answers, each a mean over its steps; everything else: two round trips, messages, "
        "scheduling, the loop; work by verify forward: both workers' on logits, trees and KV rows"
    )
    return table


def _milliseconds(found: Spread | None) -> str:
    return "-" if found is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*(each * 1e3 for each in found))


def _percent(found: Spread | None) -> str:
    return "-" if found is None else "{1:.1%} ({0:.1%} to {2:.1%})".format(*found)


def _check_draft(pair: DescribePairResponse, workload: TreeWorkload) -> None:
    if not pair.HasField("draft") and any(tree.size > 1 for tree in workload.trees.values()):
        raise FailedPrecondition(f"there is no draft worker at present; only --shape {OFF} is possible", "draft")


def _draw(pair: DescribePairResponse, found: Sequence[StepFigures], file: Path) -> None:
    from sequoia.cli.benchmarks.step_plot import plot

    draft = pair.draft
    target = pair.verify.model
    plot(found, pair_title(target, draft.model, draft.quantization) if pair.HasField("draft") else target, file)


def _to_dict(pair: DescribePairResponse, workload: TreeWorkload, found: Sequence[StepFigures]) -> dict[str, Any]:
    return {
        "target": worker_to_dict(pair.verify),
        "draft": worker_to_dict(pair.draft) if pair.HasField("draft") else None,
        "workload": asdict(workload.asking),
        "results": [each.to_dict() for each in found],
    }
