"""`sequoia bench planner`: how long the planner computes, beside the longest that it is meant to."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from sequoia.cli.figures import new_table
from sequoia.cli.steps import Steps
from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import optimal_tree
from sequoia.planner import PlanInputs, cached_frontiers, choose

# The demo vector in the repository of Chen et al. 2024 (arXiv 2402.12374), counted over 667 steps: noise and zeros.
DEMO = (
    *(0.6341829299926758, 0.10794602334499359, 0.056971512734889984, 0.022488756105303764, 0.019490255042910576),
    *(0.014992503449320793, 0.004497751127928495, 0.002998500829562545, 0.01199400331825018, 0.004497751127928495),
    *(0.007496251724660397, 0.004497751127928495, 0.00599700165912509, 0.002998500829562545, 0.0014992504147812724),
    *(0.002998500829562545, 0.0014992504147812724, 0.002998500829562545, 0.0, 0.002998500829562545),
    *(0.002998500829562545, 0.002998500829562545, 0.0, 0.0014992504147812724, 0.0, 0.0014992504147812724),
    *(0.0, 0.0, 0.0, 0.0014992504147812724, 0.0014992504147812724, 0.0014992504147812724),
)
MONOTONE = tuple(sorted(DEMO, reverse=True))
# The largest tree of the paper: 768 nodes, 18 levels.
SIZE, LEVELS = 768, 18
# Of the shape that a GPU has: flat while memory-bound, then linear.
_VERIFY_CURVE = LatencyCurve(
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, SIZE),
    (0.024, 0.0242, 0.0245, 0.025, 0.026, 0.028, 0.032, 0.042, 0.06, 0.1, 0.145),
)
_DRAFT_CURVE = LatencyCurve((1, 8, 32, 128, 256), (0.0005, 0.0006, 0.0007, 0.0012, 0.002))


@dataclass(frozen=True, slots=True)
class PlannerTiming:
    """Seconds of one computation, every time it was done, and the most that the median is meant to be."""

    name: str
    seconds: tuple[float, ...]
    target_seconds: float

    @property
    def median_seconds(self) -> float:
        """Of all rounds."""
        return median(self.seconds)

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**asdict(self), "median_seconds": self.median_seconds}


@dataclass(frozen=True, slots=True)
class Computation:
    """Something that is timed."""

    name: str
    target_seconds: float
    compute: Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's flags."""
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each computation (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """Time the planner's computations."""
    if arguments.rounds < 1:
        raise InvalidArgument(f"is {arguments.rounds}; it must be 1 or more", "rounds")
    with Steps(Console(stderr=True)).step("computing plans") as on_progress:
        found = measure(computations(), arguments.rounds, on_progress)
    if arguments.json:
        print(json.dumps([each.to_dict() for each in found]))
    else:
        Console().print(timings_table(found))
    return 0


def computations() -> list[Computation]:
    """What the planner spends its time on. None of it uses a second core."""
    monotone, noisy = (PlanInputs((each,), _VERIFY_CURVE, _DRAFT_CURVE) for each in (MONOTONE, DEMO))
    return [
        Computation("dynamic programming", 2.0, lambda: optimal_tree(DEMO, SIZE, LEVELS)),
        Computation("best first", 0.005, lambda: optimal_tree(MONOTONE, SIZE, LEVELS)),
        Computation("a whole plan, monotone acceptance", 0.05, lambda: choose(monotone, max_levels=LEVELS)),
        Computation("a whole plan, noisy acceptance", 5.0, lambda: choose(noisy, max_levels=LEVELS)),
    ]


def measure(
    timed: Sequence[Computation], num_rounds: int, on_progress: Callable[[int, int], None]
) -> list[PlannerTiming]:
    """Each computation in each round, so that a slow moment of the machine does not fall on one of them alone."""
    seconds = []
    for done in range(1, num_rounds + 1):
        seconds.append([_seconds(each.compute) for each in timed])
        on_progress(done, num_rounds)
    by_computation = zip(timed, zip(*seconds, strict=True), strict=True)
    return [PlannerTiming(each.name, rounds, each.target_seconds) for each, rounds in by_computation]


def _seconds(compute: Callable[[], object]) -> float:
    cached_frontiers.cache_clear()
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def timings_table(found: Sequence[PlannerTiming]) -> Table:
    """A row a computation."""
    table = new_table("computation", "ms, median (range)", "target ms")
    for each in found:
        low, middle, high = (
            f"{seconds * 1e3:.1f}" for seconds in (min(each.seconds), each.median_seconds, max(each.seconds))
        )
        table.add_row(each.name, f"{middle} ({low} to {high})", f"{each.target_seconds * 1e3:g}")
    table.caption = f"{SIZE} nodes, {LEVELS} levels, {len(DEMO)} ranks; {len(found[0].seconds)} rounds on one core"
    return table
