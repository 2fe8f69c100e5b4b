"""The benchmarks of plans on running systems of tiny models: figures that fit together, whatever they are."""

from __future__ import annotations

import json

import pytest
from conftest import System

from sequoia.cli import main
from sequoia.topology import Topology


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def planned(tiny_system: System) -> System:
    deployment = tiny_system.deployment
    assert main(["plan", "--address", deployment.address, "--redis", deployment.redis_url]) == 0
    return tiny_system


def test_plans_are_held_against_what_steps_brought(planned: System, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--temperature", "0", "--rounds", "1", "--max-tokens", "40")
    found = printed(capsys, "plans", "--address", planned.deployment.address, *arguments)
    rows = {each["name"]: each for each in found}
    assert {"off", "auto", "best tree"} <= set(rows)
    assert rows["off"]["realised"]["tokens_per_step"] == [1.0, 1.0, 1.0]
    for row in found:
        value, low, high = row["realised"]["tokens_per_step"]
        assert low <= value <= high
        tree = Topology(tuple(row["predicted"]["parents"]))
        assert row["name"] == "auto" or 1.0 <= value <= tree.levels
        assert all(figure > 0.0 for figure in row["realised"]["seconds_per_token"])


def test_without_a_plan_there_is_nothing_to_hold_it_against(
    own_tiny_system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "plans", "--address", own_tiny_system.deployment.address, "--temperature", "0"]) == 1
    assert "there is no plan for temperature 0; run `sequoia plan` first" in capsys.readouterr().err


def test_workers_that_are_too_far_away_are_left_for_plain_decoding(
    planned: System, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = planned.deployment
    addresses = [f"--{name}={deployment.processes[name].address}" for name in ("verify", "draft")]
    near, far = printed(
        capsys,
        "link",
        *addresses,
        "--redis",
        deployment.redis_url,
        "--delay",
        "0",
        "--delay",
        "60",
        "--max-tokens",
        "8",
    )
    assert near["round_trip_seconds"] < 0.06 < 0.12 <= far["round_trip_seconds"]
    assert far["plan"]["kind"] == "off"
    assert far["plan"]["inputs"]["draft_rtt_seconds"] >= 0.06


def test_the_planner_is_timed_beside_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "planner")
    assert found
