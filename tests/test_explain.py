"""`sequoia explain`: from files, from a plan, and from a coordinator whose figures are known."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.speculation import BUILT_IN_TREE
from sequoia.alternatives import alternatives, expansion
from sequoia.border import Context
from sequoia.cli import main
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose
from sequoia.pricing import price
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, tree_pb2

INPUTS = PlanInputs(
    acceptance=((0.7, 0.12, 0.05, 0.02),),
    verify_curve=LatencyCurve((1, 8, 64, 128), (0.03, 0.032, 0.07, 0.14)),
    draft_curve=LatencyCurve((1, 16, 64), (0.002, 0.003, 0.006)),
    host_seconds=0.001,
    errors=((0.02, 0.01, 0.005, 0.002),),
)
PLAN = choose(INPUTS)


class KnownCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Explains every request in the same way."""

    def __init__(self) -> None:
        self.requests: list[pb.ExplainRequest] = []
        self.response = pb.ExplainResponse(
            plan_json=PLAN.to_json(),
            situation="coupled, temperature (0.4,0.8], 2 sessions",
            planned_situation="coupled, temperature (0.4,0.8], 1 sessions",
            state=pb.SPECULATION_STATE_ON,
            state_reason="measured, in ms a token: on 16.0, off 32.0",
            num_ahead_hits=30,
            num_ahead_misses=20,
            realised=[
                pace(PLAN.chosen.shape, num_steps=50, num_tokens=150, seconds=2.4),
                pace(Topology.root_only(), num_steps=40, num_tokens=40, seconds=1.28),
                pace(Topology((-1, 0, 0)), num_steps=10, num_tokens=15, seconds=0.6),
            ],
        )

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        self.requests.append(request)
        return self.response


def pace(topology: Topology, *, num_steps: float, num_tokens: float, seconds: float) -> pb.RealisedPace:
    parents = tree_pb2.Topology(parents=topology.parents)
    return pb.RealisedPace(topology=parents, num_steps=num_steps, num_tokens=num_tokens, seconds=seconds)


@pytest.fixture
def coordinator() -> KnownCoordinator:
    return KnownCoordinator()


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    file = tmp_path / "plan.json"
    file.write_text(PLAN.to_json())
    return str(file)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def by_name(document: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(document)["trees"]}


def test_a_plan_stands_beside_its_alternatives(capsys: pytest.CaptureFixture[str], plan_file: str) -> None:
    trees = by_name(explained(capsys, "--plan", plan_file, "--json"))
    assert trees["plan"]["parents"] == list(PLAN.chosen.shape.parents)
    assert (trees["off"]["speedup"], trees["best chain"]["kind"]) == (1.0, "chain")
    assert (trees["SpecInfer 5x8"]["size"], trees["full binary"]["size"]) == (41, 31)
    assert trees["paper 64x9"]["tokens_per_step"] == pytest.approx(price_of("paper 64x9"))
    assert trees["paper 768x18"]["remark"] == "beyond the curve"
    assert trees["built-in"]["parents"] == list(BUILT_IN_TREE.parents)
    assert all(each["realised"] is None for each in trees.values())


def price_of(name: str) -> float:
    topology = alternatives(PLAN)[name]
    assert topology is not None
    return price(topology, INPUTS).tokens_per_step


def test_no_alternative_is_faster_than_the_plan(capsys: pytest.CaptureFixture[str], plan_file: str) -> None:
    trees = by_name(explained(capsys, "--plan", plan_file, "--json"))
    paces = [each["seconds_per_token"] for each in trees.values() if "seconds_per_token" in each]
    assert min(paces) == trees["plan"]["seconds_per_token"]


def test_the_table_shows_promises_with_their_margin_and_the_inputs(
    capsys: pytest.CaptureFixture[str], plan_file: str
) -> None:
    shown = explained(capsys, "--plan", plan_file)
    chosen = PLAN.chosen
    assert f"{chosen.tokens_per_step:.2f} ± {1.96 * chosen.tokens_error:.2f}" in shown
    assert "0.700, 0.120, 0.050, 0.020" in shown
    assert "30 ms for 1 token, 140 for 128" in shown
    assert "draft 0 ms, verify 0 ms, host 1 ms" in shown
    assert "lately" not in shown


def test_files_of_numbers_are_explained_as_the_plan_that_they_give(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    curves = {"verify-curve": INPUTS.verify_curve.to_dict(), "draft-curve": INPUTS.draft_curve.to_dict()}
    arguments = ["--host", "0.001"]
    for name, document in {"acceptance": INPUTS.acceptance[0], **curves}.items():
        (tmp_path / name).write_text(json.dumps(document))
        arguments += [f"--{name}", str(tmp_path / name)]
    trees = by_name(explained(capsys, *arguments, "--json"))
    assert trees["plan"]["parents"] == list(PLAN.chosen.shape.parents)
    assert trees["plan"]["tokens_error"] == 0.0


async def test_what_was_realised_stands_beside_what_was_promised(
    capsys: pytest.CaptureFixture[str], coordinator: KnownCoordinator, address: str
) -> None:
    arguments = ["--address", address, "--temperature", "0.6", "--rule", "coupled"]
    document = await asyncio.to_thread(explained, capsys, *arguments, "--json")
    trees = by_name(document)
    assert trees["plan"]["realised"] == {
        **{"steps": 50.0, "tokens_per_step": 3.0, "seconds_per_token": pytest.approx(0.016)},
        **{"speedup": pytest.approx(2.0)},
    }
    assert trees["off"]["realised"]["speedup"] == 1.0
    assert trees["other, 1"]["parents"] == [-1, 0, 0]
    assert trees["other, 1"]["realised"]["speedup"] == pytest.approx(0.8)
    assert trees["SpecInfer 8x8"]["realised"] is None
    assert json.loads(document)["state"] == "on"
    assert json.loads(document)["draft_ahead"] == {"attempts": 50, "hits": 30}
    [request] = coordinator.requests
    assert request.temperature == 0.6


async def test_the_table_of_a_running_pair_tells_situation_and_state(
    capsys: pytest.CaptureFixture[str], address: str
) -> None:
    shown = await asyncio.to_thread(explained, capsys, "--address", address)
    assert "3.00 (50)" in shown
    assert "coupled, temperature (0.4,0.8], 2 sessions" in shown
    assert "coupled, temperature (0.4,0.8], 1 sessions" in shown
    assert "on: measured, in ms a token: on 16.0, off 32.0" in shown
    assert "30 hits in 50 attempts" in shown


async def test_a_pair_without_a_plan_shows_what_was_realised(
    capsys: pytest.CaptureFixture[str], coordinator: KnownCoordinator, address: str
) -> None:
    coordinator.response.plan_json = ""
    shown = await asyncio.to_thread(explained, capsys, "--address", address)
    assert "none yet; `sequoia plan` makes one" in shown
    assert "3.00 (50)" in shown


async def test_a_pair_without_a_plan_is_not_drawn(
    capsys: pytest.CaptureFixture[str], coordinator: KnownCoordinator, address: str, tmp_path: Path
) -> None:
    coordinator.response.plan_json = ""
    arguments = ["explain", "--address", address, "--plot", str(tmp_path / "plan.png")]
    assert await asyncio.to_thread(main, arguments) == 2
    assert capsys.readouterr().err == "error: --plot: there is no plan to draw yet; `sequoia plan` makes one\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "/nowhere.json"], "--plan: /nowhere.json: No such file"),
        (["--plan", "PLAN", "--temperature", "0"], "--temperature: does not go with --plan"),
        (["--plan", "PLAN", "--host", "1"], "--host: does not go with --plan"),
        (["--host", "1"], "--host: is for a plan from numbers alone"),
        (["--plan", "PLAN", "--plot", "plan.pdf"], "--plot: plan.pdf ends neither in .svg nor in .png"),
        (["--plan", "PLAN", "--plot", "/nowhere/plan.png"], "--plot: there is no folder /nowhere"),
    ],
)
def test_wrong_usage_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], plan_file: str, arguments: list[str], message: str
) -> None:
    given = [plan_file if each == "PLAN" else each for each in arguments]
    assert main(["explain", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_file_that_is_no_plan_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLAN.to_json().replace('"size": ', '"size": 1'))
    assert main(["explain", "--plan", str(tmp_path / "plan.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --plan: ")
    assert "give one object, as `sequoia plan" in error


def test_the_command_draws(capsys: pytest.CaptureFixture[str], plan_file: str, tmp_path: Path) -> None:
    explained(capsys, "--plan", plan_file, "--plot", str(tmp_path / "plan.svg"))
    assert (tmp_path / "plan.svg").stat().st_size > 10_000


def test_an_expansion_multiplies_its_widths() -> None:
    assert expansion((2, 1)).parents == (-1, 0, 0, 1, 2)
    assert expansion((1, 2)).parents == (-1, 0, 1, 1)


def test_a_missing_matplotlib_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["explain", "--plan", "/nowhere.json", "--plot", str(tmp_path / "plan.png")]) == 2
    assert capsys.readouterr().err == "error: --plot: needs matplotlib: pip install sequoia-serving[bench]\n"
