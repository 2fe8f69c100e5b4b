"""Live acceptance counts in Redis: what the coordinators of a pair counted lately, added up and slowly forgotten."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from redis.exceptions import RedisError, ResponseError

from sequoia.acceptance import AcceptanceCounts, Rows
from sequoia.errors import Unavailable
from sequoia.redis_connection import connect

# Counts deeper or of a later rank are left out: a request may bring any tree.
MAX_DEPTH = 64
MAX_RANK = 1024
MAX_COUNT = 2.0**53  # from here on, adding 1 changes nothing
SLICE_SECONDS = 3600
# A slice is there for that long after the last addition to it, and read for as long after it began.
RETENTION_SECONDS = 3 * 24 * 3600

_CELL = re.compile(rb"([oa]):(0|[1-9]\d{0,3}):(0|[1-9]\d{0,3})")

_Cells = dict[tuple[int, int], float]  # by (depth, rank)


@dataclass(frozen=True, slots=True)
class CountsKey:
    """What counts hold for. `pair` is free text; `rule` and `temperature` are the names of a rule and a bucket."""

    pair: str
    rule: str
    temperature: str

    def __str__(self) -> str:
        """The key in Redis, without the slice."""
        pair = hashlib.sha256(self.pair.encode()).hexdigest()[:16]
        return f"sequoia:acceptance:v1:{pair}:{self.rule}:{self.temperature}"


@dataclass(frozen=True, slots=True)
class LiveAcceptance:
    """Counts, and `num_steps` steps with trees that committed `num_tokens` where `expected_tokens` were predicted.

    The trees of `num_ahead_hits` of these steps were begun while the step before was verified; before
    `num_ahead_misses` trees were begun in vain.

    All may be fractions. `rejected` says what is wrong with entries that were skipped. Raises ValueError for a figure
    that is negative or not finite.
    """

    counts: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    num_steps: float = 0.0
    num_tokens: float = 0.0
    expected_tokens: float = 0.0
    num_ahead_hits: float = 0.0
    num_ahead_misses: float = 0.0
    rejected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, total in self.totals.items():
            if not 0.0 <= total < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {total}")

    @property
    def num_ahead_attempts(self) -> float:
        """Steps before which trees were begun, of use or not."""
        return self.num_ahead_hits + self.num_ahead_misses

    @property
    def totals(self) -> dict[str, float]:
        """The figures besides the counts, by the name of their field in Redis."""
        return {
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "expected": self.expected_tokens,
            "ahead_hits": self.num_ahead_hits,
            "ahead_misses": self.num_ahead_misses,
        }

    def __add__(self, other: LiveAcceptance) -> LiveAcceptance:
        """Both together."""
        return LiveAcceptance(
            self.counts + other.counts,
            self.num_steps + other.num_steps,
            self.num_tokens + other.num_tokens,
            self.expected_tokens + other.expected_tokens,
            self.num_ahead_hits + other.num_ahead_hits,
            self.num_ahead_misses + other.num_ahead_misses,
            self.rejected + other.rejected,
        )

    def scaled(self, factor: float) -> LiveAcceptance:
        """Every figure times `factor`, at least 0."""
        return LiveAcceptance(
            self.counts.scaled(factor),
            self.num_steps * factor,
            self.num_tokens * factor,
            self.expected_tokens * factor,
            self.num_ahead_hits * factor,
            self.num_ahead_misses * factor,
            self.rejected,
        )


class LiveCounts:
    """A connection to the Redis that holds counts: an async context manager.

    Calls give up after about a second. Raises InvalidArgument for a URL that is none, Unavailable when Redis cannot be
    reached or refuses.
    """

    def __init__(self, url: str) -> None:
        self._redis = connect(url)

    async def __aenter__(self) -> LiveCounts:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._redis.aclose()

    async def add(self, key: CountsKey, added: LiveAcceptance, *, now: float) -> None:
        """Add to the slice of `now`, in seconds since 1970, all in one transaction.

        Writers add up exactly, whole numbers at least. An addition is repeated once when the connection breaks, so one
        whose confirmation got lost may count twice.
        """
        name = f"{key}:{_slice(now)}"
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                for field_name, amount in _fields(added).items():
                    pipeline.hincrbyfloat(name, field_name, amount)
                pipeline.expire(name, RETENTION_SECONDS)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot add acceptance counts in Redis: {error}") from error

    async def read(self, key: CountsKey, *, now: float, half_life_seconds: float) -> LiveAcceptance:
        """What was added lately, in one round trip. What is `half_life_seconds` old counts half; ages in whole slices.

        A slice that is not of this schema, or cannot be, is rejected as a whole, never used.
        """
        last = _slice(now)
        slices = range(last, max(last - RETENTION_SECONDS // SLICE_SECONDS, 0) - 1, -1)
        found = await self._read_slices([f"{key}:{each}" for each in slices])
        weights = (0.5 ** ((last - each) * SLICE_SECONDS / half_life_seconds) for each in slices)
        weighted = (each.scaled(weight) for each, weight in zip(found, weights, strict=True) if each is not None)
        return sum(weighted, LiveAcceptance())

    async def _read_slices(self, names: Sequence[str]) -> list[LiveAcceptance | None]:
        """What is under each name, None when nothing is."""
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hgetall(name)
                replies = await pipeline.execute(raise_on_error=False)
            return [_parsed(name, reply) if reply else None for name, reply in zip(names, replies, strict=True)]
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot read acceptance counts from Redis: {error}") from error


def _slice(now: float) -> int:
    return int(now // SLICE_SECONDS)


def _fields(live: LiveAcceptance) -> dict[str, float]:
    """A slice's fields: `o:<depth>:<rank>` offered, `a:<depth>:<rank>` accepted, and the totals; none that is 0."""
    fields = live.totals
    for kind, rows in (("o", live.counts.offered), ("a", live.counts.accepted)):
        for depth, row in enumerate(rows[: MAX_DEPTH + 1]):
            fields |= {f"{kind}:{depth}:{rank}": count for rank, count in enumerate(row[: MAX_RANK + 1])}
    return {name: value for name, value in fields.items() if value}


def _parsed(name: str, reply: Mapping[bytes, bytes] | ResponseError) -> LiveAcceptance:
    """A slice, trusting nothing: one that cannot be is an empty one that says so. Raises what Redis refused with."""
    if isinstance(reply, ResponseError):
        if "WRONGTYPE" not in str(reply):
            raise reply
        return LiveAcceptance(rejected=(f"{name}: {reply}",))
    try:
        return _live(reply)
    except ValueError as error:
        return LiveAcceptance(rejected=(f"{name}: {error}",))


def _live(fields: Mapping[bytes, bytes]) -> LiveAcceptance:
    """The inverse of `_fields`. Raises ValueError for what it does not write."""
    totals = {name.encode(): 0.0 for name in LiveAcceptance().totals}
    cells: dict[str, _Cells] = {"o": {}, "a": {}}
    for name, value in fields.items():
        if name in totals:
            totals[name] = _number(value)
        else:
            kind, depth, rank = _cell(name)
            cells[kind][depth, rank] = _number(value)
    counts = AcceptanceCounts(_rows(cells["o"]), _rows(cells["a"]))
    steps, tokens, expected, ahead_hits, ahead_misses = totals.values()
    return LiveAcceptance(counts, steps, tokens, expected, ahead_hits, ahead_misses)


def _number(value: bytes) -> float:
    if not 0.0 <= (number := float(value)) <= MAX_COUNT:
        raise ValueError(f"{number} is no count")
    return number


def _cell(name: bytes) -> tuple[str, int, int]:
    match = _CELL.fullmatch(name)
    if match is None or int(match[2]) > MAX_DEPTH or int(match[3]) > MAX_RANK:
        raise ValueError(f"{name[:40]!r} is no field of acceptance counts")
    return match[1].decode(), int(match[2]), int(match[3])


def _rows(cells: _Cells) -> Rows:
    widths = [0] * (max((depth for depth, _ in cells), default=-1) + 1)
    for depth, rank in cells:
        widths[depth] = max(widths[depth], rank + 1)
    return tuple(tuple(cells.get((depth, rank), 0.0) for rank in range(width)) for depth, width in enumerate(widths))
