"""`sequoia bench shapes`: replay by hand, against the running system, and predictions for texts of a known kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import System
from tiny_models import write_tiny_pair

from sequoia.acceptance import AcceptanceCounts
from sequoia.cli import main
from sequoia.cli.benchmarks.candidates import MAX_LEVELS, full_tree, parallel_chains
from sequoia.cli.benchmarks.evaluation import CHOICE, Curves, ShapeResult, evaluate
from sequoia.cli.benchmarks.recorder import record_text
from sequoia.cli.benchmarks.replay import Ranks, count, replay, whole_steps
from sequoia.cli.benchmarks.traces import Recording, Text, Trace
from sequoia.cli.robustness import Pair, load_pair
from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import expected_tokens
from sequoia.sampling import Sampling
from sequoia.topology import Topology

PROMPT = list(range(40, 70))
# Two children, the first of which has a child of its own.
SMALL = Topology((-1, 0, 0, 1))


def test_a_step_ends_at_a_leaf_at_a_rank_without_a_child_and_beyond_all_ranks() -> None:
    steps = replay(SMALL, (0, 0, 9, 1, 9, 2, None, 0, 1, 9, 9))
    assert [(step.start, step.accepted_nodes) for step in steps] == [
        (0, (1, 3)),  # to the leaf at depth 2, and a bonus token
        (3, (2,)),  # to the leaf of rank 1
        (5, ()),  # there is no third child
        (6, ()),  # beyond
        (7, (1,)),  # its child has rank 0, not 1
        (9, ()),
        (10, ()),
    ]
    assert sum(step.num_tokens for step in steps) == 11


def test_near_the_end_trees_have_as_many_levels_as_there_are_tokens_left() -> None:
    assert [(step.topology.levels, step.accepted_nodes) for step in replay(SMALL, (0, 0))] == [(2, (1,))]
    assert [(step.topology.levels, step.accepted_nodes) for step in replay(SMALL, (0,))] == [(1, ())]
    assert replay(SMALL, ()) == []


def test_steps_are_counted_by_depth_and_rank() -> None:
    # Accepted: nodes 1 and 3; node 2; nothing in the plain step at the end.
    assert count(replay(SMALL, (0, 0, 9, 1, 9, 0))) == AcceptanceCounts(((2, 2), (1,)), ((1, 1), (1,)))
    assert count(()) == AcceptanceCounts()


def test_steps_are_whole_while_the_deepest_tree_fits() -> None:
    ranks = (0,) * 10
    assert [step.start for step in replay(Topology.chain(2), ranks)] == [0, 2, 4, 6, 8]
    assert [step.start for step in whole_steps(Topology.chain(2), ranks, 4)] == [0, 2, 4, 6]
    assert [step.start for step in whole_steps(Topology.chain(2), ranks, 10)] == [0]


def test_shapes_are_what_they_are_called() -> None:
    assert full_tree(2, 3).parents == (-1, 0, 0, 1, 1, 2, 2)
    assert parallel_chains(2, 4).parents == (-1, 0, 0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def system_pair(tiny_system: System) -> Pair:
    """The running system's models, loaded here."""
    folder = tiny_system.target.parent
    return load_pair(str(folder / "target"), str(folder / "draft"), draft_quantization="none", dtype="float32")


@pytest.mark.parametrize("tree", [Topology.chain(4), SMALL, Topology((-1, 0, 0, 0, 1, 1, 2, 4, 5, 7)), full_tree(3, 4)])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.9, seed=5)])
def test_a_replayed_trace_is_what_the_running_system_does(
    tiny_system: System, system_pair: Pair, tree: Topology, sampling: Sampling
) -> None:
    text = record_text(system_pair, PROMPT, sampling, 60)
    live = tiny_system.client.generate(
        PROMPT, max_tokens=60, temperature=sampling.temperature, seed=sampling.seed, speculation=tree
    )
    speculation = live.speculation
    # Until the draft has read the prompt, steps are plain; each commits one token.
    num_plain = speculation.num_steps - sum(usage.num_steps for usage in speculation.trees)
    steps = replay(tree, text.ranks[num_plain:])
    assert text.token_ids == live.token_ids
    assert len(steps) == speculation.num_steps - num_plain
    assert count(steps) == AcceptanceCounts(speculation.offered, speculation.accepted)
    assert 5 < len(steps) < 50, "some are accepted, and some are not"


def by_name(texts: list[Ranks], curves: Curves | None = None) -> dict[str, ShapeResult]:
    found = evaluate(Trace(0.0, tuple(Text(None, 5, (0, *[1] * len(each)), each) for each in texts)), curves)
    return {each.name: each for each in found.shapes}


def independent_texts(acceptance: tuple[float, ...]) -> list[Ranks]:
    generator = np.random.default_rng(0)
    known = len(acceptance)
    drawn = generator.choice(known + 1, (6, 1500), p=[*acceptance, 1.0 - sum(acceptance)]).tolist()
    return [tuple(None if rank == known else rank for rank in text) for text in drawn]


def test_of_independent_ranks_every_shape_brings_its_expected_tokens() -> None:
    acceptance = (0.6, 0.15, 0.1)
    for shape in by_name(independent_texts(acceptance)).values():
        low, high = shape.interval
        exact = np.mean([expected_tokens(fold.topology, acceptance) for fold in shape.folds])
        assert shape.realised == pytest.approx(exact, rel=0.04)
        assert low <= shape.realised <= high
        assert shape.errors == pytest.approx(dict.fromkeys(shape.errors, 0.0), abs=0.05)


def test_where_the_draft_is_right_three_times_in_four_only_depth_foretells_a_chain() -> None:
    chain = by_name([(0, 0, 0, None) * 60] * 4)["chain of 6"]
    assert (chain.realised, chain.interval) == (4.0, (4.0, 4.0))
    assert chain.predicted["pooled"] == pytest.approx(sum(0.75**depth for depth in range(6)), rel=0.05)
    assert chain.predicted["by depth"] == pytest.approx(4.0, rel=0.05)


def test_time_is_priced_and_the_planners_choice_is_among_the_shapes() -> None:
    """A forward takes 1 s to 8 nodes and 100 s at 64, drafting is free: the best tree has about 8 nodes."""
    curves = Curves(LatencyCurve((1, 8, 64), (1.0, 1.0, 100.0)), LatencyCurve((1, 4), (1e-6, 1e-6)))
    found = by_name(independent_texts((0.6, 0.15, 0.1)), curves)
    assert found["off"].replayed_seconds == 1.0
    assert found["chain of 4"].replayed_seconds == pytest.approx(1.0 / found["chain of 4"].realised, rel=1e-4)
    assert found["full 2 x 3"].replayed_seconds is not None
    assert found["full 4 x 2"].replayed_seconds is not None
    assert found["full 4 x 2"].predicted_seconds != found["full 4 x 2"].replayed_seconds
    assert all(fold.topology.size == 8 for fold in found[CHOICE].folds)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded by the command, from tiny models, with all that it can be asked to write."""
    folder = tmp_path_factory.mktemp("traces")
    write_tiny_pair(folder)
    models = ["--target", f"{folder}/target", "--draft", f"{folder}/draft", "--draft-quantization", "int8"]
    files = ["--save", f"{folder}/traces.json", "--plot", f"{folder}/plot.svg"]
    sizes = ["--temperature", "0", "--temperature", "0.8", "--tokens", "96"]
    assert main(["bench", "shapes", *models, *files, *sizes]) == 0
    return folder / "traces.json"


def test_traces_hold_every_text_and_the_pair(traces: Path) -> None:
    recording = Recording.read(traces)
    assert (recording.target["quantization"], recording.draft["quantization"]) == ("none", "int8")
    assert [trace.temperature for trace in recording.traces] == [0.0, 0.8]
    assert [[text.seed for text in trace.texts] for trace in recording.traces] == [[None] * 6, list(range(6))]
    assert all(len(text.ranks) == text.num_tokens - 1 for trace in recording.traces for text in trace.texts)
    assert all(80 <= trace.num_tokens <= 96 for trace in recording.traces)
    assert "</svg>" in (traces.parent / "plot.svg").read_text()


def test_traces_are_replayed_without_models_to_the_same_figures(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sequoia.cli.robustness", None)
    (tmp_path / "curve.json").write_text('{"1": 0.01, "64": 0.02}')
    curves = ["--verify-curve", f"{tmp_path}/curve.json", "--draft-curve", f"{tmp_path}/curve.json"]
    printed: list[dict[str, Any]] = []
    for extra in ([], curves):
        assert main(["bench", "shapes", "--traces", str(traces), "--temperature", "0.8", "--json", *extra]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    plain, timed = (each["results"][0]["shapes"] for each in printed)
    assert [(each["shape"], each["tokens_per_step"]) for each in plain] == [
        (each["shape"], each["tokens_per_step"]) for each in timed[:-1]
    ]
    assert timed[0]["replayed_seconds_per_token"] == 0.01
    assert (printed[0]["results"][0]["place_of_planners_choice"], timed[-1]["shape"]) == (None, CHOICE)
    assert 1 <= printed[1]["results"][0]["place_of_planners_choice"] <= len(plain)


def test_shapes_prints_a_row_a_shape(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "shapes", "--traces", str(traces)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("optimal 64") == 2
    assert printed.count("temperature 0") == 2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "target"),
        (["--target", "a"], "draft"),
        (["--tokens", "0"], "tokens"),
        (["--save", "/nowhere/traces.json"], "save"),
        (["--traces", "/nowhere"], "traces"),
        (["--traces", __file__], "traces"),
        (["--verify-curve", "a"], "draft-curve"),
        (["--verify-curve", __file__, "--draft-curve", "a"], "verify-curve"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "shapes", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field}: ")


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="end too early"):
        by_name([(0,) * MAX_LEVELS, *[(0,) * (MAX_LEVELS - 1)] * 5])
