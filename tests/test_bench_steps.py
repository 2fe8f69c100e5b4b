"""`sequoia bench steps`: hand-made steps whose parts are known, the order of the answers, a running system."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import System

from sequoia.cli import main
from sequoia.cli.benchmarks.arm_figures import Spread
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.modes import Mode, TreeWorkload
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.benchmarks.step_figures import PARTS, StepFigures, measure
from sequoia.client import StageSeconds
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import Topology

CHAIN = Topology.chain(4)
GREEDY = Mode("greedy", 0.0)


def usage(num_steps: int, scale: float) -> TreeUsage:
    """Of every step 1.5 s drafting and 4 verifying, 0.25 in messages and 0.25 in the loop, times `scale`."""
    seconds = scale * num_steps
    stages = StageSeconds(
        draft=1.5 * seconds,
        verify=4.0 * seconds,
        network=0.25 * seconds,
        host=0.25 * seconds,
        prefill=99.0,
        forwards=4.5 * seconds,
        work=0.5 * seconds,
        draft_forwards=1.25 * seconds,
        draft_work=0.125 * seconds,
    )
    return TreeUsage(CHAIN, num_steps, 2 * num_steps, stages)


def test_the_parts_of_a_step_are_told_apart_and_are_all_of_it() -> None:
    found = StepFigures(GREEDY, "chain of 4", CHAIN, (usage(8, 1.0),))
    assert {name: each.median for name, each in found.parts.items() if each} == {
        "draft_forwards": 1.25,
        "verify_forwards": 3.25,
        "draft_work": 0.125,
        "verify_work": 0.375,
        "overhead": 1.0,
    }
    assert found.total == Spread(6.0, 6.0, 6.0)
    assert sum(each.median for each in found.parts.values() if each) == 6.0
    assert found.work_share == Spread(*[0.5 / 3.25] * 3)


def test_an_answer_counts_once_however_many_steps_it_has() -> None:
    found = StepFigures(GREEDY, "chain of 4", CHAIN, (usage(100, 1.0), usage(4, 2.0), usage(4, 4.0)))
    assert found.total == Spread(9.0, 12.0, 18.0)
    assert found.num_steps == 108


def test_without_steps_nothing_is_said() -> None:
    found = StepFigures(GREEDY, "chain of 4", CHAIN, ()).to_dict()
    assert found["seconds"] == dict.fromkeys([*PARTS, "total"])
    assert found["work_by_verify_forward"] is None


class RecordingClient:
    """Answers at once, with two steps of each tree that was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def generate(self, prompt: str, *, max_tokens: int, rule: str, speculation: Any, **_: Any) -> SimpleNamespace:
        self.asked.append((max_tokens, f"{rule} {speculation if speculation == 'off' else 'tree'}"))
        return SimpleNamespace(speculation=SimpleNamespace(trees=(usage(2, 1.0),)))


def asked_by(client: RecordingClient, modes: Sequence[Mode], num_rounds: int) -> list[StepFigures]:
    prompts = tuple(BenchPrompt("code", name, name) for name in "ab")
    trees = {"off": Topology.root_only(), "chain of 4": CHAIN}
    workload = TreeWorkload(tuple(modes), trees, Asking(prompts, True, num_rounds, 32))
    return measure(client, workload, lambda done, total: None)


def test_every_mode_and_tree_takes_every_place_after_a_short_answer() -> None:
    client = RecordingClient()
    asked_by(client, (GREEDY, Mode("coupled", 0.6)), num_rounds=2)
    assert [num_tokens for num_tokens, _ in client.asked] == [8] * 4 + [32] * 16
    turns = np.array([name for _, name in client.asked[4:]]).reshape(4, 4)
    cells = ["coupled off", "coupled tree", "greedy off", "greedy tree"]
    assert [sorted(turn) for turn in turns] == [cells] * 4
    assert [sorted(place) for place in turns.T] == [cells] * 4


def test_an_answer_with_hardly_a_step_of_the_tree_is_left_out() -> None:
    found = asked_by(RecordingClient(), (GREEDY,), num_rounds=1)
    assert [each.usages for each in found] == [(), ()]


def bench_steps(system: System, *arguments: str) -> int:
    return main(["bench", "steps", "--address", system.deployment.address, "--prompts", "1", *arguments])


def test_steps_on_a_running_system(tiny_system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_steps(tiny_system, "--max-tokens", "32", "--json", "--plot", f"{tmp_path}/a.svg") == 0
    printed = json.loads(capsys.readouterr().out)
    cells = {(each["rule"], each["temperature"], each["shape"]): each for each in printed["results"]}
    rules = (("greedy", 0.0), ("sequoia", 0.6), ("coupled", 0.6))
    assert set(cells) == {(*rule, shape) for rule in rules for shape in ("off", "chain of 4", "16x6")}
    for (*_, shape), each in cells.items():
        medians = {name: spread["median"] for name, spread in each["seconds"].items()}
        assert (each["num_answers"], len(medians)) == (5, 6)
        assert (medians["draft_forwards"] > 0.0, medians["draft_work"] > 0.0) == (shape != "off",) * 2
        assert medians["total"] > medians["verify_forwards"] > 0.0 < medians["verify_work"]
        assert each["work_by_verify_forward"]["low"] > 0.0
    assert printed["draft"]["dtype"] == "float32"
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_a_table_a_mode_has_a_row_a_part(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rule", "coupled", "--temperature", "1", "--shape", "off", "--shape", "4x3", "--raw"]
    assert bench_steps(tiny_system, "--max-tokens", "16", *arguments) == 0
    out = capsys.readouterr().out
    rows = [line.strip() for line in out.splitlines() if " to " in line or "coupled" in line]
    assert rows[0] == "coupled, T = 1"
    titles = [*PARTS.values(), "total", "work by verify forward"]
    assert [title for title, row in zip(titles, rows[1:], strict=True) if not row.startswith(title)] == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--temperature", "0"], "temperature: must be above 0"),
        (["--shape", "bush"], "shape: 'bush' is neither"),
        (["--rounds", "0"], "rounds: is 0"),
        (["--plot", "a.pdf"], "--plot: a.pdf ends neither"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "steps", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
