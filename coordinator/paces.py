"""The paces of a plan's trees, all of them as the machine is now."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import copy

from coordinator.pace import Pace
from sequoia.topology import TreeShape


class Paces:
    """By shape, those of `num_sessions` at a time.

    What else the machine does meets the trees at different times. One of them leads, that which is decoded with now:
    the others' paces follow the seconds that its steps take, not its tokens, which are its own.
    """

    def __init__(self, leader: TreeShape, num_sessions: int) -> None:
        self._leader, self._num_sessions = leader, num_sessions
        self._paces: dict[TreeShape, Pace] = {}
        self._usual = Pace(num_sessions)  # the leader's usual steps
        self._stated_at: float | None = None  # seconds of a usual step when the others' paces were last stated

    @property
    def all(self) -> dict[TreeShape, Pace]:
        """A copy; plain decoding is the root-only shape."""
        self._restate()
        return dict(self._paces)

    def observed(self, shape: TreeShape) -> Pace | None:
        """However little is known of it."""
        self._restate()
        return self._paces.get(shape)

    def known(self, shape: TreeShape) -> Pace | None:
        """Once it was observed often enough to be compared."""
        pace = self.observed(shape)
        return pace if pace is not None and pace.is_known else None

    def lead(self, shape: TreeShape) -> None:
        """From now on this one tells how fast the machine is; of one that is not known the others cannot follow."""
        pace = self.known(shape)
        self._leader, self._stated_at = shape, None
        self._usual = copy(pace) if pace else Pace(self._num_sessions)
        if pace is None:
            self._paces = {}

    def keep(self, shapes: Collection[TreeShape]) -> None:
        """Forget the others."""
        self._paces = {shape: pace for shape, pace in self._paces.items() if shape in shapes}

    def add(self, seconds: float, num_tokens: int, charged_seconds: float = 0.0) -> None:
        """A step of the leader, and what was paid before it besides."""
        pace = self._paces.setdefault(self._leader, Pace(self._num_sessions))
        pace.add(seconds, num_tokens)
        pace.seconds += charged_seconds

    def add_usual(self, seconds: float, num_tokens: int) -> None:
        """Such a step that went as most do: it tells how fast the machine is."""
        if self._stated_at is None and self._usual.is_known:
            self._stated_at = self._usual.seconds_per_step
        self._usual.add(seconds, num_tokens)

    def add_tried(self, shape: TreeShape, steps: Iterable[tuple[float, int]], usual_seconds: float) -> None:
        """Steps (seconds, tokens) of another one, from a time when a usual step of the leader took so long."""
        pace = self._paces.setdefault(shape, Pace(self._num_sessions))
        self._restate()
        for seconds, num_tokens in steps:
            pace.add(seconds * self._usual.seconds_per_step / usual_seconds, num_tokens)

    def _restate(self) -> None:
        if self._stated_at is None or (now := self._usual.seconds_per_step) == self._stated_at:
            return
        for shape, pace in self._paces.items():
            if shape != self._leader:
                pace.scale(now / self._stated_at)
        self._stated_at = now
