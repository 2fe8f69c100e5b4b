"""`sequoia demo`: the whole system once, from start to stop, with one answer and what speculation did for it."""

from __future__ import annotations

import argparse
import asyncio
from itertools import takewhile

from rich.console import Console
from rich.table import Table

from coordinator.planner_job import plan_pair
from coordinator.speculation import BUILT_IN_TREE
from sequoia.cli.access_flags import access_of
from sequoia.cli.deployment import Deployment
from sequoia.cli.figures import new_table, shares, verdict
from sequoia.cli.generate import print_as_it_comes
from sequoia.cli.steps import Steps
from sequoia.cli.up import add_model_arguments, deployment_settings, stop_on_sigterm
from sequoia.client import Client, Generation, Message
from sequoia.planner import TreePlan

_NUM_TOKENS = 64
# Enough for a rate; half a minute is all there is.
_NUM_PLAIN_TOKENS = 32
_NUM_PROMPTS = 2
_NUM_PLAN_TOKENS = 24
_INTRODUCTION = """\
A draft proposes a tree of tokens; the target checks it in one forward and keeps the path it agrees with.
This demonstrates the machinery: the default draft is the target's own weights in int8, real and exact, but not much
faster than the target itself. So expect little: the answer is made with a tree whatever the planner says, and the
planner's verdict stands beside the figures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.add_argument("prompt", metavar="PROMPT", help="a user's message")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Start, plan, answer with a tree and without, show the figures, stop."""
    stop_on_sigterm()
    console = Console()
    steps = Steps(console)
    steps.say(_INTRODUCTION)
    with Deployment(deployment_settings(arguments, "127.0.0.1:0", None), steps) as system:
        plan = _plan(system, steps)
        steps.say(f"the planner says: {verdict(plan)}")
        with Client(system.address, **access_of()) as client:
            question = [Message("user", arguments.prompt)]
            tree = plan.best_tree.shape if plan.best_tree else BUILT_IN_TREE
            console.rule("the answer, as its tokens are committed")
            drafted = print_as_it_comes(
                client.stream(question, max_tokens=_NUM_TOKENS, temperature=0, speculation=tree)
            )
            console.rule()
            with steps.step(f"the same prompt without speculation, {_NUM_PLAIN_TOKENS} tokens"):
                plain = client.generate(question, max_tokens=_NUM_PLAIN_TOKENS, temperature=0, speculation="off")
            dtype = client.describe_pair().verify.dtype
        console.print(_comparison(drafted, plain, plan, dtype))
    return 0


def _plan(system: Deployment, steps: Steps) -> TreePlan:
    """A short measurement: enough for a verdict, not for the last per cent."""
    with steps.step("measuring the pair, planning its trees") as on_progress:
        planning = plan_pair(
            system.address,
            system.redis_url,
            access=access_of(),
            most_prompts=_NUM_PROMPTS,
            max_tokens=_NUM_PLAN_TOKENS,
            on_progress=on_progress,
        )
        (plan,) = asyncio.run(planning)
    return plan


def _comparison(drafted: Generation, plain: Generation, plan: TreePlan, dtype: str) -> Table:
    figures = drafted.speculation
    table = new_table("", "with a tree", "without")
    table.add_row("tokens/s after the first", *(_rate(each) for each in (drafted, plain)))
    table.add_row("times as fast", _ratio(drafted, plain), "1")
    table.add_row("tokens/step", *(f"{each.speculation.mean_tokens_per_step:.2f}" for each in (drafted, plain)))
    table.add_row("tree", f"{figures.tree.size} nodes x {figures.tree.levels} levels", "none")
    table.add_row("share of a step", *(shares(each.speculation.stage_seconds) for each in (drafted, plain)))
    table.add_row("text", f"{len(drafted.token_ids)} tokens", _sameness(drafted, plain, dtype))
    table.add_row("planner's verdict", verdict(plan))
    return table


def _rate(generation: Generation) -> str:
    seconds = generation.usage.time_per_output_token_seconds
    return f"{1 / seconds:.1f}" if seconds else "-"


def _ratio(drafted: Generation, plain: Generation) -> str:
    ours, theirs = (each.usage.time_per_output_token_seconds for each in (drafted, plain))
    return f"{theirs / ours:.2f}" if ours and theirs else "-"


def _sameness(drafted: Generation, plain: Generation, dtype: str) -> str:
    both = zip(drafted.token_ids, plain.token_ids, strict=False)
    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    if num_same == len(plain.token_ids):
        return f"the same {num_same} tokens"
    reason = "DIFFERENT then" if dtype == "float32" else f"then a near tie fell otherwise, as happens in {dtype}"
    return f"the same {num_same} of {len(plain.token_ids)} tokens, {reason}"
