"""`sequoia plan`: the best tree of a running pair, kept in Redis for its coordinator, or that of numbers alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import TYPE_CHECKING

from rich.console import Console

from sequoia.cli.access_flags import ACCESS_FLAGS, access_of, add_access
from sequoia.cli.figures import plan_table, plans_table, verdict
from sequoia.cli.plan_files import FILE_FLAGS, add_file_arguments, plan_from_files, refuse
from sequoia.cli.steps import Steps
from sequoia.rules import SAMPLED_RULES, ParameterError

if TYPE_CHECKING:
    from coordinator.planner_watch import WatchEvent

_RUNNING_FLAGS = ("address", "redis", "temperature", "rule", "watch", "interval", *ACCESS_FLAGS)
_INTERVAL_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command. None of them has a default, so that what was given can be told."""
    parser.add_argument("--json", action="store_true", help="print JSON: an object, or an array for a running pair")
    group = parser.add_argument_group("of a running pair")
    add_pair_arguments(group)
    redis = "the coordinator's Redis (default: SEQUOIA_REDIS)"
    group.add_argument("--redis", metavar="URL", help=redis)
    temperature = "plan for this temperature; repeatable (default 0)"
    group.add_argument("--temperature", action="append", type=float, metavar="T", help=temperature)
    watch = "go on, and plan again when acceptance, distance or the pair change; with --json one line an event"
    group.add_argument("--watch", action="store_true", default=None, help=watch)
    interval = f"seconds between two looks of --watch (default {_INTERVAL_SECONDS:g})"
    group.add_argument("--interval", type=float, metavar="SECONDS", help=interval)
    add_file_arguments(parser)


def add_pair_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare what names a pair and its rule."""
    group.add_argument("--address", help="the coordinator (default: SEQUOIA_ADDRESS, or that of `sequoia up`)")
    add_access(group)
    rules = tuple(each.name for each in SAMPLED_RULES)
    group.add_argument("--rule", choices=rules, help="above temperature 0 (default: the coordinator's)")


def run(arguments: argparse.Namespace) -> int:
    """Plan and show the plan, or the plans."""
    if arguments.acceptance is not None:
        refuse(arguments, _RUNNING_FLAGS, "is for a running pair, and --acceptance for numbers alone; leave one out")
        return _plan_from_files(arguments)
    refuse(arguments, FILE_FLAGS, "is for a plan from numbers alone; give --acceptance FILE too, or leave it out")
    return _watch(arguments) if arguments.watch else _plan_once(arguments)


def address_of(arguments: argparse.Namespace) -> str:
    """The coordinator's, from the flag, the environment, or as `sequoia up` has it."""
    from sequoia.client import DEFAULT_ADDRESS

    return arguments.address or os.environ.get("SEQUOIA_ADDRESS", DEFAULT_ADDRESS)


def _plan_from_files(arguments: argparse.Namespace) -> int:
    plan = plan_from_files(arguments)
    if arguments.json:
        print(plan.to_json())
    else:
        Console().print(plan_table(plan))
    return 0


def _plan_once(arguments: argparse.Namespace) -> int:
    from coordinator.planner_job import plan_pair

    refuse(arguments, ("interval",), "goes with --watch; give both or leave it out")
    temperatures = _temperatures(arguments)
    redis_url = _redis_url(arguments)
    with Steps(Console(stderr=True)).step("measuring the pair, planning its trees") as on_progress:
        planning = plan_pair(
            address_of(arguments),
            redis_url,
            access=access_of(arguments),
            temperatures=temperatures,
            rule_name=arguments.rule or "",
            on_progress=on_progress,
        )
        plans = asyncio.run(planning)
    if arguments.json:
        print(json.dumps([plan.to_dict() for plan in plans]))
    else:
        Console().print(plans_table(temperatures, plans))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    interval_seconds = _INTERVAL_SECONDS if arguments.interval is None else arguments.interval
    if not 0.0 < interval_seconds < float("inf"):
        raise ParameterError(f"is {interval_seconds:g}; give seconds, above 0", "--interval")
    asyncio.run(_show_events(arguments, _redis_url(arguments), interval_seconds))
    return 0


async def _show_events(arguments: argparse.Namespace, redis_url: str, interval_seconds: float) -> None:
    from coordinator.planner_watch import watch_pair

    steps = Steps(Console())
    events = watch_pair(
        address_of(arguments),
        redis_url,
        access=access_of(arguments),
        temperatures=_temperatures(arguments),
        rule_name=arguments.rule or "",
        interval_seconds=interval_seconds,
    )
    async for event in events:
        steps.say(_json_line(event) if arguments.json else _line(event))


def _json_line(event: WatchEvent) -> str:
    plan = event.plan and event.plan.to_dict()
    return json.dumps({"kind": event.kind, "temperature": event.temperature, "reason": event.reason, "plan": plan})


def _line(event: WatchEvent) -> str:
    plan = f" -> {verdict(event.plan)}" if event.plan else ""
    return f"temperature {event.temperature:g}: {event.kind}, {event.reason}{plan}"


def _temperatures(arguments: argparse.Namespace) -> tuple[float, ...]:
    return tuple(arguments.temperature or (0.0,))


def _check_redis(url: str, arguments: argparse.Namespace) -> None:
    from sequoia.access import tls_of
    from sequoia.redis_connection import check_redis

    check_redis(url, tls_of(access_of(arguments)))


def _redis_url(arguments: argparse.Namespace) -> str:
    if url := arguments.redis or os.environ.get("SEQUOIA_REDIS"):
        _check_redis(url, arguments)
        return url
    raise ParameterError(
        "is missing; give the coordinator's Redis (or set SEQUOIA_REDIS), or --acceptance FILE to plan from numbers",
        "--redis",
    )
