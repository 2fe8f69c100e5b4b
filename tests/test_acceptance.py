import pytest

from sequoia.acceptance import PRIOR, AcceptanceCounts


def test_many_counts_give_their_own_frequencies() -> None:
    counts = AcceptanceCounts(offered=(100_000, 100_000), accepted=(60_000, 20_000))
    assert counts.vector()[:2] == pytest.approx((0.6, 0.2), abs=1e-4)


def test_without_counts_the_vector_is_the_prior() -> None:
    assert AcceptanceCounts().vector() == pytest.approx(PRIOR)


def test_the_prior_counts_as_that_many_offers() -> None:
    vector = AcceptanceCounts(offered=(6,), accepted=(3,)).vector(prior_strength=4.0)
    assert vector[0] == pytest.approx((3 + 4 * PRIOR[0]) / 10)


def test_a_rank_that_was_never_accepted_is_not_impossible() -> None:
    assert AcceptanceCounts(offered=(50, 50), accepted=(50, 0)).vector()[1] > 0.0


def test_the_vector_sums_to_less_than_one() -> None:
    perfect = AcceptanceCounts(offered=(100_000,), accepted=(100_000,)).vector()
    assert sum(perfect) < 1.0
    assert min(perfect) >= 0.0


def test_ranks_beyond_the_prior_are_kept() -> None:
    num_ranks = len(PRIOR) + 3
    assert len(AcceptanceCounts(offered=(10,) * num_ranks).vector()) == num_ranks


def test_counts_add_up_rank_by_rank() -> None:
    total = AcceptanceCounts((5, 4), (3, 1)) + AcceptanceCounts((2,), (2,))
    assert total == AcceptanceCounts((7, 4), (5, 1))


@pytest.mark.parametrize(("offered", "accepted"), [((1,), (2,)), ((1,), (-1,)), ((1,), (1, 0))])
def test_counts_that_cannot_be_are_refused(offered: tuple[int, ...], accepted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        AcceptanceCounts(offered, accepted)
