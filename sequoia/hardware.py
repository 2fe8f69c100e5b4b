"""How long a forward takes on the hardware at hand: by the tokens in it, the sessions that share it, their context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """Seconds of one forward by the number of tokens in it: t(n), piecewise linear between measured widths.

    Raises ValueError unless the widths ascend from 1 or more and every time is positive.
    """

    num_tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.num_tokens or len(self.num_tokens) != len(self.seconds):
            raise ValueError(f"a latency curve needs one time per width, not {self.seconds} for {self.num_tokens}")
        if self.num_tokens[0] < 1 or any(a >= b for a, b in pairwise(self.num_tokens)):
            raise ValueError(f"the widths of a latency curve must be positive and ascend, not {self.num_tokens}")
        if not all(math.isfinite(each) and each > 0 for each in self.seconds):
            raise ValueError(f"the times of a latency curve must be positive seconds, not {self.seconds}")

    @staticmethod
    def from_dict(seconds_by_width: Mapping[str, float]) -> LatencyCurve:
        """From the JSON form `{"1": seconds, "2": ...}`. Raises ValueError when it is not of that form."""
        pairs = sorted((int(width), float(seconds)) for width, seconds in seconds_by_width.items())
        return LatencyCurve(tuple(width for width, _ in pairs), tuple(seconds for _, seconds in pairs))

    def to_dict(self) -> dict[str, float]:
        """The JSON form: `{"1": seconds, "2": ...}`."""
        return {str(width): seconds for width, seconds in zip(self.num_tokens, self.seconds, strict=True)}

    @property
    def max_tokens(self) -> int:
        """The widest forward measured."""
        return self.num_tokens[-1]

    def scaled(self, *factors: tuple[int, float]) -> LatencyCurve:
        """The same curve, every time multiplied by the factor that holds at its width.

        Factors are given as (width, factor), ascending; between them they are interpolated, beyond them constant.
        """
        widths, values = zip(*factors, strict=True)
        by_width = np.interp(self.num_tokens, widths, values).tolist()
        return LatencyCurve(self.num_tokens, tuple(a * b for a, b in zip(self.seconds, by_width, strict=True)))

    def at(self, num_tokens: int) -> float:
        """Seconds of a forward of `num_tokens`. Raises ValueError outside the measured range."""
        if not self.num_tokens[0] <= num_tokens <= self.max_tokens:
            raise ValueError(f"{num_tokens} tokens: measured from {self.num_tokens[0]} to {self.max_tokens} only")
        return float(np.interp(num_tokens, self.num_tokens, self.seconds))

    def table(self, max_tokens: int) -> Float:
        """(max_tokens + 1,) seconds by width: 0 for no tokens, infinite outside the measured range."""
        widths = np.arange(max_tokens + 1)
        return np.where(
            widths == 0, 0.0, np.interp(widths, self.num_tokens, self.seconds, left=math.inf, right=math.inf)
        )


class SharedCurve(NamedTuple):
    """A curve by the tokens of each session, measured with some sessions in the forward and a context before them."""

    num_sessions: int
    num_context_tokens: int
    curve: LatencyCurve


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """All that was measured of a model's forwards. `base` is one session's curve behind a short context.

    `others` are sparser curves: of some sessions behind that context, and of one session behind longer ones.
    """

    base: SharedCurve
    others: tuple[SharedCurve, ...] = ()

    def curve(self, num_sessions: int = 1, num_context_tokens: int = 0) -> LatencyCurve:
        """Seconds by the tokens of each session, when that many sessions behind that context share a forward.

        The cliffs are those of the base curve at all the forward's tokens. What sharing and context cost beside is
        interpolated between the curves measured, and as measured last beyond them. Raises ValueError when not even one
        token a session was measured.
        """
        base = self.base.curve
        if num_sessions > base.max_tokens:
            raise ValueError(f"{num_sessions} sessions in a forward: measured up to {base.max_tokens} tokens only")
        widths = sorted({max(width // num_sessions, 1) for width in base.num_tokens})
        plain = np.array([base.at(num_sessions * width) for width in widths])
        seconds = plain * self._sharing(num_sessions, widths) + num_sessions * self._context(num_context_tokens, widths)
        return LatencyCurve(tuple(widths), tuple(seconds.tolist()))

    def _sharing(self, num_sessions: int, widths: list[int]) -> Float:
        """By width: a forward of that many sessions, by one of a single session with as many tokens."""
        base = self.base.curve
        measured = [(1, np.ones(len(widths)))]
        for each in sorted(self.others):
            if each.num_sessions > 1:
                ratios = [
                    seconds / base.at(each.num_sessions * width)
                    for width, seconds in zip(each.curve.num_tokens, each.curve.seconds, strict=True)
                ]
                measured.append((each.num_sessions, np.interp(widths, each.curve.num_tokens, ratios)))
        return _between(measured, num_sessions)

    def _context(self, num_context_tokens: int, widths: list[int]) -> Float:
        """By width: seconds that one session's forward takes longer than behind the short context."""
        base = self.base.curve
        measured = [(self.base.num_context_tokens, np.zeros(len(widths)))]
        for each in sorted(self.others):
            if each.num_sessions == 1:
                known = [base.at(width) for width in each.curve.num_tokens]
                extra = np.maximum(np.subtract(each.curve.seconds, known), 0.0)
                measured.append((each.num_context_tokens, np.interp(widths, each.curve.num_tokens, extra)))
        return _between(measured, num_context_tokens)


def _between(measured: list[tuple[int, Float]], at: int) -> Float:
    """Linear between the rows measured at ascending places; the first and the last row beyond them."""
    places = [place for place, _ in measured]
    columns = np.stack([row for _, row in measured]).T
    return np.array([np.interp(at, places, column) for column in columns])
