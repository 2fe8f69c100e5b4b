"""The roofline: floors by hand, the place where compute takes over, what samples say together."""

from __future__ import annotations

import pytest

from sequoia.roofline import Floor, ForwardCost, Quartiles, Roof, Sample, summarise

# 1000 weights of two bytes behind a context of 400 bytes, over which a token computes 500 operations.
COST = ForwardCost(linear_parameters=1000, weight_bytes=2000, kv_bytes=400, attention_flops=500)
# Reading takes 2.4 s, each token 0.25 s.
ROOF = Roof(bytes_per_second=1000.0, flops_per_second=10_000.0)


def test_weights_and_context_are_read_once_and_computed_with_by_every_token() -> None:
    assert COST.bytes_read == 2400
    assert [COST.flops(n) for n in (1, 4)] == [2500, 10_000]


def test_the_floor_is_the_longer_of_reading_and_computing() -> None:
    assert ROOF.floor(COST, 1) == Floor(2.4, "memory")
    assert ROOF.floor(COST, 9) == Floor(2.4, "memory")
    assert ROOF.floor(COST, 10) == Floor(2.5, "compute")
    assert ROOF.floor(COST, 64) == Floor(16.0, "compute")


@pytest.mark.parametrize(("flops_per_second", "expected"), [(10_000.0, 10), (100.0, 1), (1e6, 961)])
def test_compute_takes_over_at_the_first_width_that_it_bounds(flops_per_second: float, expected: int) -> None:
    roof = Roof(1000.0, flops_per_second)
    assert roof.compute_bound_from(COST) == expected
    assert roof.floor(COST, expected).bound == "compute"
    assert expected == 1 or roof.floor(COST, expected - 1).bound == "memory"


def test_each_forward_is_compared_with_the_machine_of_its_own_moment() -> None:
    samples = [
        *(Sample(16, ROOF, 8.0), Sample(1, ROOF, 4.8)),
        # A neighbour halves the machine, and the forward takes twice as long: as near to its floor as before.
        *(Sample(16, Roof(500.0, 5000.0), 16.0), Sample(1, Roof(500.0, 5000.0), 9.6)),
        *(Sample(16, Roof(2000.0, 20_000.0), 4.0), Sample(1, Roof(2000.0, 20_000.0), 2.4)),
    ]
    found = summarise(COST, samples)
    assert (found.median_roof, found.best_roof) == (ROOF, Roof(2000.0, 20_000.0))
    assert found.compute_bound_from == 10
    one, sixteen = found.forwards
    assert (one.num_tokens, one.floor, one.seconds.median) == (1, Floor(2.4, "memory"), 4.8)
    assert one.ratio == pytest.approx(Quartiles(2.0, 2.0, 2.0))
    assert (sixteen.num_tokens, sixteen.floor, sixteen.seconds) == (16, Floor(4.0, "compute"), (6.0, 8.0, 12.0))
    assert sixteen.ratio == pytest.approx(Quartiles(2.0, 2.0, 2.0))


def test_nothing_is_said_without_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise(COST, [])
