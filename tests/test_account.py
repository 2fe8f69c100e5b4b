"""The rule by which a draft worker decides to draft ahead, with figures that are known."""

from __future__ import annotations

from draft_worker.account import Account
from draft_worker.drafter import Drafted
from sequoia.loaded_worker import MOST_GUESSES
from sequoia.topology import TokenTree

TREE = TokenTree.root_only(5)


def hit(number: int = 0, num_levels_saved: int = 3, num_begun: int = MOST_GUESSES) -> Drafted:
    return Drafted(TREE, min(num_begun, MOST_GUESSES), number, num_levels_saved)


def miss(num_begun: int) -> Drafted:
    return Drafted(TREE, num_begun)


def steps(account: Account, count: int, outcomes: list[Drafted], *, was_unfinished: bool) -> list[int]:
    """Guesses allowed at each step, the outcomes taking turns."""
    allowed = []
    for index in range(count):
        allowed.append(account.num_guesses(has_own_device=True))
        drafted = outcomes[index % len(outcomes)]
        num_begun = min(allowed[-1], drafted.num_begun)
        if num_begun:
            is_hit = drafted.hit is not None and drafted.hit < num_begun
            outcome = hit(drafted.hit or 0, drafted.num_levels_saved, num_begun) if is_hit else miss(num_begun)
            account.settle(outcome, was_unfinished=was_unfinished)
    return allowed


def test_on_and_off_are_what_they_say_whatever_happens() -> None:
    on, off = Account("on"), Account("off")
    assert {*steps(on, 200, [miss(1)], was_unfinished=True)} == {MOST_GUESSES}
    assert {*steps(off, 200, [hit()], was_unfinished=False)} == {0}
    assert on.num_guesses(has_own_device=False) == MOST_GUESSES


def test_auto_never_drafts_ahead_on_the_verifiers_device() -> None:
    account = Account("auto")
    assert {account.num_guesses(has_own_device=False) for _ in range(200)} == {0}


def test_misses_that_hold_a_step_up_end_it_but_for_one_step_in_64() -> None:
    allowed = steps(Account("auto"), 640, [miss(1)], was_unfinished=True)
    assert allowed[0] == MOST_GUESSES
    assert sum(allowed[:64]) < 3 * 12
    assert sum(allowed[64:]) == (640 - 64) / 64


def test_misses_that_hold_nothing_up_cost_nothing() -> None:
    assert {*steps(Account("auto"), 640, [miss(MOST_GUESSES)], was_unfinished=False)} == {MOST_GUESSES}


def test_the_threshold_is_where_hits_save_what_steps_wait_for() -> None:
    """Three levels saved by every second step, or every fifth; every step finds the first guess's forward running."""
    pays = steps(Account("auto"), 640, [hit(num_begun=1), miss(1)], was_unfinished=True)
    loses = steps(Account("auto"), 640, [hit(num_begun=1), *[miss(1)] * 4], was_unfinished=True)
    assert min(pays) >= 1
    assert sum(each >= 1 for each in loses[320:]) < 320 / 3


def test_a_later_guess_that_loses_ends_and_the_first_goes_on() -> None:
    """Every step finds the last guess that is allowed at work, and only the first comes true."""
    allowed = steps(Account("auto"), 640, [hit(0, 3)], was_unfinished=True)
    assert allowed[0] == MOST_GUESSES
    assert sorted(allowed[320:])[len(allowed[320:]) // 2] == 1


def test_a_better_time_is_noticed() -> None:
    account = Account("auto")
    assert sum(steps(account, 320, [miss(1)], was_unfinished=True)[256:]) == 1
    assert min(steps(account, 640, [hit(num_begun=1)], was_unfinished=True)[320:]) >= 1
