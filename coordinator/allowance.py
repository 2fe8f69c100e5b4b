"""What one client uses: requests at a time, and requests and tokens per minute."""

from __future__ import annotations

import math

from coordinator.clients_file import Limits
from sequoia.errors import PermissionDenied, ResourceExhausted

_MINUTE = 60.0
# After which one of the running requests may have ended.
_SESSION_RETRY_SECONDS = 1.0
# What a client asks for that wants as many as there is room for.
ALL_THERE_IS_ROOM_FOR = 2**32 - 1


class Bucket:
    """A number per minute, of which a minute's worth may be used at once. Times are seconds by any one clock.

    What is used is known when it has been: the bucket may be overdrawn, and then has to fill first.
    """

    def __init__(self, now: float) -> None:
        self._used, self._at = 0.0, now

    def wait_seconds(self, per_minute: int, needed: int, now: float) -> float:
        """Until `needed` are there (at most a minute's worth); 0 where they are."""
        self._refill(per_minute, now)
        missing = self._used + min(needed, per_minute) - per_minute
        return max(0.0, missing * _MINUTE / per_minute)

    def use(self, amount: int) -> None:
        """Take them."""
        self._used += amount

    def _refill(self, per_minute: int, now: float) -> None:
        self._used = max(0.0, self._used - (now - self._at) * per_minute / _MINUTE)
        self._at = now


class Allowance:
    """Of one client, for as long as the process lives, whatever its limits become meanwhile."""

    def __init__(self, now: float) -> None:
        self.num_sessions = 0
        self._requests, self._tokens = Bucket(now), Bucket(now)

    def begin(self, limits: Limits, now: float) -> None:
        """A request; `end` follows. Raises ResourceExhausted naming the limit, with the time to come again."""
        if limits.max_sessions and self.num_sessions >= limits.max_sessions:
            problem = f"{self.num_sessions} of your requests run, which is all you may have at a time"
            raise ResourceExhausted(problem, "max_sessions", retry_seconds=_SESSION_RETRY_SECONDS)
        for name, bucket, needed in self._rates:
            per_minute = getattr(limits, name)
            if per_minute and (seconds := bucket.wait_seconds(per_minute, needed, now)):
                problem = f"your {per_minute} are used up; try again in {math.ceil(seconds)} s"
                raise ResourceExhausted(problem, name, retry_seconds=seconds)
        self._requests.use(1)
        self.num_sessions += 1

    def end(self) -> None:
        """It has ended."""
        self.num_sessions -= 1

    def use_tokens(self, num_tokens: int) -> None:
        """Of its prompt, or of its answer."""
        self._tokens.use(num_tokens)

    @property
    def _rates(self) -> tuple[tuple[str, Bucket, int], ...]:
        return ("requests_per_minute", self._requests, 1), ("tokens_per_minute", self._tokens, 1)


def limited_tokens(asked: int | None, default: int, limits: Limits) -> int:
    """The most tokens of an answer: as asked for. Raises PermissionDenied naming `max_tokens` for too many.

    Who names no number, or as many as there is room for, gets as many as it may have.
    """
    named = default if asked is None else asked
    if not limits.max_tokens or named <= limits.max_tokens:
        return named
    if asked in (None, ALL_THERE_IS_ROOM_FOR):
        return limits.max_tokens
    raise PermissionDenied(f"is {asked}; you may ask for {limits.max_tokens}", "max_tokens")
