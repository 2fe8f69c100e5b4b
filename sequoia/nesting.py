"""How deep a value goes that JSON can write: what reads one is often recursive."""

from __future__ import annotations

from typing import Any


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects stand in each other more than `most` levels deep."""
    level = [value]
    for _ in range(most):
        groups = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for group in groups for each in group]
    return bool(level)
