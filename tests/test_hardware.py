import pytest

from sequoia.hardware import LatencyCurve, LatencyProfile, SharedCurve

BASE = LatencyCurve((1, 2, 4, 8, 16), (1.0, 1.1, 1.3, 3.0, 4.0))  # a cliff between 4 and 8


def profile() -> LatencyProfile:
    """Two sessions cost a tenth more than one of as many tokens, and 2048 tokens of context half a second each."""
    return LatencyProfile(
        SharedCurve(1, 64, BASE),
        (
            SharedCurve(2, 64, LatencyCurve((1, 4), (1.1 * BASE.at(2), 1.1 * BASE.at(8)))),
            SharedCurve(1, 2048, LatencyCurve((1, 16), (BASE.at(1) + 0.5, BASE.at(16) + 0.5))),
        ),
    )


def test_one_session_behind_a_short_context_has_the_base_curve() -> None:
    assert profile().curve() == BASE


def test_sessions_share_the_forward_and_keep_its_cliffs() -> None:
    shared = profile().curve(2)
    assert shared.num_tokens == (1, 2, 4, 8)
    assert shared.seconds == pytest.approx([1.1 * BASE.at(2 * width) for width in (1, 2, 4, 8)])


def test_every_session_pays_for_its_own_context() -> None:
    assert profile().curve(1, 2048).seconds == pytest.approx([seconds + 0.5 for seconds in BASE.seconds])
    assert profile().curve(2, 2048).at(1) == pytest.approx(1.1 * BASE.at(2) + 2 * 0.5)
    halfway = (64 + 2048) // 2
    assert profile().curve(1, halfway).at(1) == pytest.approx(1.25)


def test_what_lies_beyond_the_measurements_is_as_measured_last() -> None:
    assert profile().curve(1, 100_000) == profile().curve(1, 2048)
    assert profile().curve(4).at(4) == pytest.approx(1.1 * BASE.at(16))


def test_more_sessions_than_tokens_were_measured_are_refused() -> None:
    assert profile().curve(16).num_tokens == (1,)
    with pytest.raises(ValueError, match="17 sessions in a forward: measured up to 16"):
        profile().curve(17)


def test_a_curve_is_scaled_by_factors_that_hold_at_widths() -> None:
    scaled = BASE.scaled((1, 2.0), (4, 1.0))
    assert scaled.seconds == pytest.approx((2.0, 1.1 * 5 / 3, 1.3, 3.0, 4.0))


def test_a_profile_may_be_its_base_alone() -> None:
    assert LatencyProfile(SharedCurve(1, 64, BASE)).curve(2, 5000).at(1) == BASE.at(2)
