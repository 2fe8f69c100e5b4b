import pytest

from sequoia.rules import COUPLED
from sequoia.situation import CONTEXTS, ROUND_TRIPS, SESSIONS, TEMPERATURES, Buckets, Situation


@pytest.mark.parametrize(
    ("temperature", "index"), [(0.0, 0), (1e-6, 1), (0.4, 1), (0.41, 2), (0.8, 2), (0.81, 3), (1.0, 3), (100.0, 3)]
)
def test_temperatures_fall_in_four_buckets(temperature: float, index: int) -> None:
    assert TEMPERATURES.name(temperature) == ("0", "(0,0.4]", "(0.4,0.8]", "(0.8,inf)")[index]


@pytest.mark.parametrize("buckets", [TEMPERATURES, SESSIONS, CONTEXTS, ROUND_TRIPS])
def test_every_bucket_is_planned_for_at_a_value_of_its_own(buckets: Buckets) -> None:
    assert [buckets.name(value) for value in buckets.planned_at] == list(buckets.names)
    assert len(set(buckets.names)) == len(buckets.ends) + 1


def test_a_situation_says_where_a_step_stands() -> None:
    at = Situation.of(COUPLED, 0.7, num_sessions=3, num_context_tokens=5000, round_trip_seconds=0.015)
    assert at == Situation("coupled", "(0.4,0.8]", "(2,4]", "(4096,inf)", "(0.01,0.02]")
    assert str(at) == (
        "coupled, temperature (0.4,0.8], (2,4] sessions, (4096,inf) tokens of context, round trips of (0.01,0.02] s"
    )


def test_the_likest_situations_come_first() -> None:
    at = Situation.of(COUPLED, 0.7, num_sessions=3, num_context_tokens=5000, round_trip_seconds=0.015)
    first, second, *_, last = at.neighbours
    assert first == at
    assert (second.sessions, second.context, second.round_trip) == (at.sessions, at.context, "(0.004,0.01]")
    assert (last.sessions, last.context, last.rule) == ("1", "1024", "coupled")
    assert len(set(at.neighbours)) == len(at.neighbours) == 3 * len(ROUND_TRIPS.names)
