"""`sequoia bench shapes`: which tree pays, replayed along texts that the target wrote, beside what was predicted."""

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
    check_folder,
    check_least,
    pair_title,
)
from sequoia.cli.benchmarks.candidates import PLANNER
from sequoia.cli.benchmarks.evaluation import CHOICE, Curves, Evaluation, ShapeResult, evaluate
from sequoia.cli.benchmarks.plots import BLUE, GREEN, ORANGE, label, legend_below, panels
from sequoia.cli.benchmarks.traces import Recording
from sequoia.cli.figures import check_plot, new_table
from sequoia.cli.steps import Steps
from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPERATURES = (0.0, 0.6, 1.0)
# The models of acceptance that table and plot show; JSON has all.
_LOOKS = {"pooled": BLUE, "by depth": GREEN, PLANNER: ORANGE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser, required=False)
    add_draft(parser, required=False)
    add_dtype(parser)
    temperature = "repeatable (default 0, 0.6 and 1, or all of the traces)"
    parser.add_argument(
        "--temperature", dest="temperatures", action="append", type=float, metavar="T", help=temperature
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="per temperature (default %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the traces in this JSON file")
    parser.add_argument("--traces", type=Path, metavar="FILE", help="read them from it: no model is loaded")
    curve = 'JSON {"1": seconds, "2": ...} by tokens in a forward of the'
    parser.add_argument("--verify-curve", type=Path, metavar="FILE", help=f"{curve} target; adds seconds per token")
    parser.add_argument("--draft-curve", type=Path, metavar="FILE", help=f"{curve} draft")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw replayed over predicted into this .svg or .png")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record or read traces, replay, print."""
    check_least(arguments, tokens=1)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    check_folder(arguments.save, "save")
    curves = _curves(arguments)
    recording = Recording.read(arguments.traces) if arguments.traces else _record(arguments)
    if arguments.save:
        recording.save(arguments.save)
    asked = arguments.temperatures
    found = [evaluate(trace, curves) for trace in recording.traces if not asked or trace.temperature in asked]
    if not found:
        raise InvalidArgument(f"there are no traces of {asked}", "temperature")
    if arguments.json:
        results = [each.to_dict() for each in found]
        print(json.dumps({"target": recording.target, "draft": recording.draft, "results": results}))
    else:
        Console().print(*map(shapes_table, found))
    if arguments.plot:
        target, draft = recording.target["reference"], recording.draft["reference"]
        plot_shapes(found, pair_title(target, draft, recording.draft["quantization"]), arguments.plot)
    return 0


def _record(arguments: argparse.Namespace) -> Recording:
    for name in ("target", "draft"):
        if getattr(arguments, name) is None:
            raise InvalidArgument("is needed where there are no --traces to read", name)
    # Imported here: traces need no torch.
    from sequoia.cli.benchmarks.recorder import record
    from sequoia.cli.robustness import load_pair

    steps = Steps(Console(stderr=True))
    target, draft, quantization = arguments.target, arguments.draft, arguments.draft_quantization
    temperatures = arguments.temperatures or _TEMPERATURES
    with steps.step(f"loading {target} and {draft}"):
        pair = load_pair(target, draft, draft_quantization=quantization, dtype=arguments.dtype)
    with steps.step(f"writing {arguments.tokens} tokens at each of {len(temperatures)} temperatures") as on_progress:
        return record(pair, TEXTS, temperatures, arguments.tokens, on_progress)


def _curves(arguments: argparse.Namespace) -> Curves | None:
    files = {"verify-curve": arguments.verify_curve, "draft-curve": arguments.draft_curve}
    if not any(files.values()):
        return None
    for name, file in files.items():
        if file is None:
            raise InvalidArgument("is needed beside the other curve", name)
    return Curves(*(_curve(name, file) for name, file in files.items()))


def _curve(name: str, file: Path) -> LatencyCurve:
    try:
        curve = LatencyCurve.from_dict(json.loads(file.read_text()))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{file} is not a latency curve: {error}", name) from error
    if curve.num_tokens[0] != 1:
        raise InvalidArgument(f"{file} must start at width 1: plain decoding is compared with it", name)
    return curve


def shapes_table(found: Evaluation) -> Table:
    """A row a shape."""
    has_seconds = found.choice_place is not None
    seconds = ("ms/token", "replayed") if has_seconds else ()
    table = new_table("shape", "size", "tokens/step", "95 %", *_LOOKS, *seconds)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for each in found.shapes:
        low, high = each.interval
        figures = (_milliseconds(each.predicted_seconds), _milliseconds(each.replayed_seconds)) if has_seconds else ()
        by_model = (f"{each.errors[model]:+.1%}" for model in _LOOKS)
        table.add_row(each.name, _size(each), f"{each.realised:.2f}", f"{low:.2f} to {high:.2f}", *by_model, *figures)
    table.title = f"temperature {found.temperature:g}, {found.num_tokens} tokens"
    table.caption = _caption(found)
    return table


def _caption(found: Evaluation) -> str:
    errors = ", ".join(f"{model} {error:.1%}" for model, error in found.mean_errors.items())
    place = "" if found.choice_place is None else f"; {CHOICE} is number {found.choice_place} by replayed time"
    return (
        f"nodes x levels; tokens per step as replayed; how far the prediction of each text from the others "
        f"is off, by model of acceptance. Mean absolute error: {errors}{place}"
    )


def _size(shape: ShapeResult) -> str:
    """Nodes and levels; over the texts, the least and the most of them."""
    parts = zip(*((fold.topology.size, fold.topology.levels) for fold in shape.folds), strict=True)
    return " x ".join("-".join(map(str, dict.fromkeys((min(part), max(part))))) for part in parts)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def plot_shapes(found: Sequence[Evaluation], title: str, file: Path) -> None:
    """Replayed tokens per step over predicted ones, a panel a temperature, into an SVG or PNG file."""
    with panels(len(found), title, file) as (figure, grid):
        for axes, evaluation in zip(grid, found, strict=True):
            _draw(axes, evaluation)
            label(axes, f"temperature {evaluation.temperature:g}", "predicted", "replayed (95 %) tokens per step")
        legend_below(figure, grid[0])


def _draw(axes: Axes, evaluation: Evaluation) -> None:
    shapes = [each for each in evaluation.shapes if each.name != CHOICE]
    realised = [each.realised for each in shapes]
    bounds = [
        [abs(bound - value) for bound, value in zip(side, realised, strict=True)]
        for side in zip(*(each.interval for each in shapes), strict=True)
    ]
    for size, (model, (colour, marker)) in zip((9, 6, 4), _LOOKS.items(), strict=True):
        predicted = [each.predicted[model] for each in shapes]
        axes.errorbar(
            predicted, realised, bounds, label=model, color=colour, marker=marker, ms=size, ls="", lw=1, mfc="none"
        )
    for index, each in enumerate(sorted(shapes, key=lambda shape: shape.realised)):
        place, side = ((6, -9), "left") if index % 2 else ((-6, 5), "right")
        point = each.predicted[PLANNER], each.realised
        axes.annotate(each.name, point, place, textcoords="offset points", size=6, horizontalalignment=side)
    axes.axline((1.0, 1.0), slope=1.0, color="grey", linewidth=1, linestyle="--")
