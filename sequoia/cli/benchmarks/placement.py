"""`sequoia bench placement`: all in one process, the models taking turns, against a process each."""

from __future__ import annotations

import argparse
from dataclasses import replace

from sequoia.cli.benchmarks.arm_measuring import OFF
from sequoia.cli.benchmarks.pair_report import add_pair_arguments, pair_settings, pair_workload, run_pair
from sequoia.cli.benchmarks.two_systems import Side
from sequoia.errors import InvalidArgument

_SHAPES = (OFF, "chain of 4", "16x6")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; cores are those of the split side."""
    add_pair_arguments(parser, _SHAPES)


def run(arguments: argparse.Namespace) -> int:
    """Compare the two placements."""
    workload, settings = pair_workload(arguments, _SHAPES), pair_settings(arguments)
    if arguments.placement != "auto":
        raise InvalidArgument("both placements are compared; leave it out", "placement")
    colocated = replace(settings, placement="colocated", target_cores=None, draft_cores=None)
    sides = (Side("colocated", colocated), Side("split", replace(settings, placement="split")))
    return run_pair(arguments, sides, workload)
