"""`sequoia loadtest`: what it asks, how it counts, and both protocols against a running system."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import System, start_tiny_system

from sequoia.cli import main
from sequoia.cli.benchmarks.prompt_set import BenchPrompt, prompt_set
from sequoia.cli.load.load_figures import ArmLoad, LevelFigures
from sequoia.cli.load.running import Arrivals, Run, run_load
from sequoia.cli.load.timeline import Ending, Piece, Timeline
from sequoia.cli.load.workload import LoadRequest, Mix, arrival_seconds
from sequoia.errors import Unavailable

PROMPT = BenchPrompt("code", "one", "text")
ALL_ALIKE = dict.fromkeys((each.category for each in prompt_set()), 1.0)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from start_tiny_system(tmp_path_factory.mktemp("load"), "llama", http_port=0)


class CountingDriver:
    """Answers with so many pieces of one token, and knows how many ask at a time and who went away."""

    def __init__(self, num_pieces: int = 4) -> None:
        self.num_pieces, self.num_running, self.most_running = num_pieces, 0, 0
        self.num_left = 0

    async def ask(self, request: LoadRequest, arm: str) -> AsyncGenerator[Piece]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        has_ended = False
        try:
            await asyncio.sleep(0.02)
            for _ in range(self.num_pieces):
                await asyncio.sleep(0)
                yield Piece("a", 1)
            has_ended = True
            yield Piece("", 0, Ending(self.num_pieces, num_steps=2, num_accepted_tokens=2))
        finally:
            self.num_running -= 1
            self.num_left += not has_ended


class DeadDriver:
    """Nobody is there."""

    async def ask(self, request: LoadRequest, arm: str) -> AsyncGenerator[Piece]:
        raise Unavailable("nobody is there")
        yield


def run_with(
    driver: CountingDriver | DeadDriver, requests: Sequence[LoadRequest], max_concurrency: int | None = None
) -> Run:
    arrivals = Arrivals([0.0] * len(requests), max_concurrency)
    return asyncio.run(run_load(driver, "auto", requests, arrivals, lambda _: None))


def timeline(num_tokens: int, seconds: float, *pieces: float, text: str = "", outcome: str = "done") -> Timeline:
    ending = Ending(num_tokens, num_steps=2, num_accepted_tokens=num_tokens - 2) if outcome == "done" else None
    request = LoadRequest(PROMPT, num_tokens, seed=0)
    return Timeline(request, 0.0, pieces, seconds, outcome, num_tokens, text, ending)


def test_the_same_seed_asks_the_same_requests() -> None:
    mix = Mix(prompt_set(), ALL_ALIKE, max_tokens=16, cancel_rate=0.3)
    assert mix.requests(50, seed=3) == mix.requests(50, seed=3)
    assert mix.requests(50, seed=3) != mix.requests(50, seed=4)


def test_categories_come_in_their_shares_and_so_do_cancelled_requests() -> None:
    mix = Mix(prompt_set(), {"code": 3.0, "prose": 1.0}, max_tokens=16, cancel_rate=0.3)
    requests = mix.requests(4000, seed=0)
    by_category = Counter(each.prompt.category for each in requests)
    assert set(by_category) == {"code", "prose"}
    assert by_category["code"] == pytest.approx(3000, abs=150)
    cancelled = [each.cancel_after for each in requests if each.cancel_after is not None]
    assert len(cancelled) == pytest.approx(1200, abs=150)
    assert set(cancelled) == set(range(16))


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_their_variation(burstiness: float, variation: float) -> None:
    """The standard deviation of a gamma distribution's intervals is their mean over the root of its shape."""
    due = arrival_seconds(20_000, rate=5.0, burstiness=burstiness, seed=1)
    intervals = np.diff(due)
    assert due[0] == 0.0
    assert intervals.mean() == pytest.approx(0.2, rel=0.05)
    assert intervals.std() / intervals.mean() == pytest.approx(variation, rel=0.05)


def test_without_a_rate_all_are_due_at_once() -> None:
    assert arrival_seconds(3, float("inf"), 1.0, seed=0) == [0.0, 0.0, 0.0]


def test_no_more_requests_run_than_may() -> None:
    driver = CountingDriver()
    run = run_with(driver, [LoadRequest(PROMPT, 4, seed=0)] * 20, max_concurrency=3)
    assert driver.most_running == 3
    assert [each.outcome for each in run.timelines] == ["done"] * 20
    assert {each.num_tokens for each in run.timelines} == {4}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_request_goes_away_after_what_it_was_to_receive(after: int) -> None:
    driver = CountingDriver()
    [found] = run_with(driver, [LoadRequest(PROMPT, 4, seed=0, cancel_after=after)]).timelines
    assert (found.outcome, found.num_tokens) == ("cancelled", after)
    assert (driver.num_left, driver.num_running) == (1, 0)


def test_a_failure_is_told_and_ends_nothing_else() -> None:
    run = run_with(DeadDriver(), [LoadRequest(PROMPT, 4, seed=0)] * 3)
    arm = ArmLoad("auto", (run,))
    assert arm.errors == {"Unavailable: nobody is there": 3}
    assert (arm.num("failed"), arm.finished, arm.latency("ttft", (50.0,))) == (3, (), None)


def test_latencies_are_of_finished_answers() -> None:
    finished = timeline(5, 0.5, 0.1, 0.3, 0.5), timeline(3, 0.4, 0.2, 0.4)
    arm = ArmLoad("auto", (Run("auto", (*finished, timeline(9, 9.0, 8.0, outcome="cancelled")), seconds=2.0),))
    found = {name: arm.latency(name, (0.0, 100.0)) for name in ("ttft", "tpot", "itl", "e2el")}
    values = {name: tuple(each.percentiles.values()) for name, each in found.items() if each}
    assert values["ttft"] == pytest.approx((100.0, 200.0))
    assert values["tpot"] == pytest.approx((100.0, 100.0))
    assert values["itl"] == pytest.approx((200.0, 200.0))
    assert values["e2el"] == pytest.approx((400.0, 500.0))
    assert arm.tokens_per_second == pytest.approx(17 / 2)
    assert arm.tokens_per_step == pytest.approx(8 / 4)
    assert arm.goodput({"ttft": 150.0, "e2el": 1000.0}) == pytest.approx(0.5)


def test_arms_are_compared_in_pairs_of_runs() -> None:
    fast = ArmLoad("auto", tuple(Run("auto", (timeline(30, 1.0, 0.1, text="a"),), seconds) for seconds in (1.0, 2.0)))
    slow = ArmLoad("off", tuple(Run("off", (timeline(30, 1.0, 0.1, text="b"),), seconds) for seconds in (2.0, 2.0)))
    level = LevelFigures("2 sessions", (fast, slow))
    ratio = level.against_off(fast)
    assert ratio is not None
    assert ratio == pytest.approx((1.25, 1.5, 1.75))
    assert (level.against_off(slow), level.num_other_texts(fast)) == (None, 2)


@pytest.mark.parametrize("protocol", ["grpc", "openai"])
def test_a_running_system_is_loaded(system: System, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = system.deployment
    where = ["--address", deployment.address] if protocol == "grpc" else ["--base-url", str(deployment.url)]
    size = ["--num-prompts", "8", "--num-warmups", "2", "--rounds", "2", "--output-len", "12", "--ignore-eos"]
    assert main(["loadtest", *where, "--max-concurrency", "1,4", *size, "--raw", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["level"] for each in report["levels"]] == ["1 session", "4 sessions"]
    for level in report["levels"]:
        for arm in level["arms"]:
            assert (arm["completed"], arm["cancelled"], arm["failed"]) == (16, 0, 0)
            assert arm["total_output_tokens"] == 16 * 12
            assert 0.0 < arm["p50_ttft_ms"] <= arm["p99_ttft_ms"] <= arm["p99_e2el_ms"]
            assert arm["p50_tpot_ms"] > 0.0
        auto, off = level["arms"]
        assert off["tokens_per_step"] == 1.0
        assert auto["other_texts_than_off"] == 0
        assert auto["against_off"]["low"] <= auto["against_off"]["median"]


@pytest.mark.parametrize("protocol", ["grpc", "openai"])
def test_cancelled_requests_leave_nothing_behind(
    system: System, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = system.deployment
    where = ["--address", deployment.address] if protocol == "grpc" else ["--base-url", str(deployment.url)]
    size = ["--num-prompts", "30", "--num-warmups", "0", "--rounds", "1", "--output-len", "16", "--raw"]
    arguments = [*where, *size, "--request-rate", "40", "--cancel-rate", "0.5", "--arms", "auto", "--json"]
    assert main(["loadtest", *arguments]) == 0
    [[arm]] = [each["arms"] for each in json.loads(capsys.readouterr().out)["levels"]]
    assert arm["cancelled"] > 0
    assert arm["completed"] + arm["cancelled"] == 30
    assert eventually_free(system)


def eventually_free(system: System) -> bool:
    """Sessions end a moment after their request."""
    return asyncio.run(_is_free(system))


async def _is_free(system: System) -> bool:
    for _ in range(100):
        if not any(system.num_slots_used(name) for name in ("verify", "draft")):
            return True
        await asyncio.sleep(0.05)
    return False


def test_a_report_needs_no_other_file(system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "load.html"
    size = ["--num-prompts", "3", "--num-warmups", "0", "--rounds", "1", "--output-len", "8", "--raw"]
    arguments = ["--address", system.deployment.address, "--max-concurrency", "2", "--goodput", "ttft:60000", *size]
    assert main(["loadtest", *arguments, "--link-delay-ms", "5", "--html", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.count("<svg") == 1
    assert "2 sessions" in text
    assert "5 ms" in text
    assert [each for each in ("src=", "@import", "<link") if each in text] == []
    assert "goodput" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--cancel-rate", "1"], "cancel-rate: is 1.0; it must be 0 or more, and below 1"),
        (["--max-concurrency", "0"], "max-concurrency: has a number below 1"),
        (["--request-rate", "0"], "request-rate: has a rate that is not positive"),
        (["--request-rate", "1", "--max-concurrency", "1,2"], "max-concurrency: is a list"),
        (["--mix", "poems"], "mix: has 'poems'; known are code, prose"),
        (["--metric-percentiles", "101"], "metric-percentiles: has 101"),
        (["--output-len", "1"], "output-len: is 1; it must be 2 or more"),
        (["--address", "127.0.0.1:1", "--backend", "openai"], "backend: is spoken by a gateway"),
        (["--address", "127.0.0.1:1", "--base-url", "http://127.0.0.1:1/v1"], "base-url: is of an OpenAI API"),
        (["--base-url", "127.0.0.1:1"], "base-url: '127.0.0.1:1' does not begin with http://"),
        (["--link-delay-ms", "5", "--address", "127.0.0.1:1,127.0.0.1:2"], "link-delay-ms: is for one address"),
        (["--link-delay-ms", "5", "--base-url", "https://127.0.0.1:1/v1"], "link-delay-ms: is for one address"),
        (["--html", "/nowhere/page.html"], "html: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loadtest", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_nobody_at_the_url_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "--base-url", "http://127.0.0.1:1/v1"]) == 1
    assert "base-url: http://127.0.0.1:1/v1/: ConnectError" in capsys.readouterr().err
