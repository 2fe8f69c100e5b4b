"""`sequoia bench` without a name: the way to it, its arms, and a whole run on a system of tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import System
from tiny_models import write_tiny_pair

from sequoia.acceptance import PRIOR
from sequoia.cli import bench, main
from sequoia.cli.benchmarks.own_arms import named_shape, ways
from sequoia.cli.benchmarks.peer_catalog import PEERS, PeerKind
from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose
from sequoia.topology import Topology


@pytest.mark.parametrize(
    ("arguments", "routed"),
    [
        ([], ["arms"]),
        (["--quick", "--json"], ["arms", "--quick", "--json"]),
        (["--roofline", "--json"], ["roofline", "--json"]),
        (["--json", "--roofline"], ["roofline", "--json"]),
        (["plans", "--json"], ["plans", "--json"]),
        (["arms", "--quick"], ["arms", "--quick"]),
        (["--help"], ["--help"]),
        (["-h"], ["-h"]),
    ],
)
def test_a_benchmark_without_a_name_is_that_of_arms(arguments: list[str], routed: list[str]) -> None:
    assert bench.with_name(arguments) == routed


def test_the_roofline_flag_runs_the_benchmark_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("roofline")
    module.add_arguments = lambda parser: parser.add_argument("--size", type=int)
    module.run = lambda arguments: arguments.size
    monkeypatch.setitem(sys.modules, bench.BENCHMARKS["roofline"].module, module)
    assert main(["bench", "--roofline", "--size", "7"]) == 7


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--rounds", "0"], "rounds: is 0"),
        (["--max-tokens", "1"], "max-tokens: is 1"),
        (["--prompts", "0"], "prompts: is 0"),
        (["--shape", "3x9"], "shape: 3x9 is no tree"),
        (["--shape", "999x2"], "shape: no tree of 999 nodes"),
        (["--shape", "bush"], "shape: 'bush' is neither"),
        (["--plot", "a.pdf"], "--plot: a.pdf ends neither"),
        (["--temperature", "-0.5"], "temperature: is -0.5"),
        (["--temperature", "nan"], "temperature: is nan"),
        (["--temperature", "0.6", "--peers", "transformers"], "temperature: above 0 leaves nothing"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")


@pytest.mark.parametrize(("flag", "name"), [("--peers", "ollama"), ("--arms", "off")])
def test_an_unknown_arm_is_refused(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", flag, name])
    assert f"'{name}' is none of" in capsys.readouterr().err


def test_shapes_are_sizes_or_names() -> None:
    assert (named_shape("6x3").size, named_shape("6x3").levels) == (6, 3)
    assert named_shape("chain of 4") == Topology.chain(4)
    with pytest.raises(InvalidArgument, match="NODESxLEVELS"):
        named_shape("off")


def test_without_a_plan_the_best_chain_is_not_known() -> None:
    assert ways(None, ("plan", "chain"), ("chain of 2",)) == {
        "off": "off",
        "plan": "auto",
        "chain": None,
        "chain of 2": Topology.chain(2),
    }


def test_with_a_plan_the_chain_is_the_cheapest() -> None:
    verify = LatencyCurve((1, 2, 4, 8), (1.0, 1.0, 1.0, 4.0))
    plan = choose(PlanInputs((PRIOR,), verify, LatencyCurve((1, 8), (0.01, 0.01))))
    assert ways(plan, ("chain",), ())["chain"] == Topology.chain(4)


def test_arms_and_peers_on_a_running_system(
    tiny_system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('libengine.so is missing')")
    monkeypatch.setitem(PEERS, "broken", PeerKind(broken, "plain"))
    deployment = tiny_system.deployment
    assert main(["plan", "--address", deployment.address, "--redis", deployment.redis_url]) == 0
    capsys.readouterr()
    arguments = ["--prompts", "1", "--max-tokens", "12", "--shape", "6x3", "--peers", "broken,transformers,assisted"]
    assert main(["bench", "--address", deployment.address, *arguments, "--num-threads", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    arms = {each["name"]: each for each in printed["arms"]}
    assert list(arms) == ["off", "plan", "chain", "6x3", "transformers", "assisted"]
    assert "libengine.so is missing" in printed["unavailable"]["broken"]
    assert [each["differences"] for each in arms.values()] == [[]] * len(arms), "float32: everybody writes one text"
    assert arms["off"]["overall"]["ratio_to_off"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert arms["off"]["overall"]["tokens_per_step"] == 1.0
    assert arms["6x3"]["overall"]["tokens_per_step"] > 1.0
    assert arms["transformers"]["precision"] == printed["target"]["dtype"] == "float32"
    assert arms["transformers"]["peak_memory_bytes"] > 2**20
    assert len(printed["answers"]) == len(arms) * 5
    assert all(len(each["by_category"]) == 5 for each in arms.values())


def test_arms_above_temperature_0_share_a_seed_and_so_a_text(
    tiny_system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = tiny_system.deployment
    where = ["--address", deployment.address]
    assert main(["plan", *where, "--redis", deployment.redis_url, "--temperature", "0.6"]) == 0
    capsys.readouterr()
    arguments = ["--prompts", "1", "--max-tokens", "12", "--shape", "6x3", "--temperature", "0.6", "--json"]
    assert main(["bench", *where, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["differences"] for each in printed["arms"]] == [[]] * 4, "the default rule keeps a seed's text"
    assert printed["workload"]["temperature"] == 0.6
    assert 0.0 < printed["planned_acceptance"][0][0] < 1.0


@pytest.mark.slow
def test_a_system_is_started_planned_for_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write_tiny_pair(tmp_path)
    models = ["--target", f"{tmp_path}/target", "--draft", f"{tmp_path}/draft", "--dtype", "float32"]
    assert main(["bench", "--quick", *models, "--num-threads", "1", "--plot", f"{tmp_path}/a.png"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " (1.00 to 1.00)" in line] == ["off"]
    assert {"worst", "summarisation", "GiB"} <= set(out.split())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
