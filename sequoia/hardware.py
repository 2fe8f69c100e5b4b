"""How long a forward takes on the hardware at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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

    def scaled(self, factor: float) -> LatencyCurve:
        """The same curve with every time multiplied."""
        return LatencyCurve(self.num_tokens, tuple(factor * seconds for seconds in self.seconds))

    def at(self, num_tokens: int) -> float:
        """Seconds of a forward of `num_tokens`. Raises ValueError outside the measured range."""
        if not self.num_tokens[0] <= num_tokens <= self.max_tokens:
            raise ValueError(f"{num_tokens} tokens: measured from {self.num_tokens[0]} to {self.max_tokens} only")
        return float(np.interp(num_tokens, self.num_tokens, self.seconds))

    def table(self, max_tokens: int) -> NDArray[np.float64]:
        """(max_tokens + 1,) seconds by width: 0 for no tokens, infinite outside the measured range."""
        widths = np.arange(max_tokens + 1)
        return np.where(
            widths == 0, 0.0, np.interp(widths, self.num_tokens, self.seconds, left=math.inf, right=math.inf)
        )
