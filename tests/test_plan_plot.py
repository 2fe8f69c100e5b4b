"""The picture of a plan: valid files, and what is drawn where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sequoia.cli.plan_plot import plot_plan, speedups
from sequoia.cli.tree_plot import places
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import expected_tokens, reached_by_node
from sequoia.planner import PlanInputs, TreePlan, choose
from sequoia.pricing import MeasuredTree
from sequoia.topology import DynamicShape, Topology

INPUTS = PlanInputs(
    acceptance=((0.7, 0.12, 0.05, 0.02),),
    verify_curve=LatencyCurve((1, 8, 64, 128), (0.03, 0.032, 0.07, 0.14)),
    draft_curve=LatencyCurve((1, 16, 64), (0.002, 0.003, 0.006)),
)
PLAN = choose(INPUTS)
# Draft forwards that take as long as the target's: nothing pays.
OFF = choose(replace(INPUTS, draft_curve=INPUTS.verify_curve))


DYNAMIC = choose(replace(INPUTS, dynamic=(MeasuredTree(DynamicShape(32, 12, 2), 6.0, 0.2, 20.0, 8.5),)))


def test_the_dynamic_plan_below_is_one() -> None:
    assert DYNAMIC.chosen.kind == "dynamic"


@pytest.mark.parametrize("plan", [PLAN, OFF, DYNAMIC], ids=["speculating", "off", "dynamic"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_a_valid_file(tmp_path: Path, plan: TreePlan, suffix: str) -> None:
    file = tmp_path / f"plan.{suffix}"
    plot_plan(plan, file)
    if suffix == "png":
        with Image.open(file) as image:
            image.verify()
            assert image.size > (1000, 500)
    else:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_the_surface_is_highest_at_the_plan() -> None:
    found = speedups(INPUTS, 128, 16)
    chosen = PLAN.chosen
    assert found[chosen.shape.levels - 2, chosen.shape.size - 2] == pytest.approx(chosen.speedup)
    assert np.nanmax(found) == pytest.approx(chosen.speedup)
    # No tree of 2 nodes has 3 levels.
    assert np.isnan(found[1, 0])


def test_a_pair_measured_for_one_token_only_is_drawn_too(tmp_path: Path) -> None:
    single = LatencyCurve((1,), (0.03,))
    plot_plan(choose(replace(INPUTS, verify_curve=single, draft_curve=single)), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").exists()


def test_nodes_of_a_level_never_touch_and_parents_stand_amid_their_children() -> None:
    topology = Topology((-1, 0, 0, 0, 1, 1, 3, 3, 3, 4, 8, 8))
    across = places(topology)
    for depth in range(topology.levels):
        level = [across[node] for node in range(topology.size) if topology.depths[node] == depth]
        assert min(np.diff(level), default=1.0) >= 1.0
    assert across[0] == (across[1] + across[3]) / 2.0


def test_nodes_are_as_large_as_they_are_likely() -> None:
    rows = ((0.5, 0.25), (0.4, 0.1))
    topology = Topology((-1, 0, 0, 1, 1, 3))
    assert reached_by_node(topology, rows) == pytest.approx([1.0, 0.5, 0.25, 0.2, 0.05, 0.08])
    assert sum(reached_by_node(topology, rows)) == pytest.approx(expected_tokens(topology, rows))
