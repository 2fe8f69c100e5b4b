from __future__ import annotations

import pytest

from sequoia.engine.gathering import Gathering

FORWARD = 0.02


def turn(gathering: Gathering, now: float, num_ended: int, *after: float) -> float:
    """A forward that ends now, and jobs that come so long after it. Returns how long the next would wait, at once."""
    gathering.ended(num_ended, FORWARD, now)
    left = gathering.seconds_left(now)
    for seconds in after:
        gathering.came(now + seconds)
    return left


def test_the_next_forward_waits_for_those_that_ended_together() -> None:
    gathering = Gathering()
    assert turn(gathering, 1.0, 3, 0.001, 0.002) == pytest.approx(0.003)
    assert 0.0 < gathering.seconds_left(1.002) < 0.0011
    gathering.came(1.0025)
    assert gathering.seconds_left(1.0025) == 0.0


def test_it_waits_for_a_small_share_of_a_forward_and_never_long() -> None:
    gathering = Gathering()
    gathering.ended(2, 10.0, 1.0)
    assert gathering.seconds_left(1.0) == pytest.approx(0.005)
    assert gathering.seconds_left(1.006) == 0.0


def test_nobody_is_waited_for_when_none_has_ended() -> None:
    assert turn(Gathering(), 1.0, 0) == 0.0


def test_waiting_ends_where_jobs_do_not_come_back_in_time_and_begins_again_where_they_do() -> None:
    gathering = Gathering()
    waits = [turn(gathering, float(number), 2) > 0.0 for number in range(20)]
    assert waits == 7 * [True] + 13 * [False]
    waits = [turn(gathering, float(number), 2, 0.001, 0.002) > 0.0 for number in range(20, 40)]
    assert not waits[0]
    assert waits[-1]
