"""What a client saw of one request: its pieces, when they came, and how it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sequoia.cli.load.workload import LoadRequest

Outcome = Literal["done", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it arrives. Where the protocol does not tell, every piece with text counts as one token.

    The last one has the totals.
    """

    text: str
    num_tokens: int
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Totals of a whole answer; steps and what they committed are None where the server does not tell."""

    num_tokens: int
    num_steps: int | None = None
    num_accepted_tokens: int | None = None


class Driver(Protocol):
    """A way to ask a system. Pieces without tokens are not yielded, but for the last one."""

    def ask(self, request: LoadRequest, arm: str) -> AsyncGenerator[Piece]:
        """Leaving the generator cancels the request. Raises SequoiaError."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Times are in seconds, `started` on the clock of the run and the others counted from it."""

    request: LoadRequest
    started: float
    piece_seconds: tuple[float, ...]
    total_seconds: float
    outcome: Outcome
    num_tokens: int
    text: str = ""
    ending: Ending | None = None
    error: str = ""

    @property
    def first_token_seconds(self) -> float | None:
        """TTFT; None where nothing came."""
        return self.piece_seconds[0] if self.piece_seconds else None

    @property
    def seconds_per_token(self) -> float | None:
        """TPOT, after the first token; None for fewer than two."""
        if self.first_token_seconds is None or self.num_tokens < 2:
            return None
        return (self.total_seconds - self.first_token_seconds) / (self.num_tokens - 1)

    @property
    def between_pieces_seconds(self) -> tuple[float, ...]:
        """ITL as clients feel it: a step's tokens come in one piece."""
        return tuple(b - a for a, b in zip(self.piece_seconds, self.piece_seconds[1:], strict=False))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "category": self.request.prompt.category,
            "prompt": self.request.prompt.name,
            "started": self.started,
            "ttft": self.first_token_seconds,
            "e2el": self.total_seconds,
            "tokens": self.num_tokens,
            "outcome": self.outcome,
            "error": self.error,
        }
