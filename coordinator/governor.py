"""Never slower: compares what speculation realises with what plain decoding takes, and goes the faster way.

Three gaits: the plan's tree, a smaller one, plain decoding. Each has a pace, measured on the steps that really ran. The
others are tried again now and then; what the trials lose is at most a small share of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordinator.gaits import Gait, Gaits
from coordinator.pace import Pace
from coordinator.paces import Paces
from coordinator.reading import Reading
from coordinator.trial import Recent, Trial
from sequoia.topology import TreeShape

# A gait is left for one that is faster by this much at least, and by so many standard errors of the difference: fewer
# for plain decoding, than which nothing may be slower.
_LEAST_GAIN, _STANDARD_ERRORS, _STANDARD_ERRORS_OFF = 0.02, 2.0, 1.0
# A trial's length in steps of a session. Plain steps vary less, so that fewer of them will do.
_TRIAL_STEPS, _PLAIN_TRIAL_STEPS = 8, 4
# First steps of a trial that are left out of it, for each other session: until the last of them has changed over.
_SETTLING_STEPS = 4
# Plain steps that a session runs on by itself before it asks again, at most; as a trial comes near, at least.
_PLAIN_STEPS, _LEAST_PLAIN_STEPS = 64, 4
# Steps of a session between two looks at what the paces say.
_LOOK_STEPS = 4
# Steps of a session between the end of a trial and the next one, at least; fewer while plain decoding's pace is not
# known.
_BETWEEN_TRIALS, _BETWEEN_FIRST_TRIALS = 24, 8
# The share of the time that trials may lose.
_TRIAL_SHARE = 0.01
# A trial that is still waiting for its first tree after so many steps is given up: the draft is not there.
_PATIENCE_STEPS = 64
# Tokens that a step is taken to bring before one was seen.
_USUAL_TOKENS = 3.0


class Governor:
    """Decides on the gait of requests of one kind, for all of them together, by what it is told their steps took.

    What else the machine does meets the gaits at different times. So the others are compared with the gait gone in by
    trials, whose steps lie between steps of that one; in between their paces follow the seconds that those take, not
    their tokens, which are their own. Of `num_sessions` that run at a time, about, all change at once, and a trial
    lasts until all have: among sessions that draft plain decoding is slow, and by what it takes there trees would seem
    to pay that cost all sessions time.
    """

    def __init__(self, gaits: Gaits, num_sessions: int = 1) -> None:
        self._gaits, self._num_sessions = gaits, num_sessions
        self.gait, self.reason, self.cause = gaits.first, gaits.promise, gaits.cause
        self._paces = Paces(gaits.trees[gaits.first], num_sessions)
        self._reading = Reading(gaits.reading_seconds / num_sessions)
        self._recent = Recent(num_sessions)
        self._trial: Trial | None = None
        self._past_trial: Trial | None = None  # over, and not yet compared with what comes after it
        self._steps_since_trial = self._steps_since_look = 0
        self._credit_seconds = self._charged_seconds = 0.0

    @property
    def paces(self) -> Mapping[TreeShape, Pace]:
        """By shape; plain decoding is the root-only one. A copy."""
        return self._paces.all

    def follow(self, gaits: Gaits) -> None:
        """Go on with another plan's trees; with the same ones what is known of them stays known."""
        is_other = gaits.trees != self._gaits.trees or gaits.first != self._gaits.first
        self._gaits = gaits
        if is_other:
            self.reason, self.cause, self._trial = gaits.promise, gaits.cause, None
            self._reading = Reading(gaits.reading_seconds / self._num_sessions)
            self._paces.keep(gaits.trees.values())
            self._go(gaits.first)

    @property
    def is_trying(self) -> bool:
        """Whether the next step is one of a trial."""
        return self._trial is not None

    def tree(self) -> TreeShape:
        """Of the next step."""
        return self._gaits.trees[self._trial.gait if self._trial else self.gait]

    def pays_to_begin(self, num_tokens: int, num_tokens_left: int) -> bool:
        """Whether a session that has no draft yet should have one read its `num_tokens`, all others waiting."""
        if self._trial or self._is_open(Gait.OFF) or self._pace(self.gait) is None:
            return num_tokens_left >= _TRIAL_STEPS  # to learn what it gains
        gain = self._expected(Gait.OFF) - self._expected(self.gait)
        # Without any the gait is about to change, or the steps that there were had bad luck: more of them will tell.
        return gain <= 0.0 or num_tokens_left * gain >= self._reading.seconds(num_tokens) * self._num_sessions

    @property
    def num_plain_steps(self) -> int:
        """That a session without a tree may run on by itself before it asks again."""
        if self._trial:
            return math.ceil((self._trial.num_unsettled + self._trial.num_steps_left) / self._num_sessions) - 1
        return min(_PLAIN_STEPS, max(_LEAST_PLAIN_STEPS, int(self._num_steps_to_trial / self._num_sessions)))

    def observe(self, shape: TreeShape, seconds: float, num_tokens: int, *, usual: bool = True) -> None:
        """What one step took for which `shape` was chosen.

        Not `usual` is one that waited for the draft, or came right after a step of the other kind, as at the beginning
        of every answer. That belongs to the pace of a gait that is gone in, and not to that of one which is only tried.
        """
        gait = self._gait_of(shape)
        if self._trial and gait is self._trial.gait:
            self._try_on(self._trial, seconds, num_tokens, usual)
            return
        if gait is self.gait:
            self._paces.add(seconds, num_tokens, self._charged_seconds)
            self._charged_seconds = 0.0
        if self._trial is not None:
            return
        self._credit_seconds += _TRIAL_SHARE * seconds
        self._steps_since_trial += 1
        if usual and gait is self.gait:
            self._recent.add(seconds)
            self._paces.add_usual(seconds, num_tokens)
            self._compare()
        self._steps_since_look += 1
        if self._steps_since_look >= _LOOK_STEPS * self._num_sessions:
            self._steps_since_look = 0
            self._decide()
            if self._past_trial is None:
                self._try_another()

    def charge(self, seconds: float, num_tokens: int) -> None:
        """What a session has paid before its first tree: the draft has read so many tokens, where the target waits."""
        self._reading.add(seconds, num_tokens)
        if self.gait is not Gait.OFF:
            self._charged_seconds += seconds

    def _try_on(self, trial: Trial, seconds: float, num_tokens: int, usual: bool) -> None:
        """A step of a trial, which pays for what it takes longer than the gait that it interrupts."""
        self._credit_seconds -= max(0.0, seconds - num_tokens * self._expected(self.gait))
        trial.add(seconds, num_tokens, usual=usual)
        if trial.is_over:
            self._trial, self._past_trial, self._steps_since_trial = None, trial, 0
            self._recent.clear()

    def _compare(self) -> None:
        """Take the last trial's steps into its gait's pace, as if the machine had been then as it mostly is now."""
        trial = self._past_trial
        if trial is None or not self._recent.is_full or not (after := self._recent.step_seconds):
            return
        self._past_trial, then = None, trial.machine_speed(after)
        if then is not None and trial.steps:
            self._paces.add_tried(self._gaits.trees[trial.gait], trial.steps, then)

    def _gait_of(self, shape: TreeShape) -> Gait:
        """Trees that were cut at the end of an answer, or explored, belong to the gait that is gone in."""
        known = (gait for gait, tree in self._gaits.trees.items() if tree == shape)
        return next(known, self._trial.gait if self._trial else self.gait)

    def _decide(self) -> None:
        known = {gait: pace for gait in self._gaits.trees if (pace := self._pace(gait)) is not None}
        if self.gait not in known:
            return
        now = known[self.gait]
        better = {gait: pace for gait, pace in known.items() if gait is not self.gait and _gains(gait, pace, now)}
        if better:
            self._change(min(better, key=lambda gait: better[gait].seconds_per_token), known)

    def _change(self, gait: Gait, known: Mapping[Gait, Pace]) -> None:
        # Down by one step first, when the smaller tree is not known and may still pay.
        if self.gait is Gait.ON and gait is Gait.OFF and self._may_pay(Gait.REDUCED, known):
            gait = Gait.REDUCED
        paces = ", ".join(f"{each.value} {pace.seconds_per_token * 1e3:.1f}" for each, pace in known.items())
        self.reason, self.cause = f"measured, in ms a token: {paces}", "measured"
        self._go(gait)

    def _go(self, gait: Gait) -> None:
        self.gait, self._past_trial = gait, None
        self._paces.lead(self._gaits.trees[gait])
        self._recent.clear()
        self._charged_seconds = 0.0

    def _may_pay(self, gait: Gait, known: Mapping[Gait, Pace]) -> bool:
        is_open = gait in self._gaits.trees and gait not in known
        return is_open and self._expected(gait) < known[Gait.OFF].seconds_per_token

    @property
    def _next_tried(self) -> Gait | None:
        """Plain decoding until its pace is known; then that which was observed least."""
        others = [gait for gait in self._gaits.trees if gait is not self.gait]
        return Gait.OFF if self._is_open(Gait.OFF) else min(others, key=self._evidence, default=None)

    def _try_another(self) -> None:
        """Begin a trial when what it is expected to lose is paid for.

        Nothing can be said before plain decoding was measured: that trial is on credit.
        """
        gait = self._next_tried
        if gait is None or self._steps_since_trial < self._steps_between * self._num_sessions:
            return
        if self._is_open(Gait.OFF) or self._credit_seconds >= self._expected_loss(gait):
            self._trial = Trial(
                gait,
                num_steps_left=_num_trial_steps(gait) * self._num_sessions,
                num_unsettled=_SETTLING_STEPS * (self._num_sessions - 1),
                num_waits_left=_PATIENCE_STEPS * self._num_sessions,
                before=self._recent.step_seconds,
            )

    @property
    def _steps_between(self) -> int:
        return _BETWEEN_FIRST_TRIALS if self._is_open(Gait.OFF) else _BETWEEN_TRIALS

    @property
    def _num_steps_to_trial(self) -> float:
        """Of all sessions together, at the least, while they are decoded plainly."""
        gait, pace = self._next_tried, self._pace(Gait.OFF)
        if gait is None or pace is None:
            return 0.0
        unpaid = self._expected_loss(gait) - self._credit_seconds
        paid_in = unpaid / (_TRIAL_SHARE * pace.seconds_per_step)
        return max(paid_in, float(self._steps_between * self._num_sessions - self._steps_since_trial))

    def _is_open(self, gait: Gait) -> bool:
        return gait is not self.gait and self._pace(gait) is None

    def _expected_loss(self, gait: Gait) -> float:
        """Of a trial, in seconds of sessions: all of them are in it, and where it is one of trees, all drafts read."""
        pace = self._paces.observed(self._gaits.trees[gait])
        num_steps = _num_trial_steps(gait) * self._num_sessions + _SETTLING_STEPS * (self._num_sessions - 1)
        num_tokens = num_steps * (pace.num_tokens / pace.num_steps if pace else _USUAL_TOKENS)
        lost = max(0.0, num_tokens * (self._expected(gait) - self._expected(self.gait)))
        return lost + (self._reading.usual_seconds * self._num_sessions**2 if self.gait is Gait.OFF else 0.0)

    def _evidence(self, gait: Gait) -> int:
        pace = self._paces.observed(self._gaits.trees[gait])
        return pace.observed if pace else 0

    def _pace(self, gait: Gait) -> Pace | None:
        """When it is known."""
        return self._paces.known(self._gaits.trees[gait])

    def _expected(self, gait: Gait) -> float:
        """Seconds per token: as observed, or else as predicted, by the scale of the gait that is observed best."""
        if (pace := self._pace(gait)) is not None:
            return pace.seconds_per_token
        known = {each: pace for each in self._gaits.trees if (pace := self._pace(each)) is not None}
        if not known:
            return self._gaits.predicted[gait]
        best = max(known, key=self._evidence)
        return known[best].seconds_per_token * self._gaits.predicted[gait] / self._gaits.predicted[best]


def _num_trial_steps(gait: Gait) -> int:
    return _PLAIN_TRIAL_STEPS if gait is Gait.OFF else _TRIAL_STEPS


def _gains(gait: Gait, pace: Pace, now: Pace) -> bool:
    gain = now.seconds_per_token - pace.seconds_per_token
    error = math.hypot(now.standard_error, pace.standard_error)
    least = _STANDARD_ERRORS_OFF if gait is Gait.OFF else _STANDARD_ERRORS
    return gain > max(_LEAST_GAIN * now.seconds_per_token, least * error)
