"""`sequoia bench`: what a pair's draft is worth to each rule, over temperature and on a running system."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from coordinator.planner_job import PROMPTS
from sequoia.acceptance import PRIOR
from sequoia.cli import rule_timing
from sequoia.cli.figures import new_table
from sequoia.cli.generate import add_address
from sequoia.cli.rule_timing import RuleTiming, Workload
from sequoia.cli.steps import Steps
from sequoia.client import Client
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.planner import optimal_tree
from sequoia.rules import SAMPLED_RULES
from sequoia.sampling import Sampling
from sequoia.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sequoia.cli.robustness import Acceptance
    from sequoia.cli.seed_stability import Stability

TEMPERATURES = (0.01, 0.2, 0.4, 0.6, 0.8, 1.0, 1.1)
_TREE_SIZE, _TREE_LEVELS = 16, 6

# Chen et al. 2024 (arXiv 2402.12374): acceptance of 5 children in per cent by temperature, for a pair of their own.
_PAPER_CHILDREN = 5
_PAPER_TEMPERATURES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
_PAPER = {
    "sequoia": (85.67, 85.69, 85.53, 85.14, 84.67, 84.32, 84.06, 83.34, 82.78, 82.3, 81.69, 80.94),
    "naive top-k": (85.67, 85.62, 85.28, 84.64, 83.65, 82.29, 80.55, 78.44, 76.0, 73.25, 70.23, 66.95),
}
# Okabe and Ito's colours, which colour-blind readers tell apart; a marker each for print.
_LOOKS = {
    "sequoia": ("#0072B2", "o"),
    "coupled": ("#009E73", "s"),
    "specinfer": ("#CC79A7", "^"),
    "naive top-k": ("#D55E00", "D"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their flags."""
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    summary = "acceptance and tokens per step by rule over temperature; loads the pair itself"
    _add_robustness(benchmarks.add_parser("robustness", help=summary, description=summary.capitalize() + "."))
    summary = "tokens per step and seconds per token by rule, beside plain decoding, on a running system"
    _add_rules(benchmarks.add_parser("rules", help=summary, description=summary.capitalize() + "."))
    summary = "how often a seeded token flips between trees, batches and rebuilt sessions; loads the target itself"
    _add_seeds(benchmarks.add_parser("seeds", help=summary, description=summary.capitalize() + "."))


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    benchmark: Callable[[argparse.Namespace], int] = arguments.benchmark
    return benchmark(arguments)


def _add_robustness(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(benchmark=_bench_robustness)
    parser.add_argument("--target", required=True, metavar="MODEL", help="packaged name, hub id, folder or GGUF file")
    parser.add_argument("--draft", required=True, metavar="MODEL", help="the same; may be the target itself")
    parser.add_argument("--draft-quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--positions", type=int, default=256, metavar="N", help="tokens of text (default %(default)s)")
    parser.add_argument("--children", type=int, default=5, metavar="K", help="at each position (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves into this .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(benchmark=_bench_rules)
    add_address(parser)
    temperature = "measure at this temperature, above 0; repeatable (default 0.6 and 1)"
    parser.add_argument(
        "--temperature", dest="temperatures", action="append", type=float, metavar="T", help=temperature
    )
    rules = tuple(each.name for each in SAMPLED_RULES)
    parser.add_argument("--rule", dest="rules", action="append", choices=rules, help="repeatable (default: all)")
    parser.add_argument(
        "--tree", type=_tree, metavar="PARENTS", help="each node's parent, as in -1,0,0,1 (default: 16 nodes, 6 levels)"
    )
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="answers a prompt (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="per answer (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(benchmark=_bench_seeds)
    parser.add_argument("--target", required=True, metavar="MODEL", help="packaged name, hub id, folder or GGUF file")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--deterministic", action="store_true", help="as a worker with --deterministic computes")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="texts (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="per text (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def _tree(text: str) -> Topology:
    try:
        return Topology(tuple(int(parent) for parent in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a tree such as -1,0,0,1: {error}") from error


def _bench_robustness(arguments: argparse.Namespace) -> int:
    _check_least(arguments, positions=1, children=1)
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    # Imported here: `bench rules` needs no torch.
    from sequoia.cli import robustness

    steps = Steps(Console(stderr=True))
    with steps.step(f"loading {arguments.target} and {arguments.draft}"):
        pair = robustness.load_pair(
            arguments.target, arguments.draft, draft_quantization=arguments.draft_quantization, dtype=arguments.dtype
        )
    with steps.step(f"writing {arguments.positions} tokens, and both models' logits for them"):
        texts = robustness.write_texts(pair.target, PROMPTS, arguments.positions)
        logits = robustness.pair_logits(pair, texts, arguments.positions)
    with steps.step("trying the rules") as on_progress:
        found = robustness.measure(logits, TEMPERATURES, arguments.children, on_progress)
    if arguments.json:
        print(json.dumps(robustness.to_dict(pair, found, arguments.positions)))
    else:
        Console().print(robustness_table(found))
    if arguments.plot is not None:
        plot_robustness(found, _title(arguments), arguments.plot)
    return 0


def _bench_rules(arguments: argparse.Namespace) -> int:
    _check_least(arguments, rounds=1, max_tokens=2)
    temperatures = arguments.temperatures or [0.6, 1.0]
    if min(temperatures) <= 0.0:
        raise InvalidArgument("must be above 0: at 0 there is one rule", "temperature")
    rules = tuple(arguments.rules or (each.name for each in SAMPLED_RULES))
    tree = arguments.tree or optimal_tree(PRIOR, _TREE_SIZE, _TREE_LEVELS)
    workload = Workload(PROMPTS, rules, tree, arguments.rounds, arguments.max_tokens)
    steps = Steps(Console(stderr=True))
    with Client(arguments.address) as client:
        pair = client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present; start one and measure again", "draft")
        with steps.step(f"{len(PROMPTS) * arguments.rounds} prompts at each of {len(temperatures)} temperatures") as on:
            found = rule_timing.measure(client, temperatures, workload, on)
    if arguments.json:
        print(json.dumps(rule_timing.to_dict(pair, workload, found)))
    else:
        Console().print(rules_table(found))
    return 0


def _bench_seeds(arguments: argparse.Namespace) -> int:
    _check_least(arguments, prompts=1, tokens=1)
    from sequoia.cli import seed_stability

    steps = Steps(Console(stderr=True))
    with steps.step(f"loading {arguments.target}"):
        subject = seed_stability.load(arguments.target, dtype=arguments.dtype, deterministic=arguments.deterministic)
    prompts = [tuple(subject.tokenizer.encode(prompt).ids) for prompt in PROMPTS[: arguments.prompts]]
    measuring = seed_stability.measure(subject, prompts, Sampling(seed=0), arguments.tokens)
    found: list[Stability] = []
    with steps.step("computing the same tokens in several ways") as on_progress:
        for each in measuring:
            found.append(each)
            on_progress(len(found), seed_stability.NUM_WAYS)
    if arguments.json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        Console().print(seeds_table(found))
    return 0


def _check_least(arguments: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise InvalidArgument(f"is {getattr(arguments, name)}; it must be {value} or more", name.replace("_", "-"))


def _check_plot(file: Path) -> None:
    """Before the minutes that a measurement takes, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FailedPrecondition("needs matplotlib: pip install sequoia-serving[bench]", "plot")
    if file.suffix not in (".svg", ".png"):
        raise InvalidArgument(f"{file} ends neither in .svg nor in .png", "plot")
    if not file.absolute().parent.is_dir():
        raise InvalidArgument(f"there is no folder {file.absolute().parent}", "plot")


def robustness_table(found: Sequence[Acceptance]) -> Table:
    """A row a temperature, a column a rule."""
    rules = list(dict.fromkeys(each.rule for each in found))
    table = new_table("temperature", *rules)
    cells = {(each.temperature, each.rule): f"{each.total:.1%} / {each.tokens_per_step:.2f}" for each in found}
    for temperature in dict.fromkeys(each.temperature for each in found):
        table.add_row(f"{temperature:g}", *(cells[temperature, rule] for rule in rules))
    error = max(each.standard_error for each in found)
    table.caption = f"acceptance of all children (standard error at most {error:.1%}) / predicted tokens per step"
    return table


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


def seeds_table(found: Sequence[Stability]) -> Table:
    """A row a way to compute the same tokens."""
    table = new_table("way", "tokens", "flips", "largest difference of a logit", "ms/token")
    for each in found:
        flips = f"{each.num_flips} ({each.num_flips / each.num_tokens:.1%})"
        difference, milliseconds = f"{each.max_logit_difference:.3g}", f"{each.seconds_per_token * 1e3:.0f}"
        table.add_row(each.way, str(each.num_tokens), flips, difference, milliseconds)
    return table


def plot_robustness(found: Sequence[Acceptance], title: str, file: Path) -> None:
    """Acceptance and tokens per step over temperature, beside the paper's acceptance, into an SVG or PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    num_children = len(found[0].by_rank)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for rule, (colour, marker) in _LOOKS.items():
        of_rule = [each for each in found if each.rule == rule]
        temperatures = [each.temperature for each in of_rule]
        least, acceptance, most = (
            [100 * (each.total + sign * each.standard_error) for each in of_rule] for sign in (-1, 0, 1)
        )
        left.fill_between(temperatures, least, most, color=colour, alpha=0.08, linewidth=0)
        for axes, values in ((left, acceptance), (right, [each.tokens_per_step for each in of_rule])):
            axes.plot(temperatures, values, color=colour, marker=marker, label=rule)
    if num_children == _PAPER_CHILDREN:
        for rule, published in _PAPER.items():
            label, colour = f"{rule}, the pair of Chen et al. 2024", _LOOKS[rule][0]
            left.plot(_PAPER_TEMPERATURES, published, "--", linewidth=1, color=colour, label=label)
    _label(left, f"Acceptance of {num_children} children (band: standard error)", "%")
    _label(right, "Predicted for the best tree of 16 nodes", "tokens per step")
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="temperature", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _title(arguments: argparse.Namespace) -> str:
    precision = "" if arguments.draft_quantization == "none" else f" in {arguments.draft_quantization}"
    return f"{Path(arguments.target).name} drafted by {Path(arguments.draft).name}{precision}"
