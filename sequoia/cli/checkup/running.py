"""How a running pair is: its workers, the links to them, its plan, and whether it keeps what the plan promises."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.workers import check_pair
from sequoia.cli.checkup.finding import Finding, Grade
from sequoia.cli.shape_names import in_words
from sequoia.client import Client
from sequoia.errors import SequoiaError
from sequoia.hardware import LatencyProfile
from sequoia.planner import TreePlan
from sequoia.speculation_figures import state_name
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.v1.worker_pb2 import WorkerDescription
from sequoia.wire import profile_from_wire

_CALL_TIMEOUT_SECONDS = 10.0
# Of a forward over one token: a round trip that is more of it makes steps notably longer.
_LONG_ROUND_TRIP = 0.1
# A draft whose forward takes more of the target's pays for texts that are easy to guess only.
_SLOW_DRAFT = 0.4


def check_running(client: Client) -> Iterator[Finding]:
    """Of the pair behind a coordinator."""
    try:
        pair = client.describe_pair(timeout_seconds=_CALL_TIMEOUT_SECONDS)
    except SequoiaError as error:
        yield Finding("coordinator", "bad", str(error), "start one (`sequoia up`), or say where it is: --address")
        return
    verify = _profile(pair.verify)
    yield _check_worker("target", pair.verify, verify)
    yield _check_link("target", pair.verify_rtt_seconds, verify)
    if not pair.HasField("draft"):
        yield Finding(
            "draft", "bad", "there is none: everything is decoded plainly", "start a draft worker, or see its log"
        )
        return
    draft = _profile(pair.draft)
    yield _check_worker("draft", pair.draft, draft)
    yield _check_link("draft", pair.draft_rtt_seconds, verify)
    yield _check_pair(pair)
    if verify and draft:
        yield _check_speed(verify, draft)
    yield from _check_plan(client)


def _profile(worker: WorkerDescription) -> LatencyProfile | None:
    try:
        return profile_from_wire(worker.latencies)
    except ValueError:
        return None


def _check_worker(name: str, worker: WorkerDescription, profile: LatencyProfile | None) -> Finding:
    precision = worker.dtype if worker.quantization == "none" else worker.quantization
    told = f"{worker.model}, {precision}, {worker.hardware_key}"
    if profile is None:
        return Finding(
            name, "bad", f"{told}; its measured times are of no use", "start it again; is it of this version?"
        )
    curve = profile.curve()
    widest = curve.max_tokens
    times = f"1 token {curve.at(1) * 1e3:.1f} ms, {widest} tokens {curve.at(widest) * 1e3:.1f} ms"
    room = f"{worker.num_slots} sessions, {worker.kv_tokens} tokens of KV memory"
    return Finding(name, "good", f"{told}; {times}; {room}")


def _check_link(name: str, seconds: float, verify: LatencyProfile | None) -> Finding:
    told = f"{name}: round trip {seconds * 1e3:.2f} ms"
    if verify is None or seconds <= _LONG_ROUND_TRIP * verify.curve().at(1):
        return Finding("link", "good", told)
    share = seconds / verify.curve().at(1)
    remedy = "bring the worker closer to the coordinator; plans count the distance, and choose larger trees"
    return Finding("link", "note", f"{told}, {share:.0%} of a forward of the target", remedy)


def _check_pair(pair: DescribePairResponse) -> Finding:
    try:
        check_pair(pair.verify, pair.draft)
    except SequoiaError as error:
        return Finding("pair", "bad", str(error), "choose a draft of the target's family")
    place = "share a device and take turns" if pair.verify.device_id == pair.draft.device_id else "have a device each"
    return Finding("pair", "good", f"one tokenizer, {pair.verify.vocab_size} tokens; the two {place}")


def _check_speed(verify: LatencyProfile, draft: LatencyProfile) -> Finding:
    share = draft.curve().at(1) / verify.curve().at(1)
    told = f"a level of the draft takes {share:.0%} of a forward of the target"
    if share <= _SLOW_DRAFT:
        return Finding("draft", "good", told)
    return Finding(
        "draft", "note", told, "a smaller draft may pay more: `sequoia train-draft`, or --draft-quantization"
    )


def _check_plan(client: Client) -> Iterator[Finding]:
    """Of greedy requests, one at a time."""
    try:
        found = client.explain(timeout_seconds=_CALL_TIMEOUT_SECONDS)
        plan = TreePlan.from_json(found.plan_json) if found.plan_json else None
    except (SequoiaError, ValueError) as error:
        yield Finding("plan", "bad", str(error), "is the coordinator of this version?")
        return
    if plan is None:
        yield Finding("plan", "note", "there is none yet: a built-in tree serves", "measure the pair: `sequoia plan`")
    elif plan.chosen.kind == "off":
        best = (
            f"the best tree would have {plan.best_tree.speedup:.2f} of its speed" if plan.best_tree else "no tree fits"
        )
        yield Finding(
            "plan", "note", f"plain decoding is quickest; {best}", "a draft that is quicker or guesses better"
        )
    else:
        promised = f"{in_words(plan.chosen.shape)}, predicted speedup {plan.chosen.speedup:.2f}"
        yield Finding("plan", "good", promised)
    state = state_name(found.state)
    if state:
        grade: Grade = "good" if state == "on" or (plan is not None and plan.chosen.kind == "off") else "note"
        yield Finding(
            "state", grade, f"{state}: {found.state_reason}", "" if grade == "good" else "`sequoia explain` shows why"
        )
