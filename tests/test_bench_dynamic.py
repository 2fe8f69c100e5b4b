"""`sequoia bench dynamic`: sums that are known, the order of the answers, a running system."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import System

from sequoia.cli import main
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.dynamic_figures import Duel, DuelFigures, measure
from sequoia.cli.benchmarks.modes import Mode
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.client import StageSeconds
from sequoia.errors import FailedPrecondition
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import DynamicShape, Topology, TreeShape

GREEDY, COUPLED = Mode("greedy", 0.0), Mode("coupled", 0.6)
DYNAMIC, PLANNED = DynamicShape(5, 3, 2), Topology((-1, 0, 0, 1, 1))


def usage(shape: TreeShape, num_steps: int, num_tokens: int, seconds: float) -> TreeUsage:
    return TreeUsage(shape, num_steps, num_tokens, StageSeconds(seconds, 0.0, 0.0, 0.0, prefill=99.0))


def test_ratios_are_those_of_all_steps_and_their_errors_those_of_pairs() -> None:
    pairs = [(usage(PLANNED, 10, 30, 6.0), usage(DYNAMIC, 8, 30, 6.6)), (usage(PLANNED, 30, 50, 10.0),) * 2]
    found = DuelFigures(Duel(GREEDY, DYNAMIC, PLANNED), tuple(pairs), 0)
    assert found.num_steps == (40, 38)
    assert found.tokens_per_step == (2.0, 80 / 38)
    assert found.tokens_ratio.value == pytest.approx(40 / 38)
    assert found.seconds_ratio.value == pytest.approx(16.6 / 16.0)
    # Resampled: twice the first pair, both, or twice the second, with chances of 1, 2 and 1 in 4.
    mean = (1.25 + 2 * 40 / 38 + 1.0) / 4
    spread = (((1.25 - mean) ** 2 + 2 * (40 / 38 - mean) ** 2 + (1.0 - mean) ** 2) / 4) ** 0.5
    assert found.tokens_ratio.error == pytest.approx(spread, rel=0.05)


def test_pairs_that_are_all_alike_leave_no_doubt() -> None:
    pairs = ((usage(PLANNED, 10, 30, 6.0), usage(DYNAMIC, 10, 33, 6.6)),) * 4
    ratio = DuelFigures(Duel(GREEDY, DYNAMIC, PLANNED), pairs, 0).tokens_ratio
    assert (ratio.value, ratio.error) == (pytest.approx(1.1), pytest.approx(0.0, abs=1e-12))


class RecordingClient:
    """Answers at once, with so many steps of the tree that was asked for."""

    def __init__(self, num_steps: int) -> None:
        self.asked: list[tuple[str, int | None, TreeShape]] = []
        self._num_steps = num_steps

    def generate(self, prompt: str, *, seed: int | None, speculation: Any, **_: Any) -> SimpleNamespace:
        self.asked.append((prompt, seed, speculation))
        trees = (usage(speculation, self._num_steps, 2 * self._num_steps, 1.0),)
        return SimpleNamespace(speculation=SimpleNamespace(trees=trees))


def measured(client: RecordingClient, mode: Mode, least_steps: int) -> DuelFigures:
    asking = Asking(tuple(BenchPrompt("code", name, name) for name in "ab"), True, 1, 32)
    return measure(client, Duel(mode, DYNAMIC, PLANNED), asking, least_steps, lambda done, total: None)  # type: ignore[arg-type]


def test_both_trees_answer_each_prompt_in_turns_until_there_are_steps_enough() -> None:
    client = RecordingClient(10)
    assert measured(client, COUPLED, 45).num_steps == (50, 50)
    warm_up, asked = client.asked[:2], client.asked[2:]
    assert {shape for *_, shape in warm_up} == {PLANNED, DYNAMIC}
    assert [(prompt, seed) for prompt, seed, _ in asked[::2]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert [(prompt, seed) for prompt, seed, _ in asked[1::2]] == [(prompt, seed) for prompt, seed, _ in asked[::2]]
    first, second = [shape for *_, shape in asked[::2]], [shape for *_, shape in asked[1::2]]
    assert first == [PLANNED, DYNAMIC, PLANNED, DYNAMIC, PLANNED]
    assert second == [DYNAMIC, PLANNED, DYNAMIC, PLANNED, DYNAMIC]


def test_greedy_answers_are_asked_for_once() -> None:
    assert measured(RecordingClient(10), GREEDY, 1000).num_steps == (20, 20)


def test_answers_without_steps_end_the_benchmark() -> None:
    with pytest.raises(FailedPrecondition, match="is there a draft worker"):
        measured(RecordingClient(1), COUPLED, 10)


def bench_dynamic(system: System, *arguments: str) -> int:
    flags = ["--prompts", "1", "--max-tokens", "32", "--steps", "12", *arguments]
    return main(["bench", "dynamic", "--address", system.deployment.address, *flags])


def test_dynamic_trees_on_a_running_system(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_dynamic(tiny_system, "--json", "--shape", "6x3d2", "--shape", "8x4d3") == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [(each["rule"], each["dynamic"]["size"]) for each in found] == [
        *(("greedy", 6), ("greedy", 8), ("coupled", 6), ("coupled", 8))
    ]
    for each in found:
        assert min(each["num_steps"]) >= 12
        assert len(each["planned"]["parents"]) == each["dynamic"]["size"]
        assert 0.5 < each["tokens_ratio"]["value"] < 2.0
        assert each["seconds_per_token_ratio"]["value"] > 0.0
    assert bench_dynamic(tiny_system, "--rule", "greedy") == 0
    assert "16x5d4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shape", "16x5"], "shape: 16x5: give NODESxLEVELSdWIDTH"),
        (["--shape", "4x5d1"], "shape: 4x5d1: levels is 5"),
        (["--rule", "sequoia"], "rule: sequoia is not exact with dynamic trees"),
        (["--steps", "0"], "steps: is 0"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "dynamic", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
