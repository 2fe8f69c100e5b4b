"""`sequoia bench rules`: what each rule brings and costs on a running system, beside plain decoding."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from coordinator.planner_prompts import TEXTS
from sequoia.acceptance import PRIOR
from sequoia.cli import rule_timing
from sequoia.cli.access_flags import access_of
from sequoia.cli.benchmarks.arguments import add_json, check_least
from sequoia.cli.figures import new_table
from sequoia.cli.generate import add_address
from sequoia.cli.rule_timing import RuleTiming, Workload
from sequoia.cli.steps import Steps
from sequoia.client import Client
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.planner import optimal_tree
from sequoia.rules import SAMPLED_RULES
from sequoia.topology import Topology

_RULES = tuple(each.name for each in SAMPLED_RULES)
_TREE_SIZE, _TREE_LEVELS = 16, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_address(parser)
    temperature = "measure at this temperature, above 0; repeatable (default 0.6 and 1)"
    parser.add_argument(
        "--temperature", dest="temperatures", action="append", type=float, metavar="T", help=temperature
    )
    parser.add_argument("--rule", dest="rules", action="append", choices=_RULES, help="repeatable (default: all)")
    parser.add_argument(
        "--tree", type=_tree, metavar="PARENTS", help="each node's parent, as in -1,0,0,1 (default: 16 nodes, 6 levels)"
    )
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="answers a prompt (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="per answer (default %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the running system, print."""
    check_least(arguments, rounds=1, max_tokens=2)
    temperatures = arguments.temperatures or [0.6, 1.0]
    if min(temperatures) <= 0.0:
        raise InvalidArgument("must be above 0: at 0 there is one rule", "temperature")
    rules = tuple(arguments.rules or _RULES)
    tree = arguments.tree or optimal_tree(PRIOR, _TREE_SIZE, _TREE_LEVELS)
    workload = Workload(TEXTS, rules, tree, arguments.rounds, arguments.max_tokens)
    steps = Steps(Console(stderr=True))
    with Client(arguments.address, **access_of(arguments)) as client:
        pair = client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present; start one and measure again", "draft")
        with steps.step(f"{len(TEXTS) * arguments.rounds} prompts at each of {len(temperatures)} temperatures") as on:
            found = rule_timing.measure(client, temperatures, workload, on)
    if arguments.json:
        print(json.dumps(rule_timing.to_dict(pair, workload, found)))
    else:
        Console().print(rules_table(found))
    return 0


def rules_table(found: Sequence[RuleTiming]) -> Table:
    """A row a rule and temperature."""
    table = new_table("T", "rule", "tokens/s (range)", "vs off", "tokens/step", "rank 0")
    for each in found:
        rates, rank_0 = each.tokens_per_second, each.acceptance_at_rank_0
        table.add_row(
            f"{each.temperature:g}",
            each.mode,
            f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})",
            f"{median(each.ratios_to_off):.2f}",
            f"{each.tokens_per_step:.2f}",
            "-" if rank_0 is None else f"{rank_0:.1%}",
        )
    num_fallbacks = sum(each.num_fallback_steps for each in found)
    num_steps = sum(each.num_steps for each in found if each.mode != rule_timing.OFF)
    table.caption = (
        f"{len(found[0].answers)} answers a row, the first token not timed; vs off: the median of pairs that "
        f"answer one prompt; {num_fallbacks} of {num_steps} steps by a rule fell back to plain ones"
    )
    return table


def _tree(text: str) -> Topology:
    try:
        return Topology(tuple(int(parent) for parent in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a tree such as -1,0,0,1: {error}") from error
