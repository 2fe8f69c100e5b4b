"""`sequoia plan`: measure a running pair, choose its trees, keep them in Redis where its coordinator finds them."""

from __future__ import annotations

import argparse
import asyncio
import json
import os

from rich.console import Console

from coordinator.planner_job import plan_pair
from sequoia.cli.figures import plans_table
from sequoia.cli.generate import add_address
from sequoia.cli.steps import Steps
from sequoia.rules import SAMPLED_RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    add_address(parser)
    redis = os.environ.get("SEQUOIA_REDIS")
    parser.add_argument(
        "--redis", default=redis, required=not redis, metavar="URL", help="the coordinator's Redis (or SEQUOIA_REDIS)"
    )
    parser.add_argument(
        "--temperature",
        dest="temperatures",
        action="append",
        type=float,
        metavar="T",
        help="plan for this temperature; repeatable (default 0)",
    )
    parser.add_argument(
        "--rule",
        choices=tuple(each.name for each in SAMPLED_RULES),
        default="",
        help="plan for this rule above temperature 0 (default: the coordinator's)",
    )
    parser.add_argument("--json", action="store_true", help="print the plans as one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """Plan and show the plans."""
    temperatures = tuple(arguments.temperatures or (0.0,))
    steps = Steps(Console(stderr=True))
    with steps.step("measuring the pair, planning its trees") as on_progress:
        planning = plan_pair(
            arguments.address,
            arguments.redis,
            temperatures=temperatures,
            rule_name=arguments.rule,
            on_progress=on_progress,
        )
        plans = asyncio.run(planning)
    if arguments.json:
        print(json.dumps([plan.to_dict() for plan in plans]))
    else:
        Console().print(plans_table(temperatures, plans))
    return 0
