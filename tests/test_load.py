from coordinator.load import Load


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_sessions_that_end_together_and_come_back_are_as_many_as_before() -> None:
    clock = Clock()
    load = Load(clock)
    for _ in range(4):
        load.begin()
    for _ in range(4):
        load.end()
        clock.now += 0.01
    counts = []
    for _ in range(4):
        load.begin()
        counts.append(load.count)
    assert counts == [4] * 4
    clock.now += 0.3
    assert load.count == 4


def test_requests_of_one_client_after_another_are_one_session() -> None:
    clock = Clock()
    load = Load(clock)
    for _ in range(3):
        load.begin()
        assert load.count == 1
        clock.now += 0.05
        load.end()


def test_sessions_that_stay_away_are_forgotten_in_a_moment() -> None:
    clock = Clock()
    load = Load(clock)
    for _ in range(16):
        load.begin()
    for _ in range(15):
        load.end()
        clock.now += 0.1
    found = {}
    for wait in (0.0, 0.1, 0.1, 0.1):
        clock.now += wait
        found[round(clock.now, 1)] = load.count
    assert list(found.values()) == [3, 2, 1, 1]


def test_more_sessions_count_at_once() -> None:
    load = Load(Clock())
    load.begin()
    load.end()
    for count in (1, 2, 3):
        load.begin()
        assert load.count == count
