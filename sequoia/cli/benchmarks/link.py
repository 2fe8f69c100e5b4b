"""`sequoia bench link`: workers that are further and further away, what plans make of it, and what that brings."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from coordinator.planner_prompts import TEXTS
from coordinator.planner_watch import watch_pair
from sequoia.cli.benchmarks.arguments import add_json, check_least
from sequoia.cli.delayed_link import DelayedLink
from sequoia.cli.figures import new_table, shape
from sequoia.cli.process import ServerProcess, stop, wait_until_serving
from sequoia.cli.steps import Steps
from sequoia.client import AsyncClient, Speculation
from sequoia.errors import Unavailable
from sequoia.planner import TreePlan

_MILLISECONDS = (0.0, 5.0, 20.0, 200.0)
# A plan is for the round trips that the coordinator has measured some times.
_SETTLE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Distance:
    """What was planned, and realised, with both workers so far away. Seconds; `realised` medians over answers."""

    added_seconds: float
    round_trip_seconds: float
    plan: TreePlan
    seconds_off: float
    seconds_best_tree: float
    speedup: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--verify", required=True, metavar="ADDRESS", help="the verify worker; `sequoia up` says where")
    parser.add_argument("--draft", required=True, metavar="ADDRESS", help="the draft worker")
    parser.add_argument("--redis", required=True, metavar="URL", help="where plans are kept")
    parser.add_argument(
        "--delay",
        dest="delays",
        action="append",
        type=float,
        metavar="MS",
        help="milliseconds added to the round trip to either worker; repeatable (default 0, 5, 20 and 200)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="per answer (default %(default)s)")
    add_json(parser, "array")


def run(arguments: argparse.Namespace) -> int:
    """Measure one distance after the other."""
    check_least(arguments, max_tokens=8)
    steps = Steps(Console(stderr=True))
    found = []
    for milliseconds in arguments.delays or _MILLISECONDS:
        with steps.step(f"workers {milliseconds:g} ms further away") as on_progress:
            found.append(asyncio.run(_measure(arguments, milliseconds / 1e3, on_progress)))
    if arguments.json:
        print(json.dumps([{**asdict(each), "plan": each.plan.to_dict()} for each in found]))
    else:
        Console().print(distances_table(found))
    return 0


def distances_table(found: Sequence[Distance]) -> Table:
    """A row a distance."""
    columns = ("tokens/step", "ms/token", "realised", "off", "speedup", "realised")
    table = new_table("added", "round trips", "plan", "best tree", *columns)
    for each in found:
        best = each.plan.best_tree
        assert best is not None, "a curve of one width allows no tree"
        table.add_row(
            f"{each.added_seconds * 1e3:g} ms",
            f"{each.round_trip_seconds * 1e3:.1f} ms",
            shape(each.plan.chosen),
            shape(best),
            f"{best.tokens_per_step:.2f}",
            f"{best.seconds_per_token * 1e3:.1f}",
            f"{each.seconds_best_tree * 1e3:.1f}",
            f"{each.seconds_off * 1e3:.1f}",
            f"{best.speedup:.2f}",
            f"{each.speedup:.2f}",
        )
    table.caption = "added to either round trip; realised: the best tree, median of answers in turn with off"
    return table


async def _measure(
    arguments: argparse.Namespace, added_seconds: float, on_progress: Callable[[int, int], None]
) -> Distance:
    """With a coordinator of our own, behind links of our own."""
    async with AsyncExitStack() as stack:
        verify = await stack.enter_async_context(DelayedLink(arguments.verify, added_seconds))
        draft = await stack.enter_async_context(DelayedLink(arguments.draft, added_seconds))
        flags = {"listen": "127.0.0.1:0", "verify": verify.address, "draft": draft.address}
        address = await _coordinator(flags, arguments.redis, stack)
        await asyncio.sleep(_SETTLE_SECONDS)
        client = await stack.enter_async_context(AsyncClient(address))
        pair = await client.describe_pair()
        plan = await _plan(address, arguments)
        off, tree = await _answers(client, plan, arguments, on_progress)
        return Distance(
            added_seconds,
            pair.verify_rtt_seconds + pair.draft_rtt_seconds,
            plan,
            median(off),
            median(tree),
            median(a / b for a, b in zip(off, tree, strict=True)),
        )


async def _coordinator(flags: Mapping[str, object], redis_url: str, stack: AsyncExitStack) -> str:
    """The address of a coordinator that is stopped when the stack is."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sequoia-")))
    process = ServerProcess(
        "coordinator", "coordinator.server", flags, {**os.environ, "SEQUOIA_REDIS": redis_url}, folder
    )
    stack.callback(stop, [process])
    await asyncio.to_thread(lambda: list(wait_until_serving([process])))
    return process.address


async def _plan(address: str, arguments: argparse.Namespace) -> TreePlan:
    """What a planner that watches makes of this distance: measured the first time, then planned from that."""
    async with aclosing(watch_pair(address, arguments.redis, temperatures=[arguments.temperature])) as events:
        event = await anext(events)
    if event.plan is None:
        raise Unavailable(f"no plan: {event.reason}")
    return event.plan


async def _answers(
    client: AsyncClient, plan: TreePlan, arguments: argparse.Namespace, on_progress: Callable[[int, int], None]
) -> tuple[list[float], list[float]]:
    """Seconds per token, the first left out, of every prompt decoded plainly and with the best tree."""
    assert plan.best_tree is not None

    async def seconds(prompt: str, how: Speculation) -> float:
        generation = await client.generate(
            prompt,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            ignore_eos=True,
            speculation=how,
        )
        return generation.usage.time_per_output_token_seconds

    off, tree = [], []
    for index, prompt in enumerate(TEXTS):
        on_progress(index, len(TEXTS))
        off.append(await seconds(prompt, "off"))
        tree.append(await seconds(prompt, plan.best_tree.shape))
    return off, tree
