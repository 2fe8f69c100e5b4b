"""What it takes of the target's time that a draft reads the text before its first tree."""

from __future__ import annotations

# Readings after which one counts half, about; a plan's estimate counts like one of so many tokens.
_KEEP, _ESTIMATED_TOKENS = 0.9, 64


class Reading:
    """Seconds by the tokens read; the latest readings count most."""

    def __init__(self, seconds_per_token: float) -> None:
        self._seconds, self._num_tokens = seconds_per_token * _ESTIMATED_TOKENS, float(_ESTIMATED_TOKENS)
        self._count = 1.0

    def add(self, seconds: float, num_tokens: int) -> None:
        """One reading."""
        self._seconds = _KEEP * self._seconds + seconds
        self._num_tokens = _KEEP * self._num_tokens + num_tokens
        self._count = _KEEP * self._count + 1.0

    def seconds(self, num_tokens: int) -> float:
        """Of so many tokens."""
        return self._seconds / self._num_tokens * num_tokens

    @property
    def usual_seconds(self) -> float:
        """Of a text as long as most."""
        return self._seconds / self._count
