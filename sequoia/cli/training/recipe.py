"""What a draft follows from: the same recipe makes the same draft on the same kind of machine."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sequoia.errors import InvalidArgument

# Some megabytes, and some minutes of a small model on a CPU.
_MOST_IN_SHARD = 512
_SIZE = re.compile(r"(\d+)x(\d+|all)")


@dataclass(frozen=True, slots=True)
class Size:
    """How large a draft is to be: the target's first layers, over its most used tokens; 0: over all."""

    num_layers: int
    num_tokens: int

    @staticmethod
    def parse(text: str) -> Size:
        """From `2x12288` or `4xall`. Raises ValueError."""
        found = _SIZE.fullmatch(text)
        if not found or int(found[1]) < 1:
            raise ValueError(f"{text!r} is no size; write layers x tokens, such as 2x12288 or 4xall")
        return Size(int(found[1]), 0 if found[2] == "all" else int(found[2]))

    def __str__(self) -> str:
        return f"{self.num_layers}x{self.num_tokens or 'all'}"


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """What the text follows from. `num_documents` beside those that are kept to measure with."""

    target: str
    num_documents: int
    seed: int
    openings: dict[str, list[str]]
    texts: tuple[str, ...]
    question_tokens: int  # most of them behind an opening
    answer_tokens: int  # most of them

    @property
    def documents_in_shard(self) -> int:
        """Of every shard alike."""
        return min(_MOST_IN_SHARD, self.num_documents)

    @property
    def fingerprint(self) -> str:
        """All but how many shards, as JSON: a longer corpus continues a shorter one."""
        named = {name: each for name, each in asdict(self).items() if name != "num_documents"}
        return json.dumps({**named, "documents_in_shard": self.documents_in_shard})


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """How long a student learns, in steps of `batch_tokens` padded tokens."""

    num_steps: int
    batch_tokens: int
    learning_rate: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def read_openings(file: Path) -> dict[str, list[str]]:
    """Beginnings of questions by category, from a JSON object of lists. Raises InvalidArgument naming `openings`."""
    try:
        openings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", "openings") from error
    is_right = isinstance(openings, dict) and openings and all(map(_is_list_of_text, openings.values()))
    if not is_right:
        raise InvalidArgument(f'{file} must hold an object of lists of text, as {{"code": ["Write a"]}}', "openings")
    return openings


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)
