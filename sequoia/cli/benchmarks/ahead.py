"""`sequoia bench ahead`: what drafting ahead brings and costs: the same split system with and without it."""

from __future__ import annotations

import argparse
from dataclasses import replace

from sequoia.cli.benchmarks.pair_report import add_pair_arguments, pair_settings, pair_workload, run_pair
from sequoia.cli.benchmarks.two_systems import Side
from sequoia.errors import InvalidArgument

_SHAPES = ("chain of 4", "6x4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_pair_arguments(parser, _SHAPES)
    mode = "compare this with off: on (default), or auto, which drafts ahead while it pays, on cores of its own"
    parser.add_argument("--mode", choices=("on", "auto"), default="on", help=mode)


def run(arguments: argparse.Namespace) -> int:
    """Compare drafting ahead with not doing so, in two processes a system."""
    workload, settings = pair_workload(arguments, _SHAPES), pair_settings(arguments)
    if arguments.placement == "colocated":
        raise InvalidArgument("colocated workers take turns: nobody can draft while the other verifies", "placement")
    split = replace(settings, placement="split")
    sides = (
        Side(arguments.mode, replace(split, draft_ahead=arguments.mode)),
        Side("off", replace(split, draft_ahead="off")),
    )
    return run_pair(arguments, sides, workload)
