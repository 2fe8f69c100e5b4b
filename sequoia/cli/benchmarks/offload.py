"""`sequoia bench offload`: a target that is streamed, plain and with the plan, against what its tier allows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sequoia.access import tls_of
from sequoia.cli.benchmarks.arguments import add_json
from sequoia.cli.benchmarks.arm_figures import figures_of
from sequoia.cli.benchmarks.arm_measuring import measure
from sequoia.cli.benchmarks.asking import Asking, add_asking, asking
from sequoia.cli.benchmarks.bench_system import planned_system
from sequoia.cli.benchmarks.own_arms import PLAN, OwnArm, plan_in_force, ways
from sequoia.cli.benchmarks.raw_tiers import RawCopy, RawDisk
from sequoia.cli.benchmarks.streaming import ArmStreaming, OffloadFigures, RawTier, WatchedArm
from sequoia.cli.figures import new_table
from sequoia.cli.shape_names import in_short
from sequoia.cli.steps import Steps
from sequoia.cli.up import add_model_arguments, stop_on_sigterm
from sequoia.client import Client
from sequoia.engine.sources import default_cache_dir
from sequoia.errors import InvalidArgument
from sequoia.rpc import open_sync_channel
from sequoia.v1 import worker_pb2_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_model_arguments(parser)
    parser.set_defaults(address=None, offload="disk")
    add_asking(parser)
    temperature = "repeatable (default 0 and 0.6)"
    parser.add_argument(
        "--temperature", dest="temperatures", action="append", type=float, metavar="T", help=temperature
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and show."""
    asked, temperatures = asking(arguments), tuple(arguments.temperatures or (0.0, 0.6))
    if arguments.no_draft or arguments.offload == "none":
        flag = "no-draft" if arguments.no_draft else "offload"
        raise InvalidArgument("leaves nothing to compare", flag)
    stop_on_sigterm()
    steps = Steps(Console(stderr=True))
    with (
        planned_system(arguments, steps, temperatures) as system,
        Client(system.address, **system.access) as client,
        open_sync_channel(system.worker_addresses["verify"], tls_of(system.access)) as channel,
    ):
        worker = worker_pb2_grpc.WorkerServiceStub(channel)
        target = client.describe_pair().verify
        is_on_cpu = target.hardware_key.startswith("cpu")
        raw = RawDisk(_layer_files(target.model_revision)) if is_on_cpu else RawCopy("cuda")
        figures = [_compare(client, worker, raw, asked, each, steps) for each in temperatures]
    if arguments.json:
        print(json.dumps({"target": target.hardware_key, "temperatures": [each.to_dict() for each in figures]}))
    else:
        Console().print(*tables(figures), sep="\n")
    return 0


def tables(figures: Sequence[OffloadFigures]) -> list[Table]:
    """What was gained, and what a forward consists of."""
    return [_speed_table(figures), _category_table(figures), _forward_table(figures)]


def _compare(
    client: Client,
    worker: worker_pb2_grpc.WorkerServiceStub,
    raw: RawTier,
    asked: Asking,
    temperature: float,
    steps: Steps,
) -> OffloadFigures:
    """Every prompt answered by both, the next one first at each prompt."""
    plan = plan_in_force(client, temperature)
    prompts = {each: asked.form(each) for each in asked.prompts}
    found = ways(plan, (PLAN,), ())
    arms = [
        WatchedArm(OwnArm(name, temperature, how, client, prompts), worker, raw)
        for name, how in found.items()
        if how is not None
    ]
    with steps.step(f"temperature {temperature:g}: {asked.num_answers} prompts, twice") as on_progress:
        measured = measure(arms, asked, on_progress)
    return OffloadFigures.of(temperature, arms, figures_of(measured.samples), plan.chosen if plan else None)


def _layer_files(revision: str) -> list[Path]:
    """Those that were laid out last for that model."""
    folders = (default_cache_dir() / "offload").glob(f"{revision}-*")
    newest = max((each for each in folders if each.is_dir()), key=lambda each: each.stat().st_mtime, default=None)
    if newest is None:
        raise InvalidArgument("the layers are not in this machine's cache folder", "offload")
    return sorted(newest.glob("*.safetensors"))


def _speed_table(figures: Sequence[OffloadFigures]) -> Table:
    table = new_table("T", "off, ms/token", "plan, ms/token", "speedup", "ceiling", "of it", "planned", "differs")
    for each in figures:
        planned = f"{each.predicted.speedup:.2f}, {in_short(each.predicted.shape)}" if each.predicted else "-"
        table.add_row(
            f"{each.temperature:g}",
            f"{each.off.seconds_per_token * 1e3:.0f}",
            f"{each.plan.seconds_per_token * 1e3:.0f}",
            f"{each.speedup:.2f}",
            f"{each.ceiling:.2f}",
            f"{each.speedup / each.ceiling:.0%}",
            planned,
            f"{each.num_prompts_that_differ}",
        )
    table.caption = (
        "over all tokens after the first of each answer; ceiling: F t(1) / (t(n) + draft) with the tokens per step "
        "that were met, reading at the raw rate; differs: prompts whose tokens are not plain decoding's"
    )
    return table


def _category_table(figures: Sequence[OffloadFigures]) -> Table:
    table = new_table("T", *figures[0].by_category)
    for each in figures:
        table.add_row(f"{each.temperature:g}", *(f"{ratio:.2f}" for ratio in each.by_category.values()))
    table.caption = "speedup by category: the median of pairs that answer one prompt"
    return table


def _forward_table(figures: Sequence[OffloadFigures]) -> Table:
    table = new_table(
        "T", "", "tokens/step", "draft, s", "forward, s", "computes", "waits", "reads, GB", "GB/s", "of raw"
    )
    for each in figures:
        for arm in (each.off, each.plan):
            table.add_row(f"{each.temperature:g}", *_forward_cells(arm, each.raw_bytes_per_second))
    table.caption = (
        "draft: of a step; forward: of the target, those of prompts among them; GB/s: by the time of forwards, which "
        "reading goes on between; raw: only reading the same files, or copying, between the answers, the median"
    )
    return table


def _forward_cells(arm: ArmStreaming, raw: float) -> tuple[str, ...]:
    streamed = arm.streamed
    count, rate = streamed.num_forwards, streamed.bytes_per_second
    return (
        arm.name,
        f"{arm.tokens_per_step:.2f}",
        f"{arm.draft_seconds:.2f}",
        f"{streamed.forward_seconds / count:.2f}",
        f"{streamed.compute_seconds:.2f}",
        f"{streamed.stall_seconds / count:.2f}",
        f"{streamed.bytes_of_forward / 1e9:.2f}",
        f"{rate / 1e9:.2f}",
        f"{rate / raw:.0%}",
    )
