"""Which rows of the KV pool are whose: a run of rows a session, and what ended sessions have left in the others."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from sequoia.errors import ResourceExhausted

# Fewer tokens in common are made again as quickly as they are looked for.
_LEAST_SHARED = 16

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Run:
    """Adjoining rows of the pool. The first `length` of them are valid; `tokens` are those that they were made from,
    as far as they are known.
    """

    start: int
    num_rows: int
    length: int = 0
    tokens: Tokens = ()
    source: Run | None = None  # whose first `num_shared` rows are to be copied here
    num_shared: int = 0  # rows that need not be made
    num_readers: int = 0  # sessions that have yet to copy from it
    is_left: bool = False  # its session has ended

    @property
    def end(self) -> int:
        """The first row behind it."""
        return self.start + self.num_rows

    @property
    def num_known(self) -> int:
        """Valid rows whose tokens are known."""
        return min(self.length, len(self.tokens))

    @property
    def is_held(self) -> bool:
        """Whether somebody needs its rows."""
        return not self.is_left or self.num_readers > 0

    def num_common(self, tokens: Tokens) -> int:
        """Its first rows that were made from the first of these tokens."""
        known, most, high = self.tokens, min(self.num_known, len(tokens)), _LEAST_SHARED
        while high < most and known[:high] == tokens[:high]:
            high *= 2
        counts = range(1, min(high, most) + 1)
        return bisect_left(counts, True, key=lambda count: known[:count] != tokens[:count])


class KVMemory:
    """Gives each session as many adjoining rows as it may need, so that none is ever short of them later.

    What ended sessions leave is kept until its rows are wanted, the longest unused first to go. A session whose first
    tokens are those of another, running or ended, has the rows that they made: the very rows where they are nobody's
    any more, else a copy. Called from any thread.
    """

    def __init__(self, num_rows: int, *, reuses: bool = True) -> None:
        self._num_rows, self._reuses = num_rows, reuses
        self._runs: list[Run] = []  # by start
        self._left: dict[Run, None] = {}  # the longest unused first
        self.changing = Lock()  # held while a run, or which of them there are, is changed
        self.num_reused = 0  # rows that did not have to be made, since the start

    @property
    def num_sessions(self) -> int:
        """That have rows."""
        return len(self._runs) - len(self._left)

    @property
    def num_rows_used(self) -> int:
        """Of all sessions."""
        with self.changing:
            return sum(run.num_rows for run in self._runs if not run.is_left)

    def take(self, num_rows: int, tokens: Tokens = ()) -> Run:
        """Rows for a session that begins with these tokens; the last one's row is always made anew.

        Raises ResourceExhausted naming `kv-tokens` while there is no room.
        """
        with self.changing:
            source, num_shared = self._likest(tokens[:-1])
            if source is not None and 2 * num_shared > source.length and self._can_extend(source, num_rows):
                return self._extended(source, num_rows, num_shared)
            run = self._placed(num_rows, spared=source)
            if run is not None and source is not None:
                run.source, run.num_shared = source, num_shared
                source.num_readers += 1
                self._use(source, num_shared)
            elif run is None and source is not None and self._can_extend(source, num_rows):
                return self._extended(source, num_rows, num_shared)
            run = run or self._placed(num_rows)
        if run is None:
            free = self._num_rows - self.num_rows_used
            problem = (
                f"KV memory for {num_rows} tokens is needed, and {free} of {self._num_rows} are free, not in a row"
            )
            raise ResourceExhausted(f"{problem}; try again, or raise --kv-tokens", "kv-tokens")
        return run

    def copied(self, run: Run) -> None:
        """Its source is needed no more."""
        with self.changing:
            if run.source is not None:
                run.source.num_readers -= 1
                run.source = None

    def leave(self, run: Run) -> None:
        """Its session has ended."""
        self.copied(run)
        with self.changing:
            known = run.num_known
            run.tokens, run.length, run.num_rows, run.is_left = run.tokens[:known], known, known, True
            self._left[run] = None
            if not self._reuses or known < _LEAST_SHARED:
                self._forget(run)
                return
            for other in [each for each in self._left if each is not run and not each.is_held]:
                if run.num_common(other.tokens) == other.length:
                    self._forget(other)

    def _likest(self, tokens: Tokens) -> tuple[Run | None, int]:
        """The run that shares most with these tokens, and how many; None where it is not worth it."""
        if not self._reuses or len(tokens) < _LEAST_SHARED:
            return None, 0
        shared, run = max(((run.num_common(tokens), run) for run in self._runs), default=(0, None), key=lambda x: x[0])
        return (run, shared) if shared >= _LEAST_SHARED else (None, 0)

    def _can_extend(self, run: Run, num_rows: int) -> bool:
        """Whether a session can go on in these rows, in as many as it needs."""
        behind = (each.start for each in self._runs if each.is_held and each.start >= run.end)
        return not run.is_held and next(behind, self._num_rows) - run.start >= num_rows

    def _extended(self, run: Run, num_rows: int, num_shared: int) -> Run:
        self._use(run, num_shared)
        end = run.start + num_rows
        for other in [each for each in self._left if run.start < each.start < end]:
            self._forget(other)
        del self._left[run]
        run.tokens, run.length, run.num_rows, run.is_left = run.tokens[:num_shared], num_shared, num_rows, False
        run.num_shared = num_shared
        return run

    def _placed(self, num_rows: int, spared: Run | None = None) -> Run | None:
        """A run where there is room, or was when others are forgotten; None where even that is not enough."""
        held = (each for each in self._runs if each.is_held or each is spared)
        if self._gap(held, num_rows) is None:
            return None
        while (start := self._gap(self._runs, num_rows)) is None:
            self._forget(next(each for each in self._left if not each.is_held and each is not spared))
        run = Run(start, num_rows)
        insort(self._runs, run, key=lambda each: each.start)
        return run

    def _gap(self, runs: Iterable[Run], num_rows: int) -> int | None:
        """The first place between these runs that so many rows fit in."""
        start = 0
        for run in runs:
            if run.start - start >= num_rows:
                return start
            start = run.end
        return start if self._num_rows - start >= num_rows else None

    def _use(self, run: Run, num_shared: int) -> None:
        self.num_reused += num_shared
        if run.is_left:
            self._left[run] = self._left.pop(run)

    def _forget(self, run: Run) -> None:
        del self._left[run]
        self._runs.remove(run)
