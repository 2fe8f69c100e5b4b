"""`sequoia bench robustness`: what each rule accepts of a pair's draft over temperature, as a table and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from coordinator.planner_prompts import TEXTS
from sequoia.cli.benchmarks.arguments import (
    add_draft,
    add_dtype,
    add_json,
    add_target,
    check_least,
    pair_title,
)
from sequoia.cli.benchmarks.plots import BLUE, GREEN, ORANGE, PURPLE, label, legend_below, panels
from sequoia.cli.figures import check_plot, new_table
from sequoia.cli.steps import Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sequoia.cli.robustness import Acceptance

TEMPERATURES = (0.01, 0.2, 0.4, 0.6, 0.8, 1.0, 1.1)

# Chen et al. 2024 (arXiv 2402.12374): acceptance of 5 children in per cent by temperature, for a pair of their own.
_PAPER_CHILDREN = 5
_PAPER_TEMPERATURES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
_PAPER = {
    "sequoia": (85.67, 85.69, 85.53, 85.14, 84.67, 84.32, 84.06, 83.34, 82.78, 82.3, 81.69, 80.94),
    "naive top-k": (85.67, 85.62, 85.28, 84.64, 83.65, 82.29, 80.55, 78.44, 76.0, 73.25, 70.23, 66.95),
}
_LOOKS = {"sequoia": BLUE, "coupled": GREEN, "specinfer": PURPLE, "naive top-k": ORANGE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser)
    add_draft(parser)
    add_dtype(parser)
    parser.add_argument("--positions", type=int, default=256, metavar="N", help="tokens of text (default %(default)s)")
    parser.add_argument("--children", type=int, default=5, metavar="K", help="at each position (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into this .svg or .png")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load the pair, measure, print."""
    check_least(arguments, positions=1, children=1)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    # Imported here: `--help` needs no torch.
    from sequoia.cli import robustness

    steps = Steps(Console(stderr=True))
    target, draft, quantization = arguments.target, arguments.draft, arguments.draft_quantization
    with steps.step(f"loading {target} and {draft}"):
        pair = robustness.load_pair(target, draft, draft_quantization=quantization, dtype=arguments.dtype)
    with steps.step(f"writing {arguments.positions} tokens, and both models' logits for them"):
        texts = robustness.write_texts(pair.target, TEXTS, arguments.positions)
        logits = robustness.pair_logits(pair, texts, arguments.positions)
    with steps.step("trying the rules") as on_progress:
        found = robustness.measure(logits, TEMPERATURES, arguments.children, on_progress)
    if arguments.json:
        print(json.dumps(robustness.to_dict(pair, found, arguments.positions)))
    else:
        Console().print(robustness_table(found))
    if arguments.plot is not None:
        plot_robustness(found, pair_title(target, draft, quantization), arguments.plot)
    return 0


def robustness_table(found: Sequence[Acceptance]) -> Table:
    """A row a temperature, a column a rule."""
    rules = list(dict.fromkeys(each.rule for each in found))
    table = new_table("temperature", *rules)
    cells = {(each.temperature, each.rule): f"{each.total:.1%} / {each.tokens_per_step:.2f}" for each in found}
    for temperature in dict.fromkeys(each.temperature for each in found):
        table.add_row(f"{temperature:g}", *(cells[temperature, rule] for rule in rules))
    error = max(each.standard_error for each in found)
    table.caption = f"acceptance of all children (standard error at most {error:.1%}) / predicted tokens per step"
    return table


def plot_robustness(found: Sequence[Acceptance], title: str, file: Path) -> None:
    """Acceptance and tokens per step over temperature, beside the paper's acceptance, into an SVG or PNG file."""
    num_children = len(found[0].by_rank)
    with panels(2, title, file) as (figure, (left, right)):
        for rule in _LOOKS:
            _draw_rule(left, right, [each for each in found if each.rule == rule])
        if num_children == _PAPER_CHILDREN:
            _draw_paper(left)
        label(left, f"Acceptance of {num_children} children (band: standard error)", "temperature", "%")
        label(right, "Predicted for the best tree of 16 nodes", "temperature", "tokens per step")
        legend_below(figure, left)


def _draw_rule(left: Axes, right: Axes, found: Sequence[Acceptance]) -> None:
    rule = found[0].rule
    colour, marker = _LOOKS[rule]
    temperatures = [each.temperature for each in found]
    least, acceptance, most = (
        [100 * (each.total + sign * each.standard_error) for each in found] for sign in (-1, 0, 1)
    )
    left.fill_between(temperatures, least, most, color=colour, alpha=0.08, linewidth=0)
    for axes, values in ((left, acceptance), (right, [each.tokens_per_step for each in found])):
        axes.plot(temperatures, values, color=colour, marker=marker, label=rule)


def _draw_paper(axes: Axes) -> None:
    for rule, published in _PAPER.items():
        of_paper = f"{rule}, the pair of Chen et al. 2024"
        axes.plot(_PAPER_TEMPERATURES, published, "--", linewidth=1, color=_LOOKS[rule][0], label=of_paper)
