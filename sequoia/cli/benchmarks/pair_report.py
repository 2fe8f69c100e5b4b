"""A benchmark of two systems from flags to report, as `sequoia bench ahead` and `placement` share it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sequoia.cli.benchmarks.arguments import add_json
from sequoia.cli.benchmarks.arm_figures import Spread
from sequoia.cli.benchmarks.asking import add_asking, asking
from sequoia.cli.benchmarks.modes import TreeWorkload, add_modes, add_shapes, modes, trees
from sequoia.cli.benchmarks.pair_figures import PairFigures, SideFigures, figures_of
from sequoia.cli.benchmarks.two_systems import Compared, Side, compare
from sequoia.cli.deployment import DeploymentSettings
from sequoia.cli.figures import new_table
from sequoia.cli.rule_timing import worker_to_dict
from sequoia.cli.steps import Steps
from sequoia.cli.up import add_model_arguments, deployment_settings, stop_on_sigterm
from sequoia.errors import InvalidArgument
from sequoia.rules import GREEDY

_RULES = (GREEDY.name,)


def add_pair_arguments(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    """The models, what is asked of both sides, and how they take turns."""
    add_model_arguments(parser.add_argument_group("the systems", "both of the same models"))
    add_modes(parser, _RULES)
    add_shapes(parser, shapes)
    add_asking(parser)
    apart = "stop one system before the other starts, twice a round (default: both up, one of them idle, if they fit)"
    parser.add_argument("--one-at-a-time", action="store_true", help=apart)
    add_json(parser)


def pair_workload(arguments: argparse.Namespace, shapes: Sequence[str]) -> TreeWorkload:
    """Raises InvalidArgument naming the flag that is wrong."""
    return TreeWorkload(modes(arguments, _RULES), trees(arguments, shapes), asking(arguments))


def pair_settings(arguments: argparse.Namespace) -> DeploymentSettings:
    """What both sides have in common. Raises InvalidArgument naming `no-draft`."""
    if arguments.no_draft:
        raise InvalidArgument("this benchmark is about draft and target", "no-draft")
    return deployment_settings(arguments, "127.0.0.1:0", None)


def run_pair(arguments: argparse.Namespace, sides: tuple[Side, Side], workload: TreeWorkload) -> int:
    """Start, ask, print. Figures of the second side are divided by those of the first."""
    stop_on_sigterm()
    compared = compare(sides, workload, Steps(Console(stderr=True)), one_at_a_time=arguments.one_at_a_time)
    found = figures_of((sides[0].name, sides[1].name), workload, compared.answers)
    if arguments.json:
        print(json.dumps(_to_dict(compared, workload, found)))
    else:
        Console().print(pair_table(found))
    return 0


def pair_table(found: Sequence[PairFigures]) -> Table:
    """Two rows a mode and tree, one a side."""
    first, second = found[0].first.name, found[0].second.name
    ratio = f"{second} / {first}"
    table = new_table(
        "rule", "shape", "side", "hits", "drafted", "draft, ms", "verify, ms", "ms/token", ratio, "same text"
    )
    for each in found:
        table.add_row(each.mode.name, each.shape, *_side(each.first), _shown(each.ratio, 1.0, 3), _same(each))
        table.add_row("", "", *_side(each.second), "", "", end_section=True)
    table.caption = (
        "medians (quartiles) over answers; draft, verify: of a step, in that worker; ms/token after the first token; "
        f"{ratio}: the median of pairs that answer one prompt, above 1 where {first} is faster; hits: of drafting "
        "ahead; drafted: steps with a tree, the others are plain, mostly those before the draft has read the prompt"
    )
    return table


def _side(side: SideFigures) -> tuple[str, ...]:
    hits = f"{side.num_ahead_hits} of {side.num_ahead_attempts}" if side.num_ahead_attempts else "-"
    times = (_shown(each, 1e3, 1) for each in (side.draft_seconds, side.verify_seconds, side.seconds_per_token))
    return side.name, hits, f"{side.num_drafted_steps} of {side.num_steps}", *times


def _same(figures: PairFigures) -> str:
    num_equal = figures.num_equal_texts
    return "-" if num_equal is None else f"{num_equal} of {figures.num_pairs}"


def _shown(found: Spread | None, scale: float, digits: int) -> str:
    if found is None:
        return "-"
    low, middle, high = (f"{each * scale:.{digits}f}" for each in found)
    return f"{middle} ({low} to {high})"


def _to_dict(compared: Compared, workload: TreeWorkload, found: Sequence[PairFigures]) -> dict[str, object]:
    return {
        "target": worker_to_dict(compared.pair.verify),
        "draft": worker_to_dict(compared.pair.draft),
        "workload": asdict(workload.asking),
        "were_together": compared.were_together,
        "results": [each.to_dict() for each in found],
    }
