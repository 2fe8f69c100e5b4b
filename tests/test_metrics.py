"""What /metrics tells: of requests, by what they did; of workers, by who is there; and whether speculation happens."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from certificates import Authority
from cluster import Cluster
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import write_tiny_pair

from coordinator.fallback import Fallback
from coordinator.gaits import PLAIN, Gait, Gaits
from coordinator.governor import Governor
from coordinator.metrics import complete, serve_metrics
from coordinator.report import Report
from coordinator.request_metrics import RequestMetrics
from coordinator.speculation import BUILT_IN_CHAIN, BUILT_IN_TREE, Speculator
from coordinator.workers import Workers
from sequoia.errors import ResourceExhausted, SequoiaError
from sequoia.rules import GREEDY
from sequoia.situation import Situation
from sequoia.tls import Tls
from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, tree_pb2, verify_pb2, worker_pb2


class Served(Speculator):
    """A speculator that has served one kind of request."""

    def __init__(self) -> None:
        self.num_ahead_hits, self.num_ahead_misses = 3, 4
        self._governors = {Situation.of(GREEDY, 0.0): Governor(Gaits.unplanned(BUILT_IN_TREE, BUILT_IN_CHAIN))}


class Metrics:
    """What a coordinator with these parts tells."""

    def __init__(self, workers: Workers) -> None:
        self.requests, self.speculator, self.workers = RequestMetrics(), Served(), workers
        self.registry = complete(self.requests, self.speculator, workers)

    @property
    def governor(self) -> Governor:
        [governor] = self.speculator.governors.values()
        return governor

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"sequoia_{name}", labels)


@pytest.fixture
async def metrics() -> Metrics:
    return Metrics(Workers("127.0.0.1:1,127.0.0.1:2", "127.0.0.1:3", 1.0, 8))


def free_port() -> int:
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


Values = dict[tuple[str, ...], float]


def scrape(port: int) -> Values:
    """Values by name and labels, as in `("sequoia_workers", "role=draft", "state=usable")`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {
            (each.name, *sorted(f"{name}={value}" for name, value in each.labels.items())): each.value
            for family in families
            for each in family.samples
        }


def worker(name: str) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(instance_id=name, num_slots=4, kv_tokens=1000, max_tree_size=8)


def drafted(report: Report, parents: list[int], accepted: list[int]) -> None:
    """One step whose tree came."""
    tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=parents), token_ids=[0] * len(parents))
    draft = draft_pb2.DraftResponse(tree=tree)
    verdict = verify_pb2.Verdict(accepted_nodes=accepted, bonus_token_id=1)
    report.host()
    report.drafted(draft)
    report.verified(verify_pb2.VerifyResponse(verdict=verdict), draft, Topology(tuple(parents)))


async def test_prometheus_reads_state_and_paces(metrics: Metrics) -> None:
    for shape in [BUILT_IN_TREE] * 8 + [PLAIN] * 4 + [BUILT_IN_TREE] * 4:  # with a trial in the middle
        metrics.governor.observe(shape, *((0.1, 1) if shape == PLAIN else (0.2, 4)))
    port = free_port()
    serve_metrics(metrics.registry, port)
    found = await asyncio.to_thread(scrape, port)
    kind = ("context=1024", "rule=greedy"), ("sessions=1", "temperature=0")
    on = ("sequoia_speculation_state", kind[0][0], "reason=no_plan", kind[0][1], kind[1][0], "state=on", kind[1][1])
    assert found[on] == 1.0
    off = ("sequoia_speculation_state", kind[0][0], "reason=", kind[0][1], kind[1][0], "state=off", kind[1][1])
    assert found[off] == 0.0
    tree = ("context=1024", "levels=4", "rule=greedy", "sessions=1", "size=8", "temperature=0")
    plain = ("context=1024", "levels=1", "rule=greedy", "sessions=1", "size=1", "temperature=0")
    assert found["sequoia_seconds_per_token", *tree] == pytest.approx(0.05)
    assert found["sequoia_seconds_per_token", *plain] == pytest.approx(0.1)
    assert found["sequoia_tokens_per_step", *tree] == pytest.approx(4.0)
    assert found["sequoia_draft_ahead_attempts_total",] == 7.0
    assert found["sequoia_draft_ahead_hits_total",] == 3.0
    assert found["process_resident_memory_bytes",] > 0


async def test_trees_are_counted_by_levels_by_nodes_and_by_position(metrics: Metrics) -> None:
    report = Report(metrics.requests)
    drafted(report, [-1, 0, 0, 1, 1, 3], [1, 3])
    drafted(report, [-1, 0, 0], [2])
    drafted(report, [-1, 0, 1], [])
    assert metrics.value("spec_decode_num_drafts_total") == 3.0
    assert metrics.value("spec_decode_num_draft_tokens_total") == 3 + 1 + 2, "levels below the root"
    assert metrics.value("spec_decode_num_draft_nodes_total") == 5 + 2 + 2
    assert metrics.value("spec_decode_num_accepted_tokens_total") == 3.0
    assert metrics.value("spec_decode_num_accepted_tokens_per_pos_total", position="0") == 2.0
    assert metrics.value("spec_decode_num_accepted_tokens_per_pos_total", position="1") == 1.0
    assert metrics.value("spec_decode_num_accepted_tokens_per_pos_total", position="2") is None


async def test_a_root_that_came_alone_is_no_draft(metrics: Metrics) -> None:
    drafted(Report(metrics.requests), [-1], [])
    assert metrics.value("spec_decode_num_drafts_total") == 0.0


async def test_a_round_is_told_by_stage(metrics: Metrics) -> None:
    report = Report(metrics.requests)
    report.host()
    report.verified(verify_pb2.VerifyResponse(worker_seconds=0.0), None, PLAIN)
    drafted(report, [-1, 0], [1])
    counts = {stage: metrics.value("round_seconds_count", stage=stage) for stage in ("verify", "network", "host")}
    assert counts == dict.fromkeys(("verify", "network", "host"), 2.0)
    assert metrics.value("round_seconds_count", stage="draft") == 0.0, "that draft took no time at all"


async def test_what_a_step_fell_back_for_is_counted(metrics: Metrics) -> None:
    Report(metrics.requests).fell_back("draft: no tree within 1 s", Fallback.LATE)
    assert metrics.value("fallback_steps_total", reason="late") == 1.0
    assert metrics.value("fallback_steps_total", reason="lost") == 0.0


async def test_times_of_an_answer(metrics: Metrics) -> None:
    metrics.requests.opened(0.5)
    metrics.requests.finished(7, 11, 0.5, 2.5)
    metrics.requests.finished(7, 1, 0.5, 0.5)
    assert metrics.value("time_to_first_token_seconds_sum") == 0.5
    assert metrics.value("time_per_output_token_seconds_sum") == pytest.approx(0.2)
    assert metrics.value("time_per_output_token_seconds_count") == 1.0, "one token has no next one"
    assert metrics.value("e2e_request_latency_seconds_sum") == 3.0
    assert metrics.value("prompt_tokens_total") == 14.0
    assert metrics.value("generation_tokens_total") == 12.0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ResourceExhausted("full", "queue"), "RESOURCE_EXHAUSTED"),
        (asyncio.CancelledError(), "CANCELLED"),
        (ValueError("a bug"), "INTERNAL"),
        (None, "OK"),
    ],
)
async def test_requests_are_counted_by_how_they_end(
    metrics: Metrics, error: SequoiaError | BaseException | None, status: str
) -> None:
    with suppress(BaseException), metrics.requests.request():
        if error is not None:
            raise error
    assert metrics.value("requests_total", status=status) == 1.0


async def test_load_is_what_runs_and_waits_as_a_share_of_what_is_there(metrics: Metrics) -> None:
    pool = metrics.workers.verify
    assert metrics.value("session_load", role="verify") is None, "without workers it is not idle"
    pool.members[0].found(worker("a"))
    async with AsyncExitStack() as sessions:
        for _ in range(3):
            await sessions.enter_async_context(pool.admission(300))
        waiting = asyncio.create_task(sessions.enter_async_context(pool.admission(300)))
        await asyncio.sleep(0)
        assert metrics.value("sessions", state="running") == 3.0
        assert metrics.value("sessions", state="waiting") == 1.0
        assert metrics.value("session_load", role="verify") == 1.0
        assert metrics.value("kv_tokens_reserved", role="verify") == 900.0
        assert metrics.value("kv_memory_load", role="verify") == 1.2
        pool.members[1].found(worker("b"))
        pool.admission.admit()
        await waiting
        assert metrics.value("session_load", role="verify") == 0.5
        assert metrics.value("kv_memory_load", role="verify") == 0.6
    assert metrics.value("session_load", role="verify") == 0.0
    assert metrics.value("queue_limit") == 8.0


async def test_a_drafts_load_is_that_of_its_own_sessions(metrics: Metrics) -> None:
    [member] = metrics.workers.draft.members
    member.found(worker("c"))
    member.enter(250)
    assert metrics.value("session_load", role="draft") == 0.25
    assert metrics.value("kv_memory_load", role="draft") == 0.25
    assert metrics.value("session_slots_taken", role="draft") == 1.0


async def test_workers_are_counted_by_state(metrics: Metrics) -> None:
    first, second = metrics.workers.verify.members
    first.found(worker("a"))
    assert metrics.value("workers", role="verify", state="usable") == 1.0
    assert metrics.value("workers", role="verify", state="missing") == 1.0
    first.failed("lost")
    assert metrics.value("workers", role="verify", state="paused") == 1.0
    second.found(worker("b"))
    second.stays(False)
    assert metrics.value("workers", role="verify", state="leaving") == 1.0
    assert metrics.value("session_slots", role="verify") == 4.0, "one that leaves is nothing to count on"


async def test_speculation_that_is_configured_and_not_active_says_why(metrics: Metrics) -> None:
    assert metrics.value("speculation_configured") == 1.0
    assert metrics.value("speculation_active", reason="no_draft_worker") == 0.0
    metrics.workers.draft.members[0].found(worker("c"))
    assert metrics.value("speculation_active", reason="") == 1.0
    gaits = Gaits({Gait.ON: BUILT_IN_TREE, Gait.OFF: PLAIN}, {Gait.ON: 1.0, Gait.OFF: 1.0}, Gait.OFF, "not worth it")
    metrics.governor.follow(gaits)
    assert metrics.value("speculation_active", reason="plan") == 0.0


async def test_speculation_that_is_not_configured_is_not_missed() -> None:
    metrics = Metrics(Workers("127.0.0.1:1", "", 1.0))
    assert metrics.value("speculation_configured") == 0.0
    assert metrics.value("speculation_active", reason="not_configured") == 0.0


async def test_in_plain_text_it_is_on_loopback_alone(metrics: Metrics) -> None:
    port = free_port()
    serve_metrics(metrics.registry, port)
    with socket.create_server(("127.0.0.2", port)):
        pass  # all addresses would have been taken
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


async def test_with_certificates_it_is_https_for_who_has_one(metrics: Metrics, tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    client = authority.issue("prometheus", "prometheus.example")
    serve_metrics(metrics.registry, port, Tls(*authority.server(), ca=authority.path))
    url = f"https://127.0.0.1:{port}/metrics"
    context = ssl.create_default_context(cafile=authority.path)
    with pytest.raises(OSError, match=r"certificate required|EOF|reset"):
        await asyncio.to_thread(fetched, url, context)
    context.load_cert_chain(client.cert, client.key)
    assert b"sequoia_draft_ahead" in await asyncio.to_thread(fetched, url, context)


def fetched(url: str, context: ssl.SSLContext) -> bytes:
    with urllib.request.urlopen(url, context=context, timeout=5) as reply:
        found: bytes = reply.read()
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Cluster, int]]:
    models, port = write_tiny_pair(tmp_path), free_port()
    with Cluster(models, tmp_path, num_verify=1, num_draft=1, **{"metrics-port": port}) as cluster:
        yield cluster, port


@pytest.mark.slow
def test_a_running_system_tells_what_its_clients_are_told(cluster: tuple[Cluster, int]) -> None:
    system, port = cluster
    tree = Topology((-1, 0, 0, 1, 1, 3))
    answer = system.client.generate(
        list(range(40, 70)), max_tokens=60, temperature=0, ignore_eos=True, speculation=tree
    )
    figures, found = answer.speculation, scrape(port)
    assert found["sequoia_requests_total", "status=OK"] == 1.0
    assert found["sequoia_generation_tokens_total",] == 60.0
    assert found["sequoia_prompt_tokens_total",] == 30.0
    assert found["sequoia_spec_decode_num_drafts_total",] == figures.num_drafted_steps > 0
    assert found["sequoia_spec_decode_num_draft_nodes_total",] == figures.num_drafted_tokens
    assert found["sequoia_spec_decode_num_accepted_tokens_total",] == figures.num_accepted_tokens
    fallbacks = [value for key, value in found.items() if key[0] == "sequoia_fallback_steps_total"]
    assert sum(fallbacks) == figures.num_fallback_steps
    assert found["sequoia_round_seconds_count", "stage=verify"] == figures.num_steps
    assert found["sequoia_round_seconds_sum", "stage=draft"] == pytest.approx(figures.stage_seconds.draft)
    assert found["sequoia_workers", "role=draft", "state=usable"] == 1.0
    assert found["sequoia_session_load", "role=verify"] == 0.0
    system.kill("draft0")
    more = system.client.generate(list(range(40, 70)), max_tokens=60, temperature=0, ignore_eos=True, speculation=tree)
    assert more.text == answer.text
    assert scrape(port)["sequoia_requests_total", "status=OK"] == 2.0
