"""`sequoia bench`: plain decoding, the plan, chains, shapes and other engines, in turn on the same prompts."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from sequoia.cli.benchmarks import arm_report
from sequoia.cli.benchmarks.arguments import add_json, pair_title
from sequoia.cli.benchmarks.arm_report import Report
from sequoia.cli.benchmarks.arm_run import ArmWorkload, run_arms
from sequoia.cli.benchmarks.asking import add_asking, asking
from sequoia.cli.benchmarks.bench_system import add_system, planned_system
from sequoia.cli.benchmarks.own_arms import CHAIN, PLAN, named_shape
from sequoia.cli.benchmarks.peer_arms import Workplace
from sequoia.cli.benchmarks.peer_catalog import ALL, PEERS
from sequoia.cli.figures import check_plot
from sequoia.cli.steps import Steps
from sequoia.cli.up import stop_on_sigterm
from sequoia.config import num_cores
from sequoia.engine.sources import default_cache_dir
from sequoia.errors import InvalidArgument
from sequoia.process_memory import available_bytes

_ARMS = (PLAN, CHAIN)
_MEMORY_SHARE = 0.8
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_system(parser)
    _add_arm_arguments(parser.add_argument_group("arms", "plain decoding (off) is always one"))
    add_asking(parser)
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the arms by category into this .png or .svg")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, draw."""
    workload = _workload(arguments)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    stop_on_sigterm()
    steps, temperatures = Steps(Console(stderr=True)), (workload.temperature,)
    with _workplace(arguments, steps) as workplace, planned_system(arguments, steps, temperatures) as system:
        report = run_arms(system, workload, workplace)
    if arguments.plot is not None:
        _draw(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        Console().print(*arm_report.tables(report), sep="\n")
    return 0


def _add_arm_arguments(group: argparse._ArgumentGroup) -> None:
    ours = f"ours, with commas, from {', '.join(_ARMS)} (default: both)"
    group.add_argument("--arms", type=_names(_ARMS), default=_ARMS, metavar="LIST", help=ours)
    shape = "a fixed tree: NODESxLEVELS, as in 6x3, or a name of `sequoia bench shapes`; repeatable"
    group.add_argument("--shape", dest="shapes", action="append", default=[], metavar="SHAPE", help=shape)
    peers = f"other engines, with commas, from {', '.join(PEERS)}; or {ALL}. Each holds its own copy of the models"
    group.add_argument("--peers", type=_names(tuple(PEERS)), default=(), metavar="LIST", help=peers)
    memory = "most that peers may hold together; those beyond are left out (default: 80%% of what is free)"
    temperature = "of all arms, with one seed; other engines answer greedily only (default %(default)s)"
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    group.add_argument("--memory-gib", type=float, metavar="GIB", help=memory)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Reads a list with commas, each name once; `all` is all."""

    def parse(text: str) -> tuple[str, ...]:
        names = known if text == ALL else tuple(dict.fromkeys(filter(None, text.split(","))))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}, {ALL}")
        return names

    return parse


def _workload(arguments: argparse.Namespace) -> ArmWorkload:
    """Raises InvalidArgument naming the flag that is wrong."""
    asked = asking(arguments)
    for shape in arguments.shapes:
        named_shape(shape)
    if not 0.0 <= arguments.temperature < math.inf:
        raise InvalidArgument(f"is {arguments.temperature}; it must be 0 or more", "temperature")
    if arguments.temperature and arguments.peers:
        raise InvalidArgument("above 0 leaves nothing to compare other engines by; name none", "temperature")
    return ArmWorkload(arguments.arms, tuple(arguments.shapes), arguments.peers, arguments.temperature, asked)


@contextmanager
def _workplace(arguments: argparse.Namespace, steps: Steps) -> Iterator[Workplace]:
    if arguments.memory_gib is not None:
        most_bytes = arguments.memory_gib * _GIB
    else:
        free = available_bytes()
        most_bytes = float("inf") if free is None else _MEMORY_SHARE * free
    with TemporaryDirectory(prefix="sequoia-bench-") as scratch:
        log_dir = arguments.log_dir or Path(scratch)
        log_dir.mkdir(parents=True, exist_ok=True)
        num_threads = arguments.num_threads or num_cores()
        yield Workplace(default_cache_dir() / "peers", log_dir, num_threads, most_bytes, steps)


def _draw(report: Report, file: Path) -> None:
    from sequoia.cli.benchmarks.arm_plot import plot

    target, draft = report.pair["target"], report.pair["draft"]
    title = pair_title(target["model"], draft["model"], draft["quantization"]) if draft else target["model"]
    plot(report.figures, title, file)
