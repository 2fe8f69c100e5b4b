"""`sequoia loadtest`: many clients at a time, with speculation and without in turn, over gRPC or HTTP."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from rich.console import Console

from sequoia.access import tls_of
from sequoia.cli.access_flags import access_of
from sequoia.cli.benchmarks.arguments import check_folder, check_least
from sequoia.cli.benchmarks.bench_system import BenchSystem, add_system, planned_system
from sequoia.cli.benchmarks.prompt_set import prompt_set
from sequoia.cli.delayed_link import DelayedLink
from sequoia.cli.load.levels import Level, LoadPlan, Measured, run_levels
from sequoia.cli.load.live_view import LiveView
from sequoia.cli.load.load_figures import LATENCIES, OFF
from sequoia.cli.load.load_report import LoadReport, tables
from sequoia.cli.load.probe import Probe
from sequoia.cli.load.timeline import Driver
from sequoia.cli.load.workload import Form, Mix
from sequoia.cli.steps import Steps
from sequoia.cli.up import stop_on_sigterm
from sequoia.client import AsyncClient
from sequoia.errors import InvalidArgument

_ARMS = ("auto", OFF)
_GRPC, _OPENAI = "grpc", "openai"
_LEAST_REQUESTS, _REQUESTS_A_SESSION = 20, 4
_CONCURRENCY = (1, 4, 16)
_TIMEOUT_SECONDS = 600.0
Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags, named as those of `vllm bench serve` where it has them."""
    add_system(parser)
    group = parser.add_argument_group("the load")
    group.add_argument(
        "--backend", choices=(_GRPC, _OPENAI), help=f"protocol (default: {_GRPC}, or {_OPENAI} with --base-url)"
    )
    group.add_argument("--base-url", metavar="URL", help="of a running OpenAI API, as http://127.0.0.1:8000/v1")
    group.add_argument("--model", metavar="NAME", help="that --base-url serves (default: the first it lists)")
    sessions = "sessions at a time, with commas a level each (default 1,4,16; with --request-rate: no limit)"
    group.add_argument("--max-concurrency", type=_list(int), metavar="LIST", help=sessions)
    rate = "requests a second, with commas a level each (default: the next as soon as one ends)"
    group.add_argument("--request-rate", type=_list(float), metavar="LIST", help=rate)
    burstiness = "of --request-rate; 1 is a Poisson process, less comes in bursts (default %(default)s)"
    group.add_argument("--burstiness", type=float, default=1.0, metavar="B", help=burstiness)
    prompts = f"requests a run (default: {_REQUESTS_A_SESSION} a session, at least {_LEAST_REQUESTS})"
    group.add_argument("--num-prompts", type=int, metavar="N", help=prompts)
    group.add_argument(
        "--num-warmups", type=int, default=8, metavar="N", help="uncounted, before (default %(default)s)"
    )
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="runs an arm and level (default %(default)s)")
    group.add_argument("--arms", type=_arms, default=_ARMS, metavar="LIST", help="auto, off or both (default: both)")
    mix = "categories of prompts and their shares, as code:2,prose:1 (default: all alike)"
    group.add_argument("--mix", type=_shares, metavar="LIST", help=mix)
    group.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens at most (default %(default)s)")
    group.add_argument("--ignore-eos", action="store_true", help="every answer has --output-len tokens")
    group.add_argument("--raw", action="store_true", help="prompts are text to continue, no chat template")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default %(default)s)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the mix and arrivals (default %(default)s)")
    cancel = "share of requests that go away before their answer ends (default %(default)s)"
    group.add_argument("--cancel-rate", type=float, default=0.0, metavar="SHARE", help=cancel)
    delay = "round trip between the clients and the system, in milliseconds (default: as it is)"
    group.add_argument("--link-delay-ms", type=float, default=0.0, metavar="MS", help=delay)
    group.add_argument("--quick", action="store_true", help="hasty plans for a system that is started: a first look")
    output = parser.add_argument_group("output")
    bounds = "what makes a request a good one, in ms, as ttft:200,tpot:50; of ttft, tpot, e2el"
    output.add_argument("--goodput", type=_bounds, default={}, metavar="LIST", help=bounds)
    output.add_argument("--metric-percentiles", type=_list(float), default=(50.0, 90.0, 99.0), metavar="LIST")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a report with pictures, in one file")
    output.add_argument("--save-detailed", action="store_true", help="with --json: every request too")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Start or find the system, load it, show."""
    plan = _plan(arguments)
    check_folder(arguments.html, "html")
    if arguments.html is not None:
        from sequoia.cli.load.load_page import check_drawing

        check_drawing()
    stop_on_sigterm()
    console = Console(stderr=True)
    with _system(arguments, console) as system:
        report = asyncio.run(_measure(arguments, plan, system, console))
    if arguments.html is not None:
        from sequoia.cli.load.load_page import write_page

        write_page(report, arguments.html)
        console.print(f"report: {arguments.html}", markup=False, highlight=False)
    if arguments.json:
        print(json.dumps(report.to_dict(with_requests=arguments.save_detailed)))
    else:
        Console().print(*tables(report), sep="\n")
    return 0 if all(arm.finished for level in report.measured.levels for arm in level.arms) else 1


def _plan(arguments: argparse.Namespace) -> LoadPlan:
    """Raises InvalidArgument naming the flag that is wrong."""
    check_least(arguments, num_warmups=0, rounds=1, output_len=2, seed=0)
    if arguments.num_prompts is not None:
        check_least(arguments, num_prompts=1)
    _check(arguments, "burstiness", lambda value: 0.0 < value < math.inf, "a positive number")
    _check(arguments, "temperature", lambda value: 0.0 <= value < math.inf, "0 or more")
    _check(arguments, "cancel_rate", lambda value: 0.0 <= value < 1.0, "0 or more, and below 1")
    _check(arguments, "link_delay_ms", lambda value: 0.0 <= value < math.inf, "0 or more")
    _check_link(arguments)
    for percent in arguments.metric_percentiles:
        if not 0.0 <= percent <= 100.0:
            raise InvalidArgument(f"has {percent:g}; they are from 0 to 100", "metric-percentiles")
    prompts = prompt_set()
    shares = arguments.mix or dict.fromkeys((each.category for each in prompts), 1.0)
    if unknown := shares.keys() - {each.category for each in prompts}:
        known = ", ".join(dict.fromkeys(each.category for each in prompts))
        raise InvalidArgument(f"has {sorted(unknown)[0]!r}; known are {known}", "mix")
    return LoadPlan(
        mix=Mix(prompts, shares, arguments.output_len, arguments.cancel_rate),
        levels=tuple(_levels(arguments)),
        arms=arguments.arms,
        num_rounds=arguments.rounds,
        num_warmups=arguments.num_warmups,
        burstiness=arguments.burstiness,
        seed=arguments.seed,
    )


def _check_link(arguments: argparse.Namespace) -> None:
    """A link of ours stands between the clients and one address, and has no certificate for it."""
    is_tls = bool(access_of(arguments).get("tls_ca")) or (arguments.base_url or "").startswith("https:")
    is_one = "," not in (arguments.address or "") and not (arguments.address or "").startswith("dns:")
    if arguments.link_delay_ms and (is_tls or not is_one):
        raise InvalidArgument("is for one address, HOST:PORT, and plain text", "link-delay-ms")


def _levels(arguments: argparse.Namespace) -> Iterator[Level]:
    rates, limits = arguments.request_rate, arguments.max_concurrency
    if any(each < 1 for each in limits or ()):
        raise InvalidArgument("has a number below 1", "max-concurrency")
    if any(not each > 0.0 for each in rates or ()):
        raise InvalidArgument("has a rate that is not positive", "request-rate")
    if rates and limits and len(limits) > 1:
        raise InvalidArgument(
            "is a list beside --request-rate, which has a level each; give one number", "max-concurrency"
        )
    for rate in rates or (math.inf,):
        for limit in limits or ((None,) if rates else _CONCURRENCY):
            count = arguments.num_prompts or max(_LEAST_REQUESTS, _REQUESTS_A_SESSION * (limit or 0))
            yield Level(limit, rate, count)


@contextmanager
def _system(arguments: argparse.Namespace, console: Console) -> Iterator[BenchSystem]:
    if arguments.base_url is None:
        if arguments.backend == _OPENAI and arguments.address is not None:
            raise InvalidArgument("is spoken by a gateway: give --base-url in place of --address", "backend")
        http_port = 0 if arguments.backend == _OPENAI else None
        temperatures = (arguments.temperature,)
        with planned_system(arguments, Steps(console), temperatures, http_port=http_port) as system:
            yield system
        return
    if arguments.backend == _GRPC or arguments.address is not None:
        raise InvalidArgument("is of an OpenAI API; give either it or --address", "base-url")
    if urlsplit(arguments.base_url).scheme not in ("http", "https"):
        raise InvalidArgument(f"{arguments.base_url!r} does not begin with http:// or https://", "base-url")
    yield BenchSystem("", access_of(arguments), url=arguments.base_url)


async def _measure(arguments: argparse.Namespace, plan: LoadPlan, system: BenchSystem, console: Console) -> LoadReport:
    async with (
        _driver(arguments, system) as (driver, described),
        Probe(system.process_ids.values(), system.worker_addresses.values(), tls_of(system.access)) as probe,
    ):
        measured: Measured = await run_levels(plan, driver, probe, LiveView(console))
    percentiles = tuple(arguments.metric_percentiles)
    return LoadReport(described, plan, percentiles, arguments.goodput, measured, arguments.link_delay_ms)


@asynccontextmanager
async def _driver(arguments: argparse.Namespace, system: BenchSystem) -> AsyncIterator[tuple[Driver, dict[str, Any]]]:
    """How to ask the system, and what it is."""
    form = Form(arguments.temperature, arguments.raw, arguments.ignore_eos)
    if system.url is None:
        from sequoia.cli.load.grpc_driver import GrpcDriver, describe

        async with (
            _delayed(system.address, arguments.link_delay_ms) as address,
            AsyncClient(address, timeout_seconds=_TIMEOUT_SECONDS, **system.access) as client,
        ):
            yield GrpcDriver(client, form), await describe(client)
        return
    from sequoia.cli.load.http_driver import HttpDriver, first_model, open_http

    parts = urlsplit(system.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    async with _delayed(f"{parts.hostname}:{port}", arguments.link_delay_ms) as address:
        url = urlunsplit(parts._replace(netloc=address)) if arguments.link_delay_ms else system.url
        async with open_http(url, system.access, _TIMEOUT_SECONDS) as client:
            model = arguments.model or await first_model(client)
            yield HttpDriver(client, model, form), {"backend": _OPENAI, "model": model}


@asynccontextmanager
async def _delayed(address: str, milliseconds: float) -> AsyncIterator[str]:
    if not milliseconds:
        yield address
        return
    async with DelayedLink(address, milliseconds / 1e3) as link:
        yield link.address


def _check(arguments: argparse.Namespace, name: str, is_right: Callable[[float], bool], what: str) -> None:
    value = getattr(arguments, name)
    if not is_right(value):
        raise InvalidArgument(f"is {value}; it must be {what}", name.replace("_", "-"))


def _list(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Reads a list with commas, each once."""

    def parse(text: str) -> tuple[Value, ...]:
        return tuple(dict.fromkeys(map(kind, text.split(","))))

    return parse


def _arms(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [each for each in names if each not in _ARMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(_ARMS)}")
    return names


def _shares(text: str) -> dict[str, float]:
    """Reads NAME:SHARE,...; a name alone has the share 1."""
    found = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        found[name] = float(share or 1.0)
        if not 0.0 < found[name] < math.inf:
            raise argparse.ArgumentTypeError(f"the share of {name!r} is not a positive number")
    return found


def _bounds(text: str) -> dict[str, float]:
    """Reads NAME:MS,...."""
    found = _shares(text)
    known = [each for each in LATENCIES if each != "itl"]
    if unknown := [each for each in found if each not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return found
