"""`sequoia bench seeds`: how often a seeded token changes with the forward that it is computed in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from coordinator.planner_prompts import TEXTS
from sequoia.cli.benchmarks.arguments import add_dtype, add_engine, add_json, add_target, check_least
from sequoia.cli.figures import new_table
from sequoia.cli.steps import Steps
from sequoia.sampling import Sampling

if TYPE_CHECKING:
    from sequoia.cli.seed_stability import Stability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser)
    add_dtype(parser)
    add_engine(parser)
    parser.add_argument("--deterministic", action="store_true", help="as a worker with --deterministic computes")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="texts (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="per text (default %(default)s)")
    add_json(parser, "array")


def run(arguments: argparse.Namespace) -> int:
    """Load the target, measure, print."""
    check_least(arguments, prompts=1, tokens=1)
    # Imported here: `--help` needs no torch.
    from sequoia.cli import seed_stability, subject

    steps = Steps(Console(stderr=True))
    with steps.step(f"loading {arguments.target}"):
        target = subject.load(
            arguments.target, dtype=arguments.dtype, engine=arguments.engine, deterministic=arguments.deterministic
        )
    prompts = [target.codec.encode(prompt) for prompt in TEXTS[: arguments.prompts]]
    measuring = seed_stability.measure(target, prompts, Sampling(seed=0), arguments.tokens)
    found: list[Stability] = []
    with steps.step("computing the same tokens in several ways") as on_progress:
        for each in measuring:
            found.append(each)
            on_progress(len(found), seed_stability.NUM_WAYS)
    if arguments.json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        Console().print(seeds_table(found))
    return 0


def seeds_table(found: Sequence[Stability]) -> Table:
    """A row a way to compute the same tokens."""
    table = new_table("way", "tokens", "flips", "largest difference of a logit", "ms/token")
    for each in found:
        flips = f"{each.num_flips} ({each.num_flips / each.num_tokens:.1%})"
        difference, milliseconds = f"{each.max_logit_difference:.3g}", f"{each.seconds_per_token * 1e3:.0f}"
        table.add_row(each.way, str(each.num_tokens), flips, difference, milliseconds)
    return table
