"""`sequoia plan` from numbers alone: against brute force over all trees; what it prints, what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from coordinator.planner_watch import WatchEvent
from sequoia.cli import main
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose

KEYS = {"size", "levels", "parents", "tokens_per_step", "seconds_per_token", "speedup", "kind"}
ACCEPTANCE = [0.7, 0.12, 0.05]
VERIFY = {"1": 0.03, "8": 0.032, "64": 0.07}
DRAFT = {"1": 0.002, "16": 0.003}


def every_tree(size: int, parents: tuple[int, ...] = (-1,)) -> Iterator[tuple[int, ...]]:
    """All ordered trees, in level order: parents never descend."""
    if len(parents) == size:
        yield parents
        return
    for parent in range(max(parents[-1], 0), len(parents)):
        yield from every_tree(size, (*parents, parent))


def interpolated(curve: dict[str, float], width: int) -> float:
    points = sorted((int(key), seconds) for key, seconds in curve.items())
    for (left, low), (right, high) in pairwise(points):
        if left <= width <= right:
            return low + (high - low) * (width - left) / (right - left)
    return points[0][1] if width == points[0][0] else math.inf


def seconds_per_token(
    parents: tuple[int, ...], rows: list[list[float]], verify: dict[str, float], draft: dict[str, float], besides: float
) -> float:
    """By the definition of a step; plain decoding, the tree of one node, takes t(1)."""
    if len(parents) == 1:
        return interpolated(verify, 1)
    depths, reached = [0], [1.0]
    for node, parent in enumerate(parents[1:], start=1):
        row, rank = rows[min(depths[parent], len(rows) - 1)], parents[:node].count(parent)
        depths.append(depths[parent] + 1)
        reached.append(reached[parent] * (row[rank] if rank < len(row) else 0.0))
    levels = [depths[node] for node in set(parents[1:])]
    drafting = sum(interpolated(draft, levels.count(depth)) for depth in set(levels))
    return (interpolated(verify, len(parents)) + drafting + besides) / sum(reached)


def write(folder: Path, **documents: Any) -> list[str]:
    """The files and their flags; bytes are written as they are."""
    arguments = []
    for name, document in documents.items():
        file = folder / f"{name}.json"
        file.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        arguments += [f"--{name.replace('_', '-')}", str(file)]
    return arguments


def files(folder: Path, **changed: Any) -> list[str]:
    return write(folder, **{"acceptance": ACCEPTANCE, "verify_curve": VERIFY, "draft_curve": DRAFT, **changed})


def planned(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    return shown.err


def random_row(random: Random) -> list[float]:
    weights = [random.random() ** 2 for _ in range(random.randint(1, 4))]
    total = random.uniform(0.3, 1.0)
    return [total * each / sum(weights) for each in weights]


@pytest.mark.parametrize("seed", range(24))
def test_the_plan_is_the_best_of_all_trees_when_a_level_costs_the_same_at_any_width(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    rows = [random_row(random) for _ in range(1 + seed % 3)]
    verify = {"1": 0.1, "3": random.uniform(0.1, 0.12), "6": random.uniform(0.12, 0.2)}
    draft = {"1": (level := random.uniform(0.001, 0.06)), "4": level}
    besides = random.uniform(0.0, 0.03)
    best = min(
        seconds_per_token(parents, rows, verify, draft, besides) for size in range(1, 7) for parents in every_tree(size)
    )
    inputs = files(tmp_path, acceptance=rows if len(rows) > 1 else rows[0], verify_curve=verify, draft_curve=draft)
    plan = planned(capsys, [*inputs, "--host", str(besides)])
    assert plan["seconds_per_token"] == pytest.approx(best, rel=1e-12)
    again = seconds_per_token(tuple(plan["parents"]), rows, verify, draft, besides)
    assert again == pytest.approx(best, rel=1e-12)
    assert plan["speedup"] == pytest.approx(0.1 / best)


def test_json_is_one_object_with_the_figures_of_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = planned(capsys, files(tmp_path))
    assert plan.keys() >= KEYS
    assert (plan["kind"], plan["size"]) == ("tree", len(plan["parents"]))
    assert plan["tokens_per_step"] * plan["seconds_per_token"] > VERIFY["1"]


def test_the_table_names_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", *files(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert [key for key in KEYS if f" {key} " not in shown] == []


def test_a_draft_as_slow_as_its_target_means_off(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = planned(capsys, files(tmp_path, draft_curve={"1": 0.03}))
    assert {key: plan[key] for key in KEYS} == {
        **{"kind": "off", "size": 1, "levels": 1, "parents": [-1]},
        **{"tokens_per_step": 1.0, "seconds_per_token": 0.03, "speedup": 1.0},
    }


def test_no_tree_is_larger_than_the_verify_curve_or_than_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flat = files(tmp_path, verify_curve={"1": 0.03, "40": 0.03}, draft_curve={"1": 1e-6, "40": 1e-6})
    assert planned(capsys, flat)["size"] == 40
    assert planned(capsys, [*flat, "--max-size", "9"])["size"] == 9
    assert planned(capsys, [*flat, "--max-size", "1000"])["size"] == 40
    assert planned(capsys, [*flat, "--max-levels", "3"])["levels"] == 3


def test_chains_have_no_hidden_limit_on_levels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flat = files(tmp_path, acceptance=[0.99], verify_curve={"1": 0.03, "40": 0.03}, draft_curve={"1": 1e-6})
    plan = planned(capsys, flat)
    assert (plan["kind"], plan["levels"]) == ("chain", 40)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"acceptance": b"[0.5"}, "is not JSON"),
        ({"acceptance": b"[NaN]"}, "NaN is not a number"),
        ({"acceptance": b"[1e999]"}, "not a number that can be used"),
        ({"acceptance": b"[-0.1]"}, "rank 0 is -0.1; give probabilities"),
        ({"acceptance": b"[0.6, 0.6]"}, "sums to 1.2; siblings exclude each other"),
        ({"acceptance": b"[]"}, "must be a list such as"),
        ({"acceptance": b"[[0.5], []]"}, "a row must be a list of probabilities"),
        ({"acceptance": b'["0.5"]'}, "'0.5' is not a number"),
        ({"acceptance": b"[true]"}, "True is not a number"),
        ({"acceptance": b"[" * 50_000}, "is not JSON"),
        ({"acceptance": b" " * (2**22 + 1)}, "is larger than"),
        ({"acceptance": b"\xff\xfe\xff"}, "is not JSON"),
        ({"verify_curve": b"{}"}, "must be an object such as"),
        ({"verify_curve": b"[0.1]"}, "must be an object such as"),
        ({"verify_curve": {"2": 0.1}}, 'starts at width 2; measure "1" too'),
        ({"verify_curve": {"1": 0.0}}, "takes 0 s; give the seconds of a forward"),
        ({"verify_curve": {"1": -0.1}}, "takes -0.1 s"),
        ({"verify_curve": {"1": 1e9}}, "takes 1e+09 s"),
        ({"verify_curve": b'{"1": 1' + b"0" * 400 + b"}"}, "not a number that can be used"),
        ({"verify_curve": {"1": None}}, "None is not a number"),
        ({"verify_curve": {"one": 0.1}}, "'one' is no width"),
        ({"verify_curve": {"1": 0.1, "1" + "0" * 99: 0.1}}, "is no width"),
        ({"verify_curve": b'{"1": 0.1, "1": 0.2}'}, "'1' is there 2 times"),
        ({"draft_curve": {"1.5": 0.1}}, "'1.5' is no width"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    [name] = changed
    error = refusal(capsys, files(tmp_path, **changed))
    assert error.startswith(f"error: --{name.replace('_', '-')}: {tmp_path}")
    assert message in error


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["--rtt-draft", "nan"], "--rtt-draft: is nan; give seconds"),
        (["--rtt-verify", "-1"], "--rtt-verify: is -1; give seconds"),
        (["--host", "inf"], "--host: is inf; give seconds"),
        (["--max-size", "0"], "--max-size: is 0; give 1 (the root) or more"),
        (["--max-levels", "-3"], "--max-levels: is -3; give 1 (the root) or more"),
        (
            ["--draft-curve", "/nowhere.json"],
            "--draft-curve: /nowhere.json: No such file or directory; give a JSON file",
        ),
        (["--temperature", "0"], "--temperature: is for a running pair, and --acceptance for numbers alone"),
        (["--redis", "redis://localhost"], "--redis: is for a running pair"),
        (["--watch"], "--watch: is for a running pair"),
    ],
)
def test_a_flag_that_is_wrong_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, added: list[str], message: str
) -> None:
    assert refusal(capsys, [*files(tmp_path), *added]).startswith(f"error: {message}")


def test_flags_of_numbers_alone_need_the_acceptance_and_both_curves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = files(tmp_path)
    assert "--verify-curve: is for a plan from numbers alone; give --acceptance" in refusal(capsys, arguments[2:])
    assert "--draft-curve: is missing; --acceptance, --verify-curve, --draft-curve go" in refusal(capsys, arguments[:4])
    assert "--host: is for a plan from numbers alone" in refusal(capsys, ["--host", "0"])


def test_a_running_pair_needs_redis(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQUOIA_REDIS", raising=False)
    assert "--redis: is missing; give the coordinator's Redis" in refusal(capsys, [])
    assert "--interval: goes with --watch" in refusal(capsys, ["--redis", "redis://localhost", "--interval", "5"])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at a pair: one that failed, one that found a plan."""
    plan = choose(PlanInputs((tuple(ACCEPTANCE),), LatencyCurve.from_dict(VERIFY), LatencyCurve.from_dict(DRAFT)))

    async def events(*_: object, **__: object) -> AsyncIterator[WatchEvent]:
        yield WatchEvent("failed", 0.6, None, "Redis is away")
        yield WatchEvent("measured", 0.6, plan, "there was no plan")

    monkeypatch.setattr("coordinator.planner_watch.watch_pair", events)


@pytest.mark.usefixtures("watched")
def test_watching_tells_every_event_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--redis", "redis://localhost", "--temperature", "0.6", "--watch"]) == 0
    failed, measured = capsys.readouterr().out.splitlines()
    assert failed == "temperature 0.6: failed, Redis is away"
    assert measured.startswith("temperature 0.6: measured, there was no plan -> speculate: tree of ")


@pytest.mark.usefixtures("watched")
def test_watching_in_json_is_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--redis", "redis://localhost", "--watch", "--interval", "0.1", "--json"]) == 0
    failed, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed == {"kind": "failed", "temperature": 0.6, "reason": "Redis is away", "plan": None}
    assert measured["plan"].keys() >= KEYS


def test_neither_torch_nor_grpc_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys; from sequoia.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'grpc', 'redis'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "plan", *files(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
