"""`sequoia bench roofline`: the least time that a forward could take on this machine, and the time that it takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sequoia.cli.benchmarks.arguments import add_draft, add_dtype, add_json, add_target, check_least
from sequoia.cli.benchmarks.plots import BLUE, ORANGE, label, legend_below, panels
from sequoia.cli.figures import check_plot, new_table
from sequoia.cli.steps import Steps
from sequoia.config import ENGINES, QUANTIZATIONS, num_cores
from sequoia.roofline import Quartiles, Roofline, Sample, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sequoia.engine.roofline import Subject

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class ModelRoofline:
    """A model's roofline, and which model it is."""

    reference: str
    dtype: str
    quantization: str
    engine: str
    roofline: Roofline

    @property
    def title(self) -> str:
        """The model in a few words."""
        precision = self.dtype if self.quantization == "none" else self.quantization
        return f"{Path(self.reference).name} in {precision}, {self.engine} engine"

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        roofline = self.roofline
        return {
            "model": self.reference,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "engine": self.engine,
            **asdict(roofline.cost),
            "median_roof": asdict(roofline.median_roof),
            "best_roof": asdict(roofline.best_roof),
            "compute_bound_from": roofline.compute_bound_from,
            "forwards": [
                {
                    "num_tokens": each.num_tokens,
                    "floor_seconds": each.floor.seconds,
                    "bound": each.floor.bound,
                    "seconds": each.seconds._asdict(),
                    "ratio": each.ratio._asdict(),
                }
                for each in roofline.forwards
            ],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser, "--model")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the target")
    add_draft(parser, required=False)
    add_dtype(parser)
    parser.add_argument(
        "--engines", type=_engines, default=("auto",), metavar="LIST", help=f"of {', '.join(ENGINES)}; each in its turn"
    )
    parser.add_argument(
        "--threads", type=int, default=num_cores(), metavar="N", help="of the CPU (default: every core)"
    )
    parser.add_argument("--context", type=int, default=64, metavar="N", help="tokens before (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of each width (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw forwards over floor into this .svg or .png")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load the models, measure, print."""
    check_least(arguments, threads=1, context=0, rounds=1)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    found = _measured(arguments)
    if arguments.json:
        settings = {"num_threads": arguments.threads, "num_context_tokens": arguments.context}
        models = [each.to_dict() for each in found]
        print(json.dumps({**settings, "num_rounds": arguments.rounds, "models": models}))
    else:
        Console().print(*map(roofline_table, found))
    if arguments.plot:
        plot_rooflines(found, arguments.plot)
    return 0


def _measured(arguments: argparse.Namespace) -> list[ModelRoofline]:
    # Imported here: `--help` needs no torch.
    from sequoia.engine.roofline import measure

    steps = Steps(Console(stderr=True))
    load = partial(_load, arguments, steps)
    subjects = [load(arguments.target, arguments.quantization, engine, is_draft=False) for engine in arguments.engines]
    if arguments.draft is not None:
        engine = arguments.engines[0]
        subjects.append(load(arguments.draft, arguments.draft_quantization, engine, is_draft=True))
    with steps.step(f"timing forwards of {len(WIDTHS)} widths in {arguments.rounds} rounds") as on_progress:
        samples = measure(subjects, WIDTHS, arguments.rounds, on_progress)
    return [_named(subject, found) for subject, found in zip(subjects, samples, strict=True)]


def _load(
    arguments: argparse.Namespace, steps: Steps, reference: str, quantization: str, engine: str, *, is_draft: bool
) -> Subject:
    from sequoia.engine.decoders import Arithmetic
    from sequoia.engine.roofline import load_subject

    arithmetic = Arithmetic(engine, quantization, is_draft=is_draft, num_threads=arguments.threads)

    with steps.step(f"loading {reference}"):
        return load_subject(
            reference,
            arithmetic,
            dtype=arguments.dtype,
            num_context_tokens=arguments.context,
            max_tokens=max(WIDTHS),
        )


def _engines(names: str) -> tuple[str, ...]:
    asked = tuple(names.split(","))
    if unknown := sorted(set(asked) - set(ENGINES)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(ENGINES)}")
    return asked


def _named(subject: Subject, samples: Sequence[Sample]) -> ModelRoofline:
    model, roofline = subject.model, summarise(subject.cost, samples)
    quantization = subject.arithmetic.quantization
    return ModelRoofline(model.reference, model.dtype_name, quantization, subject.decoder_name, roofline)


def roofline_table(found: ModelRoofline) -> Table:
    """A row a width."""
    table = new_table("n", "floor ms", "bound by", "ms, median (quartiles)", "times the floor")
    for each in found.roofline.forwards:
        floor, milliseconds = _number(each.floor.seconds * 1e3), Quartiles(*(seconds * 1e3 for seconds in each.seconds))
        table.add_row(str(each.num_tokens), floor, each.floor.bound, _text(milliseconds), _text(each.ratio))
    table.title = found.title
    table.caption = (
        f"{_speeds(found.roofline)}; compute takes over at n = {found.roofline.compute_bound_from}. "
        "Each forward is divided by the floor of its own moment."
    )
    return table


def _text(quartiles: Quartiles) -> str:
    low, middle, high = map(_number, quartiles)
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _speeds(roofline: Roofline) -> str:
    middle, best = roofline.median_roof, roofline.best_roof
    return (
        f"reads {middle.bytes_per_second / 1e9:,.1f} GB/s (best {best.bytes_per_second / 1e9:,.1f}), "
        f"multiplies {middle.flops_per_second / 1e9:,.0f} GFLOP/s (best {best.flops_per_second / 1e9:,.0f})"
    )


def plot_rooflines(found: Sequence[ModelRoofline], file: Path) -> None:
    """A panel a model: forwards over their floor, both logarithmic."""
    with panels(len(found), "Seconds of a forward over the least that this machine allows", file) as (figure, axes):
        for panel, each in zip(axes, found, strict=True):
            _draw(panel, each.roofline)
            label(panel, f"{each.title}\n{_speeds(each.roofline)}", "tokens in the forward", "milliseconds")
        legend_below(figure, axes[0])


def _draw(axes: Axes, roofline: Roofline) -> None:
    forwards = roofline.forwards
    widths = [each.num_tokens for each in forwards]
    low, middle, high = (
        [seconds * 1e3 for seconds in each] for each in zip(*(each.seconds for each in forwards), strict=True)
    )
    every = range(1, max(widths) + 1)
    floors = [roofline.median_roof.floor(roofline.cost, n).seconds * 1e3 for n in every]
    axes.plot(every, floors, label="floor", color=ORANGE[0])
    axes.plot(widths, middle, label="measured, with quartiles", color=BLUE[0], marker=BLUE[1])
    axes.fill_between(widths, low, high, color=BLUE[0], alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.set_xticks(widths, [str(n) for n in widths])
