"""One benchmark of arms from start to report: who takes part, on which prompts, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from sequoia.cli.benchmarks.arm_figures import figures_of
from sequoia.cli.benchmarks.arm_measuring import OFF, Arm, Measured, measure
from sequoia.cli.benchmarks.arm_report import ArmDescription, Report
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.bench_system import BenchSystem
from sequoia.cli.benchmarks.own_arms import OwnArm, plan_in_force, ways
from sequoia.cli.benchmarks.peer_arms import PeerArm, Peers, Workplace, started_peers
from sequoia.cli.benchmarks.peer_catalog import PEERS
from sequoia.cli.benchmarks.peer_models import PeerWork, encode, find_models
from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.rule_timing import worker_to_dict
from sequoia.client import Client, Prompt
from sequoia.planner import TreePlan
from sequoia.process_memory import peak_bytes
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.v1.worker_pb2 import WorkerDescription

_NO_PLAN = "there is no plan for temperature {:g}; run `sequoia plan` first"


@dataclass(frozen=True, slots=True)
class ArmWorkload:
    """What is measured, and on what."""

    arms: tuple[str, ...]  # ours, beside plain decoding
    shapes: tuple[str, ...]
    peers: tuple[str, ...]
    temperature: float
    asking: Asking

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        ours = {"arms": self.arms, "shapes": self.shapes, "peers": self.peers, "temperature": self.temperature}
        return {**ours, **asdict(self.asking)}


def run_arms(system: BenchSystem, workload: ArmWorkload, workplace: Workplace) -> Report:
    """All arms in turn. Raises SequoiaError when the system fails; a peer that fails is reported as such."""
    with Client(system.address, **system.access) as client:
        pair = client.describe_pair()
        with _peers(pair, workload, workplace) as (peers, work):
            plan = plan_in_force(client, workload.temperature)
            own, missing = _own_arms(client, plan, workload, work)
            arms: list[Arm] = [*own, *peers.arms]
            doing = f"{len(arms)} arms, {workload.asking.num_answers} prompts"
            with workplace.steps.step(doing) as on_progress:
                measured = measure(arms, workload.asking, on_progress)
            descriptions = {each.name: _own_description(each, pair, system) for each in own}
            descriptions |= {each.name: _peer_description(each, work) for each in peers.arms if work}
    unavailable = {**missing, **peers.unavailable, **measured.unavailable}
    return _report(pair, plan, workload, work, measured, descriptions, unavailable)


@contextmanager
def _peers(
    pair: DescribePairResponse, workload: ArmWorkload, workplace: Workplace
) -> Iterator[tuple[Peers, PeerWork | None]]:
    """Those that could be had, and what they work on; None when there are none."""
    if not workload.peers:
        yield Peers(), None
        return
    try:
        models = find_models(pair)
    except PeerFailed as error:
        yield Peers(unavailable=dict.fromkeys(workload.peers, str(error))), None
        return
    asking = workload.asking
    work = PeerWork(models, encode(models, asking.prompts, asking.is_raw), asking.max_tokens)
    with started_peers(workload.peers, work, workplace) as peers:
        yield peers, work


def _own_arms(
    client: Client, plan: TreePlan | None, workload: ArmWorkload, work: PeerWork | None
) -> tuple[list[OwnArm], dict[str, str]]:
    """Ours, and why others are none. Beside peers, everybody gets the same token ids."""
    asking = workload.asking
    prompts: Mapping[BenchPrompt, Prompt] = work.prompts if work else {p: asking.form(p) for p in asking.prompts}
    found = ways(plan, workload.arms, workload.shapes)
    temperature = workload.temperature
    arms = [OwnArm(name, temperature, how, client, prompts) for name, how in found.items() if how is not None]
    return arms, {name: _NO_PLAN.format(temperature) for name, how in found.items() if how is None}


def _own_description(arm: OwnArm, pair: DescribePairResponse, system: BenchSystem) -> ArmDescription:
    precision = _precision(pair.verify)
    has_draft = arm.name != OFF and pair.HasField("draft")
    if has_draft:
        precision += f", draft {_precision(pair.draft)}"
    return ArmDescription("sequoia", arm.settings, precision, system.peak_bytes(with_draft=has_draft))


def _precision(worker: WorkerDescription) -> str:
    return worker.dtype if worker.quantization == "none" else worker.quantization


def _peer_description(arm: PeerArm, work: PeerWork) -> ArmDescription:
    precision = work.models.gguf_type if PEERS[arm.name].reads_gguf else work.models.dtype
    return ArmDescription(arm.engine, arm.settings, precision, peak_bytes([arm.process.pid]))


def _report(
    pair: DescribePairResponse,
    plan: TreePlan | None,
    workload: ArmWorkload,
    work: PeerWork | None,
    measured: Measured,
    descriptions: dict[str, ArmDescription],
    unavailable: dict[str, str],
) -> Report:
    eos_token_ids = work.models.codec.eos_token_ids if work else frozenset()
    return Report(
        pair={
            "target": worker_to_dict(pair.verify),
            "draft": worker_to_dict(pair.draft) if pair.HasField("draft") else None,
        },
        workload=workload.to_dict(),
        planned_acceptance=plan.inputs.acceptance if plan else None,
        figures=tuple(figures_of(measured.samples, eos_token_ids)),
        descriptions=descriptions,
        unavailable=unavailable,
        samples=measured.samples,
    )
