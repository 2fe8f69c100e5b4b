"""`sequoia bench`: one module a benchmark, loaded only when it is the one asked for. Without a name it is `arms`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """Where a benchmark is, and what it is for."""

    module: str  # with add_arguments(parser) and run(arguments), as a command of `sequoia` has them
    summary: str


BENCHMARKS = {
    "arms": Benchmark(
        "sequoia.cli.benchmarks.arms",
        "speed by category of prompts: plain decoding, the plan, chains, shapes and other engines in turn",
    ),
    "robustness": Benchmark(
        "sequoia.cli.benchmarks.robustness",
        "acceptance and tokens per step by rule over temperature; loads the pair itself",
    ),
    "rules": Benchmark(
        "sequoia.cli.benchmarks.rules",
        "tokens per step and seconds per token by rule, beside plain decoding, on a running system",
    ),
    "seeds": Benchmark(
        "sequoia.cli.benchmarks.seeds",
        "how often a seeded token flips between trees, batches and rebuilt sessions; loads the target itself",
    ),
    "drift": Benchmark(
        "sequoia.cli.benchmarks.drift",
        "what a quantised target does to the text, against the same one in bfloat16; loads the target itself",
    ),
    "shapes": Benchmark(
        "sequoia.cli.benchmarks.shapes",
        "tokens per step by shape of the tree, predicted and replayed; loads the pair itself, or reads its traces",
    ),
    "roofline": Benchmark(
        "sequoia.cli.benchmarks.roofline",
        "how far forwards are from what memory and matrix products allow at that moment; loads the models itself",
    ),
    "steps": Benchmark(
        "sequoia.cli.benchmarks.steps",
        "what a step consists of: forwards of draft and target, work on logits and trees, everything else",
    ),
    "dynamic": Benchmark(
        "sequoia.cli.benchmarks.dynamic",
        "trees whose shape follows from the draft's scores against the best planned ones of their size, in pairs",
    ),
    "ahead": Benchmark(
        "sequoia.cli.benchmarks.ahead", "drafting ahead on against off: hits, steps, and seconds per token in pairs"
    ),
    "placement": Benchmark(
        "sequoia.cli.benchmarks.placement", "a colocated system against a split one: seconds per token in pairs"
    ),
    "offload": Benchmark(
        "sequoia.cli.benchmarks.offload",
        "a target that is streamed, plain and with the plan in turn, against what the disk or the host's memory allows",
    ),
    "planner": Benchmark("sequoia.cli.benchmarks.planner", "how long the planner takes to find its trees"),
    "plans": Benchmark("sequoia.cli.benchmarks.plans", "what plans promise and what they keep, on a running system"),
    "link": Benchmark("sequoia.cli.benchmarks.link", "what delay between the workers costs, and what plans make of it"),
}


# What `sequoia bench` does without a name, and benchmarks that are asked for by a flag too.
DEFAULT = "arms"
_BY_FLAG = {"--roofline": "roofline"}
_HELP = ("-h", "--help")


def with_name(arguments: Sequence[str]) -> list[str]:
    """What follows `sequoia bench`, the name of a benchmark first: `arms` unless a name or --roofline says another."""
    if arguments and (arguments[0] in _HELP or not arguments[0].startswith("-")):
        return list(arguments)
    flag = next((each for each in arguments if each in _BY_FLAG), None)
    return [_BY_FLAG[flag] if flag else DEFAULT, *(each for each in arguments if each != flag)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks; the flags of the one that is asked for follow when it is."""
    parser.epilog = f"without a name: {DEFAULT}, whose flags `sequoia bench {DEFAULT} --help` tells"
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True, action=_LoadBenchmark)
    for name, benchmark in BENCHMARKS.items():
        benchmarks.add_parser(name, help=benchmark.summary, description=benchmark.summary.capitalize() + ".")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    benchmark: Callable[[argparse.Namespace], int] = arguments.benchmark
    return benchmark(arguments)


class _LoadBenchmark(argparse._SubParsersAction):
    """Gives a benchmark's parser its flags at the moment that its name is met."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name = values[0] if values else ""
        if name in self.choices:
            module = importlib.import_module(BENCHMARKS[name].module)
            module.add_arguments(self.choices[name])
            self.choices[name].set_defaults(benchmark=module.run)
        super().__call__(parser, namespace, values, option_string)
