"""A token tree as a drawing: level by level, every node as large and dark as it is likely to be reached."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequoia.optimal_tree import Rows, reached_by_node
from sequoia.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Float = NDArray[np.float64]

_INK, _GREY = "#222222", "#8A8A8A"
# Okabe and Ito's blue, from a tint of it.
_SHADES = ("#D6E9F5", "#56B4E9", "#0072B2")
# Points that the drawing is wide and high, roughly: what the largest node is fitted to.
_WIDTH, _HEIGHT = 500.0, 440.0
_MOST_DIAMETER, _LEAST_OF_ROOT, _LEAST_DIAMETER, _LEAST_WITH_TEXT = 36.0, 16.0, 3.0, 22.0
_NUM_LABELLED_RANKS, _NUM_LABELLED_LEVELS, _LABEL_WIDTH = 4, 20, 26.0
# In nodes across and levels down.
_LEAST_WIDTH, _LEAST_LEVELS = 3.0, 5


def draw_tree(axes: Axes, topology: Topology, acceptance: Rows, total: str) -> None:
    """Nodes, edges, the acceptance of the root's first ranks, what each level adds to a step's tokens, the `total`."""
    reached, across = np.array(reached_by_node(topology, acceptance)), places(topology)
    _set_frame(axes, topology.levels, float(across.max()))
    _draw_edges(axes, topology, reached, across)
    _draw_nodes(axes, topology, reached, across)
    _label_ranks(axes, topology, acceptance, across)
    _label_levels(axes, topology, reached, float(across.max()), total)
    note = "area and colour of a node: how likely it is accepted; at the root's edges: acceptance by rank"
    axes.text(0.0, -0.02, note, transform=axes.transAxes, fontsize=9, color=_GREY, va="top")


def places(topology: Topology) -> Float:
    """(size,) the place of each node across, from 0: nodes of a level 1 apart or more, parents amid their children."""
    across = np.zeros(topology.size)
    subtrees = [[node] for node in range(topology.size)]
    for node in reversed(topology.internal_nodes):
        taken: dict[int, float] = {}
        for child in topology.children[node]:
            starts, ends = _outline(topology, across, subtrees[child])
            shift = max((taken[depth] + 1.0 - starts[depth] for depth in starts.keys() & taken), default=0.0)
            across[subtrees[child]] += shift
            taken |= {depth: end + shift for depth, end in ends.items()}
            subtrees[node] += subtrees[child]
        children = topology.children[node]
        across[node] = (across[children[0]] + across[children[-1]]) / 2.0
    return across - across.min()


def _outline(topology: Topology, across: Float, nodes: list[int]) -> tuple[dict[int, float], dict[int, float]]:
    """The first and the last place that is taken, by depth."""
    by_depth: dict[int, list[float]] = defaultdict(list)
    for node in nodes:
        by_depth[topology.depths[node]].append(float(across[node]))
    starts, ends = ({depth: end(taken) for depth, taken in by_depth.items()} for end in (min, max))
    return starts, ends


def _set_frame(axes: Axes, levels: int, width: float) -> None:
    """A small tree is not blown up to fill the place of a large one."""
    half = max(width, _LEAST_WIDTH) / 2.0 + 0.5
    axes.set(xlim=(width / 2.0 - half, width / 2.0 + half), ylim=(max(levels, _LEAST_LEVELS) - 0.5, -0.5))
    axes.set_axis_off()


def _draw_edges(axes: Axes, topology: Topology, reached: Float, across: Float) -> None:
    from matplotlib.collections import LineCollection

    child, parent = np.arange(1, topology.size), np.array(topology.parents[1:], np.intp)
    depths = np.array(topology.depths)
    ends = [np.stack([across[nodes], depths[nodes]], axis=1) for nodes in (parent, child)]
    lines, widths = list(np.stack(ends, axis=1)), (0.5 + 3.0 * reached[1:]).tolist()
    axes.add_collection(LineCollection(lines, colors=_GREY, linewidths=widths, zorder=1))


def _draw_nodes(axes: Axes, topology: Topology, reached: Float, across: Float) -> None:
    """Areas go by the probability, but none is too small to be seen."""
    from matplotlib.colors import LinearSegmentedColormap

    most = _diameter(topology, float(across.max()))
    diameters = np.maximum(most * np.sqrt(reached), min(_LEAST_DIAMETER, most))
    shades = LinearSegmentedColormap.from_list("reached", _SHADES)(reached)
    rims = np.minimum(0.6, diameters / 16.0).tolist()
    axes.scatter(across, topology.depths, diameters**2, shades, edgecolors=_INK, linewidths=rims, zorder=2)
    for node in np.flatnonzero(diameters >= _LEAST_WITH_TEXT):
        colour = "white" if reached[node] > 0.6 else _INK
        at = across[node], topology.depths[node]
        axes.annotate(f"{reached[node]:.0%}", at, ha="center", va="center", fontsize=8, color=colour, zorder=3)


def _diameter(topology: Topology, width: float) -> float:
    """Of the root, in points, so that neighbours do not touch: they are less likely than the root by far."""
    fitting = min(_apart(width), 0.6 * _HEIGHT / topology.levels)
    return min(max(fitting, _LEAST_OF_ROOT), _MOST_DIAMETER)


def _apart(width: float) -> float:
    """Points between two neighbours."""
    return _WIDTH / (max(width, _LEAST_WIDTH) + 1.0)


def _label_ranks(axes: Axes, topology: Topology, acceptance: Rows, across: Float) -> None:
    """The acceptance of the root's first children, on their edges, as far as there is room between them."""
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    last = -np.inf
    for child, probability in list(zip(topology.children[0], acceptance[0], strict=False))[:_NUM_LABELLED_RANKS]:
        place = 0.3 * across[0] + 0.7 * across[child]
        if (place - last) * _apart(float(across.max())) < _LABEL_WIDTH:
            break
        axes.text(place, 0.7, f"{probability:.2g}", ha="center", va="center", fontsize=9, bbox=box, zorder=4)
        last = place


def _label_levels(axes: Axes, topology: Topology, reached: Float, width: float, total: str) -> None:
    """Beside every level, or beside some of many."""
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    by_level = np.bincount(topology.depths, weights=reached)
    for depth in range(0, topology.levels, -(-topology.levels // _NUM_LABELLED_LEVELS)):
        text = "1 (the bonus token)" if depth == 0 else f"+ {by_level[depth]:.2f}"
        axes.annotate(text, (width, depth), xytext=(34, 0), **style)
    axes.annotate(total, (width, topology.levels - 1), xytext=(34, -20), fontweight="bold", **style)
