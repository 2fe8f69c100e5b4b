"""A plan in one picture: what forwards cost, what every size and depth would bring, and the tree that follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequoia.cli.shape_names import in_short
from sequoia.cli.tree_plot import draw_tree
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import expected_tokens, frontiers
from sequoia.planner import MAX_LEVELS, TreePlan, width_limits
from sequoia.pricing import PlanInputs, PricedTree, planned_like
from sequoia.topology import DynamicShape, TreeShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Float = NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind readers tell apart.
_BLUE, _ORANGE, _YELLOW, _INK = "#0072B2", "#D55E00", "#F0E442", "#222222"
_MAX_SIZE = 1024
_STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 17,
    "color": _YELLOW,
    "markeredgecolor": _INK,
    "linestyle": "none",
    "zorder": 5,
}


def plot_plan(plan: TreePlan, file: Path) -> None:
    """Into an SVG or PNG file: latency curves, speedup by size and levels, the tree."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"font.size": 11, "axes.edgecolor": "#8A8A8A", "text.color": _INK}):
        figure = plt.figure(figsize=(15, 8), layout="constrained")
        [[left, right]] = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.4), wspace=0.03)
        above, below = left.subplots(2, 1, height_ratios=(1, 1.15))
        _draw_curves(above, plan)
        _draw_surface(below, left, plan)
        tree = _drawn(plan)
        axes = right.subplots()
        axes.set_title(_tree_title(plan, tree), loc="left", fontweight="bold")
        draw_tree(axes, planned_like(tree.shape, plan.inputs), plan.inputs.acceptance, _total(plan.inputs, tree))
        figure.suptitle(_title(plan.chosen), fontsize="xx-large", fontweight="bold")
        figure.savefig(file, dpi=150, facecolor="white")
        plt.close(figure)


def speedups(inputs: PlanInputs, max_size: int, max_levels: int) -> Float:
    """(max_levels - 1, max_size - 1) of the best tree of so many nodes within so many levels, both from 2 up.

    NaN where there is no tree, or where a forward would be wider than was measured.
    """
    widths = width_limits(inputs.draft_curve, max_size)
    return np.fmax.reduce([_speedups(inputs, max_size, max_levels, each) for each in widths])


def _speedups(inputs: PlanInputs, max_size: int, max_levels: int, max_width: int | None) -> Float:
    """As `speedups`, of trees with at most so many nodes with children in a level."""
    _, *found = frontiers(inputs.acceptance, max_size, max_levels, max_width=max_width)
    tokens = np.stack([each.tokens[2:] for each in found])
    draft_seconds = inputs.draft_curve.table(max_size)
    drafting = np.stack([draft_seconds[each.internal[2:]].sum(axis=1) for each in found])
    seconds = inputs.step_seconds(inputs.verify_curve.table(max_size)[2:], drafting)
    levels, sizes = np.mgrid[2 : max_levels + 1, 2 : max_size + 1]
    exists = np.isfinite(tokens) & np.isfinite(seconds) & (levels <= sizes)
    per_step = inputs.tokens_per_step(np.where(exists, tokens, np.nan))
    return np.asarray(inputs.verify_curve.at(1) * per_step / seconds)


def _title(chosen: PricedTree) -> str:
    if chosen.kind == "off":
        return "Do not speculate: no tree is predicted to be faster than plain decoding"
    promise = f"predicted {chosen.tokens_per_step:.2f} tokens per step, {chosen.speedup:.2f} times plain decoding"
    return f"A {_named(chosen.shape)}: {promise}"


def _tree_title(plan: TreePlan, tree: PricedTree) -> str:
    if tree.kind == "dynamic":
        return "Dynamic: drawn is the best planned tree of its mean size"
    if plan.chosen.kind != "off":
        return f"The {_named(tree.shape)}"
    if tree.kind == "off":
        return "Plain decoding"
    return f"The best that speculates, a {_named(tree.shape)}: {tree.speedup:.2f} times plain decoding"


def _named(shape: TreeShape) -> str:
    if isinstance(shape, DynamicShape):
        return f"dynamic tree, {in_short(shape)}"
    if shape.levels == shape.size:
        return f"chain of {shape.size} nodes"
    return f"tree of {shape.size} nodes and {shape.levels} levels"


def _total(inputs: PlanInputs, tree: PricedTree) -> str:
    expected = expected_tokens(planned_like(tree.shape, inputs), inputs.acceptance)
    factor = "" if inputs.tokens_factor == 1.0 and tree.kind != "dynamic" else f"; measured, {tree.tokens_per_step:.2f}"
    return f"= {expected:.2f} tokens per step{factor}"


def _drawn(plan: TreePlan) -> PricedTree:
    """The chosen tree, or the best that speculates when the plan is not to."""
    return plan.best_tree if plan.chosen.kind == "off" and plan.best_tree else plan.chosen


def _draw_curves(axes: Axes, plan: TreePlan) -> None:
    from matplotlib.ticker import LogLocator

    tree = _drawn(plan).shape
    verify, draft = plan.inputs.verify_curve, plan.inputs.draft_curve
    _draw_curve(axes, verify, _BLUE, "o", "target, by tokens of the tree")
    _draw_curve(axes, draft, _ORANGE, "s", "draft, by nodes of a level")
    if tree.size > 1:
        widths = _widths(tree)
        axes.plot([tree.size], [verify.at(tree.size) * 1e3], label="this tree's forwards", **_STAR)
        axes.plot(widths, [draft.at(width) * 1e3 for width in widths], **_STAR | {"markersize": 10})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter("")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set(ylabel="ms per forward", xlabel="rows in the forward")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("What a forward takes", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize="small")


def _widths(shape: TreeShape) -> list[int]:
    """Of its draft forwards, each once."""
    if isinstance(shape, DynamicShape):
        return [1, shape.width] if shape.levels > 2 else [1]
    return sorted(set(np.bincount([shape.depths[node] for node in shape.internal_nodes]).tolist()))


def _draw_curve(axes: Axes, curve: LatencyCurve, colour: str, marker: str, label: str) -> None:
    """Measured points, and what is taken for right between them: straight lines, which bend on these scales."""
    widths = np.geomspace(1, curve.max_tokens, 200)
    axes.plot(widths, 1e3 * np.interp(widths, curve.num_tokens, curve.seconds), color=colour)
    measured = [1e3 * each for each in curve.seconds]
    axes.plot(curve.num_tokens, measured, color=colour, marker=marker, markersize=5, linestyle="none", label=label)


def _draw_surface(axes: Axes, figure: Figure | SubFigure, plan: TreePlan) -> None:
    from matplotlib.ticker import MaxNLocator

    tree = _drawn(plan).shape
    axes.set_title("Speedup of the best planned tree", loc="left", fontweight="bold")
    max_size = min(plan.inputs.verify_curve.max_tokens, max(_MAX_SIZE, tree.size))
    if max_size < 2:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "the target was measured for 1 token only:\nthere is no tree to verify", ha="center")
        return
    max_levels = min(max_size, max(MAX_LEVELS, tree.levels + tree.levels // 4))
    found = speedups(plan.inputs, max_size, max_levels)
    edges = np.arange(1.5, max_size + 1), np.arange(1.5, max_levels + 1)
    mesh = axes.pcolormesh(*edges, found, **_colours(found))
    figure.colorbar(mesh, ax=axes, label="times plain decoding", pad=0.02).ax.set_yscale("linear")
    if np.nanmin(found) < 1.0 < np.nanmax(found):
        middles = np.arange(2, max_size + 1), np.arange(2, max_levels + 1)
        lines = axes.contour(*middles, found, levels=[1.0], colors=[_INK], linewidths=1.4, linestyles="dashed")
        axes.clabel(lines, fmt={1.0: "off: 1.0"}, fontsize="small")
    if tree.size > 1:
        axes.plot([tree.size], [tree.levels], **_STAR)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="nodes (grey: no such tree, or beyond the curves)", ylabel="levels, at most", facecolor="#EEEEEE")


def _colours(found: Float) -> dict[str, Any]:
    """Orange where plain decoding is faster, blue where the tree is, white where they are equal."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    known = found[np.isfinite(found)]
    least, most = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    norm = TwoSlopeNorm(1.0, min(least, 0.8), max(most, 1.2))
    return {"norm": norm, "cmap": LinearSegmentedColormap.from_list("speedup", [_ORANGE, "white", _BLUE])}
