"""Shapes of trees as people write and read them. Loads no grpc: plans are shown without a system too."""

from __future__ import annotations

import re

from sequoia.topology import DynamicShape, Topology, TreeShape

_DYNAMIC = re.compile(r"(\d+)x(\d+)d(\d+)")


def dynamic_shape(text: str) -> DynamicShape | None:
    """16x5d4 is a dynamic tree of 16 nodes, 5 levels and width 4; None for what is not of that form.

    Raises ValueError where there is no such tree.
    """
    sizes = _DYNAMIC.fullmatch(text)
    return DynamicShape(*map(int, sizes.groups())) if sizes else None


def read_shape(text: str) -> TreeShape:
    """A tree by its nodes' parents, as in -1,0,0,1, or a dynamic one. Raises ValueError."""
    return dynamic_shape(text) or Topology(tuple(int(parent) for parent in text.split(",")))


def in_words(shape: TreeShape) -> str:
    """Nodes and levels, and how many nodes a dynamic tree forwards at a time."""
    if isinstance(shape, DynamicShape):
        return str(shape)
    return f"{shape.size} nodes x {shape.levels} levels"


def in_short(shape: TreeShape) -> str:
    """As few characters as a table has room for."""
    sizes = f"{shape.size}x{shape.levels}"
    return f"{sizes}d{shape.width}" if isinstance(shape, DynamicShape) else sizes
