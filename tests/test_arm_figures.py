"""What answers come to: hand-made numbers whose figures are known."""

from __future__ import annotations

import json

import pytest

from sequoia.cli.benchmarks.arm_figures import Difference, Spread, Worst, figures_of, first_difference, spread
from sequoia.cli.benchmarks.arm_measuring import ArmAnswer, Sample
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.client import StageSeconds

EOS = frozenset({1})


def sample(arm: str, prompt: str, seconds_per_token: float, *, category: str = "code", round: int = 0) -> Sample:
    """Five tokens, the first after half a second."""
    stages = StageSeconds(draft=1.0, verify=2.0, network=0.5, host=0.5, prefill=9.0)
    answer = ArmAnswer((5, 6, 7, 8, 9), 0.5 + 4 * seconds_per_token, 0.5, 2, 4, stages)
    return Sample(arm, BenchPrompt(category, prompt, ""), round, answer)


def test_times_leave_the_first_token_out_and_rates_do_not() -> None:
    [off] = figures_of([sample("off", "a", 0.25), sample("off", "b", 0.5), sample("off", "c", 1.0)])
    assert off.overall.seconds_per_token == Spread(0.375, 0.5, 0.75)
    assert off.overall.first_token_seconds == Spread(0.5, 0.5, 0.5)
    assert off.overall.tokens_per_second == pytest.approx(
        Spread((5 / 2.5 + 5 / 4.5) / 2, 5 / 2.5, (5 / 1.5 + 5 / 2.5) / 2)
    )


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    off = [sample("off", name, seconds) for name, seconds in (("a", 0.1), ("b", 0.2), ("c", 0.9))]
    plan = [sample("plan", name, seconds) for name, seconds in (("a", 0.2), ("b", 0.1), ("c", 0.3))]
    _, figures = figures_of([*off, *plan])
    assert figures.overall.ratio_to_off == pytest.approx(Spread(1.25, 2.0, 2.5))


def test_pairs_are_of_the_same_round() -> None:
    off = [sample("off", "a", 0.1, round=0), sample("off", "a", 0.4, round=1)]
    plan = [sample("plan", "a", 0.4, round=1), sample("plan", "a", 0.1, round=0)]
    _, figures = figures_of([*off, *plan])
    assert figures.overall.ratio_to_off == pytest.approx(Spread(1.0, 1.0, 1.0))


def test_the_worst_category_is_named() -> None:
    found = figures_of(
        [
            sample("off", "a", 0.2),
            sample("plan", "a", 0.1),
            sample("off", "b", 0.2, category="prose"),
            sample("plan", "b", 0.25, category="prose"),
        ]
    )
    assert found[1].worst_category == pytest.approx(Worst("prose", 0.8))
    assert list(found[1].by_category) == ["code", "prose"]


def test_steps_and_stages_are_summed_over_answers() -> None:
    [off] = figures_of([sample("off", "a", 0.1), sample("off", "b", 0.1)])
    assert off.overall.tokens_per_step == 2.0
    assert off.overall.stage_shares == {"draft": 0.25, "verify": 0.5, "network": 0.125, "host": 0.125}


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    alone = Sample("off", BenchPrompt("code", "a", ""), 0, ArmAnswer((1,), 0.5, 0.5))
    [off] = figures_of([alone])
    assert (off.overall.seconds_per_token, off.overall.ratio_to_off, off.worst_category) == (None, None, None)
    assert (off.overall.tokens_per_step, off.overall.stage_shares) == (None, None)
    assert json.dumps(off.to_dict())


def test_a_spread_is_of_what_is_known() -> None:
    assert spread([None, 3.0, 1.0, None, 2.0]) == Spread(1.5, 2.0, 2.5)
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("tokens", "others", "position"),
    [
        ((5, 6, 7), (5, 6, 7), None),
        ((5, 9, 7), (5, 6, 7), 1),
        ((5, 6), (5, 6, 7), 2),
        ((5, 6, 1), (5, 6), None),
        ((5, 6), (5, 6, 1), None),
        ((5, 1), (5, 6, 1), 1),
        ((), (5,), 0),
    ],
)
def test_the_first_token_that_differs_is_found(
    tokens: tuple[int, ...], others: tuple[int, ...], position: int | None
) -> None:
    assert first_difference(tokens, others, EOS) == position


def test_an_arm_is_marked_with_the_prompts_that_differ() -> None:
    prompts = [BenchPrompt("code", name, "") for name in "ab"]
    off = [Sample("off", each, turn, ArmAnswer((5, 6, 7, 1), 1.0, 0.5)) for each in prompts for turn in (0, 1)]
    texts = [(5, 6, 8), (5, 4, 8), (5, 6, 7), (5, 6, 7)]
    peer = [
        Sample("peer", each.prompt, each.round, ArmAnswer(text, 1.0, 0.5))
        for each, text in zip(off, texts, strict=True)
    ]
    plain, other = figures_of([*off, *peer], EOS)
    assert plain.differences == ()
    assert other.differences == (Difference("code", "a", 1),)
    assert other.to_dict()["num_prompts_that_differ"] == 1
