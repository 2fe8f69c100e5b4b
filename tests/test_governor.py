"""The governor in a simulated world: what steps take and bring is known, and what it makes of that is counted."""

import heapq
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest

from coordinator.gaits import PLAIN, Gait, Gaits
from coordinator.governor import Governor
from coordinator.pace import Pace
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose
from sequoia.topology import Topology

TREE, CHAIN = Topology((-1, 0, 0, 1, 1, 2, 3, 5)), Topology.chain(3)
PLAIN_SECONDS = 0.1


def gaits(first: Gait = Gait.ON, predicted_speedup: float = 1.3) -> Gaits:
    trees = {Gait.ON: TREE, Gait.REDUCED: CHAIN, Gait.OFF: PLAIN}
    predicted = {Gait.ON: 0.1 / predicted_speedup, Gait.REDUCED: 0.1 / (predicted_speedup - 0.05), Gait.OFF: 0.1}
    return Gaits(trees, predicted, first, "as the test says")


@dataclass
class World:
    """Steps with a tree bring 1 to 4 tokens, 2.5 on average; `speedups` say what a token takes then."""

    speedups: dict[Topology, float]
    seed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    seconds_by_tree: dict[Topology, float] = field(default_factory=dict)

    slower: float = 1.0  # than usual, because of a neighbour

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def run(self, governor: Governor, num_tokens: int) -> None:
        end = self.tokens + num_tokens
        while self.tokens < end:
            tree = governor.tree()
            tokens = 1 if tree == PLAIN else int(self.random.integers(1, 5))
            pace = PLAIN_SECONDS * (1.0 if tree == PLAIN else 2.5 / self.speedups[tree])
            seconds = self.slower * pace * self.random.lognormal(sigma=0.05)
            governor.observe(tree, seconds, tokens)
            self.seconds += seconds
            self.tokens += tokens
            self.seconds_by_tree[tree] = self.seconds_by_tree.get(tree, 0.0) + seconds

    def share(self, tree: Topology) -> float:
        return self.seconds_by_tree.get(tree, 0.0) / self.seconds

    @property
    def plain_ratio(self) -> float:
        """What plain decoding would have taken for the same tokens, by what was taken."""
        return self.tokens * PLAIN_SECONDS / self.seconds


@pytest.mark.parametrize("seed", range(5))
def test_speculation_that_keeps_its_promise_goes_on_nearly_all_the_time(seed: int) -> None:
    world, governor = World({TREE: 1.3, CHAIN: 1.2}, seed), Governor(gaits())
    world.run(governor, 20_000)
    assert world.plain_ratio > 1.26
    assert world.share(TREE) > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_speculation_that_loses_is_off_soon_and_costs_about_one_per_cent_in_the_long_run(seed: int) -> None:
    world, governor = World({TREE: 0.7, CHAIN: 0.75}, seed), Governor(gaits())
    world.run(governor, 300)
    assert governor.gait is Gait.OFF
    later = World({TREE: 0.7, CHAIN: 0.75}, seed + 100)
    later.run(governor, 20_000)
    assert later.plain_ratio > 0.985


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("disturbed_tokens", [60, 100, 150])
def test_a_neighbour_that_comes_and_goes_does_not_decide(seed: int, disturbed_tokens: int) -> None:
    world, governor = World({TREE: 0.7, CHAIN: 0.9}, seed), Governor(gaits())
    world.slower = 3.0
    world.run(governor, disturbed_tokens)
    world.slower = 1.0
    world.run(governor, 300)
    assert governor.gait is Gait.OFF
    for _ in range(10):
        world.slower = 3.0 if world.slower == 1.0 else 1.0
        world.run(governor, 100)
        assert governor.gait is Gait.OFF


@pytest.mark.parametrize("seed", range(3))
def test_the_smaller_tree_is_taken_when_only_that_pays(seed: int) -> None:
    world, governor = World({TREE: 0.8, CHAIN: 1.2}, seed), Governor(gaits())
    world.run(governor, 20_000)
    assert governor.gait is Gait.REDUCED
    assert world.plain_ratio > 1.15


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_that_says_off_is_put_to_the_test_and_overruled_when_it_was_wrong(seed: int) -> None:
    world, governor = World({TREE: 1.5, CHAIN: 1.3}, seed), Governor(gaits(Gait.OFF, predicted_speedup=0.95))
    world.run(governor, 3_000)
    assert governor.gait is Gait.ON


@pytest.mark.parametrize("seed", range(3))
def test_speculation_comes_back_when_it_pays_again(seed: int) -> None:
    world, governor = World({TREE: 0.8, CHAIN: 0.8}, seed), Governor(gaits())
    world.run(governor, 1_000)
    assert governor.gait is Gait.OFF
    world.speedups = {TREE: 1.5, CHAIN: 1.4}
    world.run(governor, 20_000)
    assert governor.gait is Gait.ON


def test_a_draft_that_never_answers_ends_a_trial() -> None:
    governor = Governor(gaits(Gait.OFF))
    for _ in range(30):
        governor.observe(PLAIN, PLAIN_SECONDS, 1)
    assert governor.tree() != PLAIN
    for _ in range(64):
        governor.observe(governor.tree(), PLAIN_SECONDS, 1, usual=False)
    assert governor.tree() == PLAIN


def test_what_every_answer_pays_at_its_beginning_belongs_to_the_pace() -> None:
    governor = Governor(gaits())
    governor.observe(TREE, 1.0, 1, usual=False)
    governor.observe(Topology.chain(2), 1.0, 1)
    assert governor.paces[TREE].seconds_per_token == 1.0


def test_what_a_trial_waits_for_does_not() -> None:
    governor = Governor(gaits(Gait.OFF))
    for _ in range(30):
        governor.observe(PLAIN, PLAIN_SECONDS, 1)
    tried = governor.tree()
    governor.observe(tried, 1.0, 1, usual=False)
    assert tried not in governor.paces


@dataclass
class Shared:
    """Sessions that share the forwards of one engine: what a step takes depends on how many of the others draft.

    (among plain sessions, among drafting ones): seconds of a step with a tree, of 2 tokens on average, and of a
    plain one.
    """

    tree: tuple[float, float]
    plain: tuple[float, float]
    num_sessions: int = 16

    def run(self, governor: Governor, num_steps: int, seed: int = 0) -> float:
        """Seconds by those that plain sessions alone had taken for as many tokens."""
        random, drafts, num_tokens, now = (
            np.random.default_rng(seed),
            dict.fromkeys(range(self.num_sessions), False),
            0,
            0.0,
        )
        left, due = (
            dict.fromkeys(range(self.num_sessions), 0),
            [(0.001 * n, n, PLAIN, 0.0) for n in range(self.num_sessions)],
        )
        for _ in range(num_steps):
            now, session, shape, seconds = heapq.heappop(due)
            if seconds:
                tokens = 1 if shape == PLAIN else int(random.integers(1, 4))
                num_tokens += tokens
                # The first step of a kind is not a usual one.
                governor.observe(shape, seconds, tokens, usual=drafts[session] == (shape != PLAIN))
            drafts[session] = shape != PLAIN
            left[session] -= 1
            if left[session] < 0:
                shape = governor.tree()
                left[session] = governor.num_plain_steps if shape == PLAIN else 0
            share = (sum(drafts.values()) - drafts[session]) / (self.num_sessions - 1)
            low, high = self.plain if shape == PLAIN else self.tree
            took = (low + (high - low) * share) * random.lognormal(sigma=0.05)
            heapq.heappush(due, (now + took, session, shape, took))
        return now / (num_tokens * self.plain[0] / self.num_sessions)


# To each session alone a tree pays, whatever the others do; to all together it does not.
DILEMMA = Shared(tree=(0.040, 0.060), plain=(0.023, 0.045))


@pytest.mark.parametrize("seed", range(5))
def test_sessions_that_only_gain_at_the_others_cost_are_decoded_plainly(seed: int) -> None:
    governor = Governor(gaits(), 16)
    DILEMMA.run(governor, 3_000, seed)
    assert governor.gait is Gait.OFF
    assert DILEMMA.run(governor, 20_000, seed) < 1.03


def test_steps_of_single_sessions_would_not_show_it() -> None:
    governor = Governor(gaits(), 1)
    assert DILEMMA.run(governor, 20_000) > 1.04


@pytest.mark.parametrize("seed", range(5))
def test_what_pays_to_all_together_goes_on(seed: int) -> None:
    shared, governor = Shared(tree=(0.030, 0.036), plain=(0.023, 0.035)), Governor(gaits(), 16)
    shared.run(governor, 3_000, seed)
    assert shared.run(governor, 20_000, seed) < 0.82


def test_what_is_paid_before_a_first_step_waits_for_it() -> None:
    governor = Governor(gaits())
    governor.charge(0.5, 20)
    assert governor.paces == {}, "there is no pace without a step"
    governor.observe(TREE, 1.0, 2)
    assert governor.paces[TREE].seconds_per_token == 0.75


@pytest.mark.parametrize("seed", range(3))
def test_what_the_draft_takes_to_read_prompts_counts(seed: int) -> None:
    world, governor = World({TREE: 1.1, CHAIN: 1.05}, seed), Governor(gaits())
    for _ in range(60):
        governor.charge(6 * PLAIN_SECONDS, 20)
        world.run(governor, 24)
    assert governor.gait is Gait.OFF


def gaining(num_sessions: int = 1) -> Governor:
    """Knows that its tree gains 0.02 s a token."""
    world, governor = World({TREE: 1.25, CHAIN: 1.1}), Governor(gaits(), num_sessions)
    world.run(governor, 300 * num_sessions)
    assert governor.gait is Gait.ON
    return governor


def test_a_draft_that_would_read_longer_than_it_gains_is_not_begun() -> None:
    governor = gaining()
    assert governor.pays_to_begin(num_tokens=1_000, num_tokens_left=1), "a draft elsewhere takes nothing"
    governor.charge(0.5, 100)
    assert governor.pays_to_begin(num_tokens=100, num_tokens_left=50)
    assert not governor.pays_to_begin(num_tokens=100, num_tokens_left=5)
    assert not governor.pays_to_begin(num_tokens=1_000, num_tokens_left=50)


def test_a_gait_that_seems_to_gain_nothing_goes_on_until_it_is_left() -> None:
    governor = gaining()
    governor.charge(0.5, 100)
    while governor.gait is Gait.ON and governor.paces[TREE].seconds_per_token < governor.paces[PLAIN].seconds_per_token:
        governor.observe(TREE, 0.26, 2)
    assert governor.gait is Gait.ON
    assert governor.pays_to_begin(num_tokens=100, num_tokens_left=50)


def test_while_one_reads_all_sessions_wait() -> None:
    alone, among_others = gaining(), gaining(4)
    for governor in (alone, among_others):
        governor.charge(0.8, 100)
    assert alone.pays_to_begin(num_tokens=100, num_tokens_left=50)
    assert not among_others.pays_to_begin(num_tokens=100, num_tokens_left=50)


def test_before_anything_is_known_drafts_are_begun() -> None:
    governor = Governor(Gaits.unplanned(TREE, CHAIN))
    governor.charge(0.5, 100)
    assert governor.pays_to_begin(num_tokens=100, num_tokens_left=50)
    assert not governor.pays_to_begin(num_tokens=100, num_tokens_left=2)


def test_a_trial_is_paid_for_with_what_the_drafts_read() -> None:
    plain_steps = []
    for reading_seconds in (0.0, 0.01):
        governor, steps = Governor(replace(gaits(Gait.OFF), reading_seconds=reading_seconds)), 0
        while governor.tree() == PLAIN:
            governor.observe(PLAIN, PLAIN_SECONDS, 1)
            steps += 1
        plain_steps.append(steps)
    assert plain_steps[1] >= plain_steps[0] + 0.64 / (0.01 * PLAIN_SECONDS) - 24


@pytest.mark.parametrize("num_sessions", [1, 16])
def test_plain_sessions_run_on_by_themselves_until_a_trial_comes_near(num_sessions: int) -> None:
    governor = Governor(replace(gaits(Gait.OFF), reading_seconds=0.01), num_sessions)
    lengths = []
    while governor.tree() == PLAIN:
        governor.observe(PLAIN, PLAIN_SECONDS, 1)
        lengths.append(governor.num_plain_steps)
    settled = lengths[16 * num_sessions :]
    assert settled[0] == 64
    assert all(later <= sooner + 1 for sooner, later in pairwise(settled[:-1]))
    assert settled[-2] <= 4


@pytest.mark.parametrize("seed", range(3))
def test_short_answers_whose_beginnings_eat_the_gain_are_decoded_plainly(seed: int) -> None:
    world, governor = World({TREE: 1.1, CHAIN: 1.05}, seed), Governor(gaits())
    for _ in range(60):
        if governor.tree() != PLAIN:
            governor.observe(governor.tree(), 6 * PLAIN_SECONDS, 1, usual=False)
        world.run(governor, 24)
    assert governor.gait is Gait.OFF


def test_a_new_plan_with_the_same_trees_changes_nothing_and_one_with_others_is_followed() -> None:
    world, governor = World({TREE: 0.5, CHAIN: 0.5}), Governor(gaits())
    world.run(governor, 1_000)
    governor.follow(gaits(predicted_speedup=1.4))
    assert governor.gait is Gait.OFF
    other = Gaits({Gait.ON: Topology.chain(4), Gait.OFF: PLAIN}, {Gait.ON: 0.05, Gait.OFF: 0.1}, Gait.ON, "another")
    governor.follow(other)
    assert (governor.gait, governor.reason) == (Gait.ON, "another")
    assert governor.paces == {}


def test_gaits_follow_from_a_plan() -> None:
    fast, slow = LatencyCurve((1, 16), (0.01, 0.01)), LatencyCurve((1, 16), (0.1, 0.12))
    plan = choose(PlanInputs(((0.6, 0.2),), verify_curve=slow, draft_curve=fast))
    of_plan = Gaits.of(plan)
    assert plan.best_tree is not None
    assert plan.reduced is not None
    assert of_plan.trees == {Gait.ON: plan.best_tree.shape, Gait.REDUCED: plan.reduced.shape, Gait.OFF: PLAIN}
    assert of_plan.first is Gait.ON
    assert Gaits.of(choose(PlanInputs(((0.6, 0.2),), slow, slow))).first is Gait.OFF


def test_a_pace_is_the_ratio_of_sums_and_its_error_that_of_independent_steps() -> None:
    random, paces = np.random.default_rng(0), []
    for _ in range(400):
        pace = Pace()
        for _ in range(300):
            pace.add(0.2 * random.lognormal(sigma=0.1), int(random.integers(1, 5)))
        paces.append((pace.seconds_per_token, pace.standard_error))
    values, errors = np.array(paces).T
    assert values.mean() == pytest.approx(0.2 * np.exp(0.005) / 2.5, rel=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)
