"""Shapes of trees as people write and read them. Loads no grpc: plans are shown without a system too."""

from __future__ import annotations

import re

from sequoia.topology import DynamicShape, Topology, TreeShape

_CHANCE = r"(0?\.\d+)"
_DYNAMIC = re.compile(rf"(\d+)x(\d+)d(\d+)(?:c{_CHANCE})?(?:g{_CHANCE})?")


def dynamic_shape(text: str) -> DynamicShape | None:
    """16x5d4 is a dynamic tree of 16 nodes, 5 levels and width 4; 16x5d4c.05g.8 has a least chance and a least gain.

    None for what is not of that form. Raises ValueError where there is no such tree.
    """
    found = _DYNAMIC.fullmatch(text)
    return DynamicShape(*map(int, found.groups()[:3]), *map(float, found.groups("0")[3:])) if found else None


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
    if not isinstance(shape, DynamicShape):
        return sizes
    limits = (("c", shape.least_chance), ("g", shape.least_gain))
    return f"{sizes}d{shape.width}" + "".join(f"{name}{each:.2g}" for name, each in limits if each)
