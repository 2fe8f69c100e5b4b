"""The prompts of `sequoia bench`: our own, by category, kept in prompts.json beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A user's message."""

    category: str
    name: str  # unique in its category
    text: str


def prompt_set(most_per_category: int | None = None) -> tuple[BenchPrompt, ...]:
    """The first so many of every category (default: all), the categories in turn."""
    data = json.loads(files(__package__).joinpath("prompts.json").read_text("utf-8"))
    columns = [
        [BenchPrompt(category, **each) for each in prompts[:most_per_category]] for category, prompts in data.items()
    ]
    return tuple(each for each in chain.from_iterable(zip_longest(*columns)) if each is not None)
