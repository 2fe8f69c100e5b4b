"""`sequoia bench`: plain decoding, the plan, chains, shapes and other engines, in turn on the same prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from sequoia.cli.benchmarks import arm_report
from sequoia.cli.benchmarks.arguments import add_json, check_least, pair_title
from sequoia.cli.benchmarks.arm_report import Report
from sequoia.cli.benchmarks.arm_run import ArmWorkload, run_arms
from sequoia.cli.benchmarks.bench_system import bench_system
from sequoia.cli.benchmarks.own_arms import CHAIN, PLAN, named_shape
from sequoia.cli.benchmarks.peer_arms import Workplace
from sequoia.cli.benchmarks.peer_catalog import ALL, PEERS
from sequoia.cli.benchmarks.process_memory import available_bytes
from sequoia.cli.benchmarks.prompt_set import prompt_set
from sequoia.cli.figures import check_plot
from sequoia.cli.steps import Steps
from sequoia.cli.up import add_model_arguments, stop_on_sigterm
from sequoia.config import num_cores
from sequoia.engine.sources import default_cache_dir

_ARMS = (PLAN, CHAIN)
_MAX_TOKENS, _QUICK_MAX_TOKENS, _QUICK_PROMPTS = 64, 24, 1
_MEMORY_SHARE = 0.8
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    _add_system_arguments(parser.add_argument_group("the system", "one that runs already, or one to start"))
    _add_arm_arguments(parser.add_argument_group("arms", "plain decoding (off) is always one"))
    parser.add_argument("--prompts", type=int, metavar="N", help="per category (default: all; 1 with --quick)")
    tokens = f"per answer, at most (default {_MAX_TOKENS}; {_QUICK_MAX_TOKENS} with --quick)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=tokens)
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="answers a prompt (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="prompts are text to continue, no chat template")
    parser.add_argument("--quick", action="store_true", help="few prompts, short answers, a hasty plan: a first look")
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the arms by category into this .png or .svg")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, draw."""
    workload = _workload(arguments)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    stop_on_sigterm()
    steps = Steps(Console(stderr=True))
    with _workplace(arguments, steps) as workplace, bench_system(arguments, steps) as system:
        report = run_arms(system, workload, workplace)
    if arguments.plot is not None:
        _draw(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        Console().print(*arm_report.tables(report), sep="\n")
    return 0


def _add_system_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--address", help="of a running coordinator (default: start a system of the models below)")
    add_model_arguments(group)


def _add_arm_arguments(group: argparse._ArgumentGroup) -> None:
    ours = f"ours, with commas, from {', '.join(_ARMS)} (default: both)"
    group.add_argument("--arms", type=_names(_ARMS), default=_ARMS, metavar="LIST", help=ours)
    shape = "a fixed tree: NODESxLEVELS, as in 6x3, or a name of `sequoia bench shapes`; repeatable"
    group.add_argument("--shape", dest="shapes", action="append", default=[], metavar="SHAPE", help=shape)
    peers = f"other engines, with commas, from {', '.join(PEERS)}; or {ALL}. Each holds its own copy of the models"
    group.add_argument("--peers", type=_names(tuple(PEERS)), default=(), metavar="LIST", help=peers)
    memory = "most that peers may hold together; those beyond are left out (default: 80%% of what is free)"
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
    if arguments.max_tokens is None:
        arguments.max_tokens = _QUICK_MAX_TOKENS if arguments.quick else _MAX_TOKENS
    if arguments.prompts is None and arguments.quick:
        arguments.prompts = _QUICK_PROMPTS
    check_least(arguments, rounds=1, max_tokens=2, **({} if arguments.prompts is None else {"prompts": 1}))
    for shape in arguments.shapes:
        named_shape(shape)
    return ArmWorkload(
        arms=arguments.arms,
        shapes=tuple(arguments.shapes),
        peers=arguments.peers,
        prompts=prompt_set(arguments.prompts),
        is_raw=arguments.raw,
        num_rounds=arguments.rounds,
        max_tokens=arguments.max_tokens,
    )


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
