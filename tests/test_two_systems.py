"""Two systems in pairs: whose turn it is, figures of hand-made answers, and `sequoia bench ahead` and `placement`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tiny_models import write_tiny_pair

from sequoia.cli import main
from sequoia.cli.benchmarks import two_systems
from sequoia.cli.benchmarks.arm_figures import Spread
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.modes import Mode, TreeWorkload
from sequoia.cli.benchmarks.pair_figures import PairFigures, figures_of
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.benchmarks.two_systems import Compared, Side, SideAnswer, compare
from sequoia.cli.deployment import DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import StageSeconds
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import Topology

GREEDY, SEQUOIA = Mode("greedy", 0.0), Mode("sequoia", 0.6)
PROMPTS = tuple(BenchPrompt("code", name, name) for name in "abc")
CHAIN = Topology.chain(4)
SIDES = (Side("on", DeploymentSettings()), Side("off", DeploymentSettings()))


def answer(side: str, prompt: BenchPrompt, seconds: float, *, mode: Mode = GREEDY, token_id: int = 5) -> SideAnswer:
    """Four steps of a chain, of 2 s drafting and 3 verifying each, with a hit in three attempts."""
    stages = StageSeconds(draft=8.0, verify=12.0, network=0.0, host=0.0, prefill=0.0)
    figures = SimpleNamespace(
        trees=(TreeUsage(CHAIN, 4, 8, stages),),
        num_ahead_hits=1,
        num_ahead_attempts=3,
        num_steps=5,
        num_drafted_steps=4,
        num_fallback_steps=0,
    )
    usage: Any = SimpleNamespace(time_per_output_token_seconds=seconds)
    generation: Any = SimpleNamespace(token_ids=(token_id,), usage=usage, speculation=figures)
    return SideAnswer(side, mode, "chain of 4", prompt, 0, generation)


def compared(answers: Sequence[SideAnswer], mode: Mode = GREEDY) -> PairFigures:
    workload = TreeWorkload((mode,), {"chain of 4": CHAIN}, Asking(PROMPTS, True, 1, 8))
    [found] = figures_of(("on", "off"), workload, answers)
    return found


def test_the_ratio_is_the_median_of_pairs_whatever_the_order_of_the_answers() -> None:
    on = [answer("on", prompt, seconds) for prompt, seconds in zip(PROMPTS, (1.0, 2.0, 4.0), strict=True)]
    off = [answer("off", prompt, seconds) for prompt, seconds in zip(PROMPTS, (1.5, 2.0, 8.0), strict=True)]
    assert compared([*on, *reversed(off)]).ratio == Spread(1.25, 1.5, 1.75)


def test_steps_and_hits_are_told_by_side() -> None:
    found = compared([answer(side, prompt, 1.0) for prompt in PROMPTS for side in ("off", "on")])
    assert (found.first.name, found.first.num_ahead_hits, found.first.num_ahead_attempts) == ("on", 3, 9)
    assert (found.first.num_drafted_steps, found.first.num_steps) == (12, 15)
    assert (found.second.draft_seconds, found.second.verify_seconds) == (Spread(2.0, 2.0, 2.0), Spread(3.0, 3.0, 3.0))


def test_texts_are_compared_where_chance_repeats_itself() -> None:
    off = [answer("off", prompt, 1.0) for prompt in PROMPTS]
    on = [answer("on", prompt, 1.0, token_id=token_id) for prompt, token_id in zip(PROMPTS, (5, 5, 6), strict=True)]
    assert (compared([*on, *off]).num_equal_texts, compared([*on, *off]).num_pairs) == (2, 3)
    drawn = [answer(side, prompt, 1.0, mode=SEQUOIA) for side in ("on", "off") for prompt in PROMPTS]
    assert compared(drawn, SEQUOIA).num_equal_texts is None


class Systems:
    """Stands for deployments: notes which are up, and who is asked."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextmanager
    def serving(self, side: Side, steps: Steps) -> Iterator[two_systems._System]:
        self.log.append(f"start {side.name}")
        yield two_systems._System(side, _Client(side.name, self.log), [])
        self.log.append(f"stop {side.name}")


class _Client:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def describe_pair(self) -> str:
        return "pair"

    def generate(self, prompt: str, *, max_tokens: int, **_: Any) -> str:
        self._log.append(f"{self._name} {prompt if max_tokens > 8 else 'warm-up'}")
        return "answer"


def run_compare(
    monkeypatch: pytest.MonkeyPatch, *, one_at_a_time: bool, peak: int = 1, available: int | None = 2
) -> tuple[list[str], Compared]:
    systems = Systems()
    monkeypatch.setattr(two_systems, "_serving", systems.serving)
    monkeypatch.setattr(two_systems, "peak_bytes", lambda process_ids: peak)
    monkeypatch.setattr(two_systems, "available_bytes", lambda: available)
    workload = TreeWorkload((GREEDY,), {"chain of 4": CHAIN}, Asking(PROMPTS[:2], True, 2, 32))
    found = compare(SIDES, workload, Steps(Console(quiet=True)), one_at_a_time=one_at_a_time)
    return systems.log, found


def test_together_the_other_one_is_first_at_every_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    log, found = run_compare(monkeypatch, one_at_a_time=False)
    turns = ["on a", "off a", "off b", "on b"] * 2
    assert log == ["start on", "start off", "on warm-up", "off warm-up", *turns, "stop off", "stop on"]
    assert (found.pair, found.were_together, len(found.answers)) == ("pair", True, 8)


def test_apart_the_other_one_is_first_in_every_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log, found = run_compare(monkeypatch, one_at_a_time=True)
    on, off = ([f"start {s}", f"{s} warm-up", f"{s} a", f"{s} b", f"stop {s}"] for s in ("on", "off"))
    assert log == [*on, *off, *off, *on]
    assert [(each.side, each.round) for each in found.answers[::2]] == [("on", 0), ("off", 0), ("off", 1), ("on", 1)]


def test_a_system_that_leaves_no_room_for_another_is_stopped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    log, found = run_compare(monkeypatch, one_at_a_time=False, peak=3)
    assert log[:3] == ["start on", "stop on", "start on"]
    assert not found.were_together


def test_where_the_machine_does_not_tell_both_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_compare(monkeypatch, one_at_a_time=False, available=None)[1].were_together


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags."""
    folder = tmp_path_factory.mktemp("pair")
    write_tiny_pair(folder)
    return ["--target", f"{folder}/target", "--draft", f"{folder}/draft", "--dtype", "float32", "--num-threads", "1"]


@pytest.mark.slow
def test_drafting_ahead_on_and_off(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--max-tokens", "40", "--json", "--log-dir", str(tmp_path)]
    assert main(["bench", "ahead", *models, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["shape"] for each in printed["results"]] == ["chain of 4", "6x4"]
    for each in printed["results"]:
        on, off = each["sides"]
        assert (on["name"], off["name"]) == ("on", "off")
        assert on["ahead_attempts"] > 0 == off["ahead_attempts"]
        assert each["num_equal_texts"] == each["num_pairs"] == 5
        assert each["ratio"]["low"] > 0.0 < on["draft_seconds"]["median"]
    assert printed["were_together"]
    assert {path.parent.name for path in tmp_path.rglob("draft.log")} == {"on", "off"}


@pytest.mark.slow
def test_placements_one_at_a_time(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", "placement", *models, "--quick", "--shape", "off", "--one-at-a-time"]) == 0
    first, second = [line.split() for line in capsys.readouterr().out.splitlines() if ") " in line and " to " in line]
    assert (first[:3], first[-3:]) == (["greedy", "off", "colocated"], ["5", "of", "5"])
    assert second[0] == "split"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["ahead", "--placement", "colocated"], "placement: colocated workers take turns"),
        (["placement", "--placement", "split"], "placement: both placements are compared"),
        (["ahead", "--no-draft"], "no-draft: this benchmark is about"),
        (["ahead", "--shape", "bush"], "shape: 'bush' is neither"),
        (["placement", "--rounds", "0"], "rounds: is 0"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
