"""Whether drafting ahead pays: an account of the forwards that it saved and of those that it made others wait for."""

from __future__ import annotations

from itertools import takewhile

from draft_worker.drafter import Drafted
from sequoia.loaded_worker import MOST_GUESSES

# What a guess may lose before it has saved anything, in forwards.
_CREDIT = 8.0
# Attempts after which an entry counts half.
_HALF_LIFE = 64
# One step in so many is tried although the account says no.
_RETRY_EVERY = 64


class Account:
    """How many guesses a session of a worker may draft ahead for. All sessions share one.

    `on` is always as many as there can be, `off` none. `auto`: none where the verifier works on the same device.
    Elsewhere every guess, by its number in the order of likelihood, has an account in forwards. A hit is worth the
    levels that its tree had by then: as many forwards that nobody has to wait for any more. A step that arrives while a
    guess's forward is running waits for it, on average for half of it; that costs a whole one, as steps of other
    sessions may have to wait as well, which nobody counts. So the threshold is hits x levels saved = steps that found
    it at work, and a tree that was finished in time costs nothing. A guess is drafted for while neither its account nor
    one before it is overdrawn; one step in 64 tries one guess more, so that a better time is noticed. Every account
    starts with a credit, and entries fade, gains as well as losses. Drafting ahead can therefore lose no more than it
    has won lately, the credit, and a forward in 64 steps.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._balances = [_CREDIT] * MOST_GUESSES
        self._num_steps = 0

    def num_guesses(self, *, has_own_device: bool) -> int:
        """For the next step; 0: do not draft ahead."""
        if self._mode == "on":
            return MOST_GUESSES
        if self._mode == "off" or not has_own_device:
            return 0
        self._num_steps += 1
        num_paying = sum(1 for _ in takewhile(lambda balance: balance >= 0.0, self._balances))
        return min(num_paying + (self._num_steps % _RETRY_EVERY == 0), MOST_GUESSES)

    def settle(self, drafted: Drafted, *, was_unfinished: bool) -> None:
        """Enter what came of it; `was_unfinished`: the step found a forward to wait for."""
        for number in range(drafted.num_begun):
            saved = drafted.num_levels_saved if drafted.hit == number else 0
            lost = was_unfinished and number == drafted.num_begun - 1
            self._balances[number] = 0.5 ** (1 / _HALF_LIFE) * self._balances[number] + saved - lost
