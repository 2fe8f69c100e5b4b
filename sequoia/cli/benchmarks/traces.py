"""Traces: the ranks of the target's own tokens among a draft's children, kept in a file that needs no model to read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sequoia.cli.benchmarks.replay import Ranks
from sequoia.errors import InvalidArgument

SCHEMA = "sequoia.traces.v1"
# Ranks that are told apart; what lies beyond is None.
NUM_RANKS = 64


@dataclass(frozen=True, slots=True)
class Text:
    """A text by the target: its tokens behind the prompt, and the ranks of all but the first of them."""

    seed: int | None  # of the request; None at temperature 0
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    ranks: Ranks

    @property
    def num_tokens(self) -> int:
        """Behind the prompt."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Trace:
    """Texts of one temperature."""

    temperature: float
    texts: tuple[Text, ...]

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(text.num_tokens for text in self.texts)


@dataclass(frozen=True, slots=True)
class Recording:
    """A pair's traces. `target` and `draft` say what was loaded: reference, revision, dtype_name, quantization."""

    target: dict[str, str]
    draft: dict[str, str]
    traces: tuple[Trace, ...]

    def save(self, file: Path) -> None:
        """As JSON, which `read` reads. Raises InvalidArgument naming `save`."""
        try:
            file.write_text(json.dumps({"schema": SCHEMA, "num_ranks": NUM_RANKS, **asdict(self)}))
        except OSError as error:
            raise InvalidArgument(f"{file} cannot be written: {error.strerror}", "save") from error

    @staticmethod
    def read(file: Path) -> Recording:
        """Raises InvalidArgument naming `traces` when the file is not there or not such a file."""
        try:
            data = json.loads(file.read_text())
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']}, not {SCHEMA}")
            return Recording(data["target"], data["draft"], tuple(map(_trace, data["traces"])))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{file} holds no traces: {type(error).__name__}: {error}", "traces") from error


def _trace(data: dict[str, Any]) -> Trace:
    return Trace(float(data["temperature"]), tuple(map(_text, data["texts"])))


def _text(data: dict[str, Any]) -> Text:
    ranks = tuple(data["ranks"])
    if not all(rank is None or (isinstance(rank, int) and 0 <= rank < NUM_RANKS) for rank in ranks):
        raise ValueError(f"a rank is null or a number from 0 to {NUM_RANKS - 1}")
    return Text(data["seed"], int(data["num_prompt_tokens"]), tuple(data["token_ids"]), ranks)
