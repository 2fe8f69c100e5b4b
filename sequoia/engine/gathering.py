"""Whether the next forward waits a moment for jobs that belong into it."""

from __future__ import annotations

# Of what the last forward took, and in all.
_SHARE, _MOST_SECONDS = 0.15, 0.005
# It pays when of those that ended so many come back in time.
_LEAST_RETURNING = 0.5
# How much a turn counts for what is known of those before it.
_RATE = 0.1


class Gathering:
    """Jobs that ended with one forward mostly come back together: a forward that begins with the first of them leaves
    the others to the next one, and from then on the sessions go in two halves that each pay for a forward.

    So the next turn waits until as many jobs came as have ended, for a small share of a forward at most, and only as
    long as most of them do come back in that time: where a session's next job is on another device they do not.
    All times are of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._num_ended = self._num_back = 0
        self._until = 0.0
        self._returning = 1.0

    def ended(self, num_jobs: int, forward_seconds: float, now: float) -> None:
        """A forward is done, and so many jobs with it."""
        if self._num_ended:
            share = min(1.0, self._num_back / self._num_ended)
            self._returning += _RATE * (share - self._returning)
        self._num_ended, self._num_back = num_jobs, 0
        self._until = now + min(_MOST_SECONDS, _SHARE * forward_seconds)

    def came(self, now: float) -> None:
        """A job has arrived."""
        self._num_back += now <= self._until

    def seconds_left(self, now: float) -> float:
        """How long to wait for more, at most."""
        is_waiting = self._num_back < self._num_ended and self._returning >= _LEAST_RETURNING
        return max(0.0, self._until - now) if is_waiting else 0.0
