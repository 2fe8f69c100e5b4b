"""What a plan holds for, besides the pair and its hardware: rule, temperature, load, context, distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

from sequoia.rules import Rule


@dataclass(frozen=True)
class Buckets:
    """Ranges of a quantity of 0 or more. `ends` are the last values of all but the last range, ascending.

    `planned_at` is the value of each range that plans are computed for.
    """

    ends: tuple[float, ...]
    planned_at: tuple[float, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The ranges, in words: "1", "(1,2]", ..., "(8,inf)"; the first one goes down to 0."""
        edges = [f"{each:g}" for each in self.ends]
        between = (f"({low},{high}]" for low, high in pairwise(edges))
        return (edges[0], *between, f"({edges[-1]},inf)")

    def index(self, value: float) -> int:
        """The range that a value falls in."""
        return sum(value > end for end in self.ends)

    def name(self, value: float) -> str:
        """The name of the range that a value falls in."""
        return self.names[self.index(value)]


TEMPERATURES = Buckets((0.0, 0.4, 0.8), (0.0, 0.3, 0.6, 1.0))
SESSIONS = Buckets((1, 2, 4, 8), (1, 2, 4, 8, 16))
CONTEXTS = Buckets((1024, 4096), (256, 2048, 6144))
ROUND_TRIPS = Buckets((0.004, 0.01, 0.02, 0.05, 0.1), (0.002, 0.007, 0.015, 0.035, 0.075, 0.15))


@dataclass(frozen=True, slots=True)
class Situation:
    """The ranges that a step falls in, each by its name: of TEMPERATURES, SESSIONS, CONTEXTS and ROUND_TRIPS.

    `sessions` run at the same time, `context` counts tokens before the step, `round_trip` is the sum of those to both
    workers in seconds.
    """

    rule: str
    temperature: str
    sessions: str = SESSIONS.names[0]
    context: str = CONTEXTS.names[0]
    round_trip: str = ROUND_TRIPS.names[0]

    @staticmethod
    def of(
        rule: Rule,
        temperature: float,
        num_sessions: int = 1,
        num_context_tokens: int = 0,
        round_trip_seconds: float = 0.0,
    ) -> Situation:
        """The situation of a step."""
        return Situation(
            rule.name,
            TEMPERATURES.name(temperature),
            SESSIONS.name(num_sessions),
            CONTEXTS.name(num_context_tokens),
            ROUND_TRIPS.name(round_trip_seconds),
        )

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.rule}, temperature {self.temperature}, {self.sessions} sessions, "
            f"{self.context} tokens of context, round trips of {self.round_trip} s"
        )

    @property
    def neighbours(self) -> tuple[Situation, ...]:
        """This situation and those whose plan serves while it has none, the likest first.

        Other round trips change a plan least, the nearest first; then fewer sessions and shorter contexts.
        """
        return _neighbours(self)


@lru_cache(maxsize=1024)  # they are asked for at every step
def _neighbours(situation: Situation) -> tuple[Situation, ...]:
    here = ROUND_TRIPS.names.index(situation.round_trip)
    by_distance = sorted(ROUND_TRIPS.names, key=lambda name: abs(ROUND_TRIPS.names.index(name) - here))
    loads = dict.fromkeys(
        [
            (situation.sessions, situation.context),
            (situation.sessions, CONTEXTS.names[0]),
            (SESSIONS.names[0], CONTEXTS.names[0]),
        ]
    )
    return tuple(
        replace(situation, sessions=sessions, context=context, round_trip=round_trip)
        for sessions, context in loads
        for round_trip in by_distance
    )
