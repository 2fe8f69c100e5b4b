"""Trees whose shape the draft's scores decide: what is kept, by definition; their laws; the rows they leave behind."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import Context, Enumerator, Laws, padded_law, target_p, total_variation
from safetensors.torch import load_file, save_file
from test_drafter import COOL, PROMPT, Bench, path_tokens
from test_verification import PAIRS, VOCABULARY
from tiny_models import write_tiny_model
from torch import Tensor

from draft_worker.ahead import likely_guesses
from draft_worker.calibrator import Calibrator
from draft_worker.choosing import Level, score_level
from draft_worker.drafter import DraftLimits, DraftSession
from draft_worker.dynamic import DynamicGrowth
from draft_worker.growth import DEAD
from sequoia.engine.children import Calibration
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import Path as TokenPath
from sequoia.engine.verification import walk
from sequoia.errors import InvalidArgument
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DynamicShape, TokenTree, Topology
from sequoia.v1 import coordinator_pb2, draft_pb2, tree_pb2
from sequoia.wire import known_shape, shape_from_wire, shape_to_wire

USUAL = DynamicShape(16, 5, 4)
MODES = {
    "greedy": (GREEDY, COOL),
    "sample_and_walk": (SAMPLE_AND_WALK, Sampling(0.7)),
    "coupled": (COUPLED, Sampling(0.7, top_k=20, seed=5)),
}
# Tokens that a node may have as children with the chance of each, by the tokens that lead to it.
Chances = Callable[[Context], Sequence[tuple[int, float]]]

# ---- the shape ----


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((1, 1, 1), "levels is 1"),
        ((4, 5, 1), "levels is 5"),
        ((4, 2, 0), "width is 0"),
        ((4, 2, 4), "width is 4"),
        ((4, 2, 1, 1.0), "least_chance is 1.0"),
        ((4, 2, 1, 0.5, -0.1), "least_gain is -0.1"),
        ((4, 2, 1, 0.5, math.nan), "least_gain is nan"),
    ],
)
def test_a_dynamic_shape_that_cannot_be_is_refused(sizes: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DynamicShape(*sizes)


def test_a_dynamic_shape_is_cut_to_levels_and_nodes() -> None:
    assert USUAL.truncated(3) == DynamicShape(16, 3, 4)
    assert USUAL.truncated(1) == USUAL.cut_to(1) == Topology.root_only()
    assert USUAL.cut_to(4) == DynamicShape(4, 4, 1)
    assert USUAL.cut_to(64) == USUAL
    assert str(USUAL) == "16x5 dynamic, width 4"


def test_a_cut_shape_is_one_that_the_wire_takes() -> None:
    for size, levels, width, limit in product((2, 5, 40), (2, 3, 9), (1, 4, 12), range(2, 20)):
        if levels <= size and width < size:
            cut = DynamicShape(size, levels, width).cut_to(limit)
            step = draft_pb2.DraftStep(**shape_to_wire(cut))
            assert shape_from_wire(step, GREEDY, limit) == cut


@pytest.mark.parametrize("shape", [USUAL, DynamicShape(8, 4, 2, 0.1, 0.75), Topology((-1, 0, 0, 1))])
def test_shapes_survive_the_wire(shape: DynamicShape | Topology) -> None:
    assert shape_from_wire(draft_pb2.DraftStep(**shape_to_wire(shape)), GREEDY, 64) == shape
    assert known_shape(coordinator_pb2.TreeUsage(**shape_to_wire(shape))) == shape
    assert known_shape(coordinator_pb2.RealisedPace(**shape_to_wire(shape))) == shape


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ((0, 0, 0), "dynamic.size"),
        ((65, 5, 4), "dynamic.size"),
        ((16, 1, 4), "dynamic.levels"),
        ((16, 17, 4), "dynamic.levels"),
        ((16, 5, 0), "dynamic.width"),
        ((16, 5, 16), "dynamic.width"),
        ((64, 16, 5), "dynamic.width"),  # 71 rows
        ((16, 5, 4, 1.5), "dynamic.least_chance"),
        ((16, 5, 4, 0.1, math.inf), "dynamic.least_gain"),
    ],
)
def test_what_is_wrong_with_a_dynamic_shape_is_told_by_its_field(sizes: tuple[Any, ...], field: str) -> None:
    names = ("size", "levels", "width", "least_chance", "least_gain")
    step = draft_pb2.DraftStep(dynamic=tree_pb2.DynamicShape(**dict(zip(names, sizes, strict=False))))
    with pytest.raises(InvalidArgument, match=f"^{field}"):
        shape_from_wire(step, GREEDY, 64)


@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL])
def test_rules_whose_children_are_drawn_refuse_dynamic_shapes(rule: Rule) -> None:
    message = coordinator_pb2.Speculation(**shape_to_wire(USUAL))
    with pytest.raises(InvalidArgument, match=r"^speculation\.dynamic: .* only with a shape that is known"):
        shape_from_wire(message, rule, 64, "speculation.")


# ---- what is kept, from chances that are given ----


def level_of(growth: DynamicGrowth, chances: Chances) -> Level:
    """What a draft would say of the frontier's nodes."""
    rows = [chances(growth.tree().path_tokens(node)) for node in growth.frontier]
    children = tuple(tuple(token for token, _ in row) for row in rows)
    return Level(children, tuple(() for _ in rows), scores=tuple(tuple(math.log(p) for _, p in row) for row in rows))


def grown(shape: DynamicShape, chances: Chances) -> DynamicGrowth:
    growth = DynamicGrowth(shape, (0,), Calibration(1.0, 1.0))
    while growth.frontier:
        growth.add(level_of(growth, chances))
    return growth


def random_chances(seed: int, *, coarse: bool) -> Chances:
    """Five children a node; of coarse chances many products are equal."""

    def chances(context: Context) -> Sequence[tuple[int, float]]:
        generator = np.random.default_rng([seed, *context])
        weights = 2.0 ** generator.integers(0, 3, 5) if coarse else generator.random(5) ** 3
        weights = np.sort(weights)[::-1]
        return list(zip(generator.permutation(50).tolist(), (weights / weights.sum()).tolist(), strict=False))

    return chances


def by_definition(shape: DynamicShape, chances: Chances) -> set[Context]:
    """The paths of the tree: beam search, every candidate remembered, and the best of all at the end."""
    candidates: list[tuple[float, int, Context]] = []  # minus the score, the order of proposal, path
    beam: list[tuple[float, Context]] = [(0.0, ())]
    for _ in range(shape.levels - 1):
        fresh = []
        for score, path in beam:
            for token, p in chances(path):
                fresh.append((-(score + math.log(p)), len(candidates) + len(fresh), (*path, token)))
        candidates += fresh
        best = sorted(sorted(fresh)[: shape.width], key=lambda each: each[1])
        beam = [(-negative, path) for negative, _, path in best]
    return {path for *_, path in sorted(candidates)[: shape.size - 1]}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_tree_is_the_best_of_all_that_a_beam_search_proposed(seed: int, coarse: bool) -> None:
    chances = random_chances(seed, coarse=coarse)
    for shape in (USUAL, DynamicShape(6, 5, 4), DynamicShape(30, 4, 2), DynamicShape(9, 9, 1), DynamicShape(40, 3, 39)):
        tree = grown(shape, chances).tree()
        assert {tree.path_tokens(node) for node in range(1, tree.topology.size)} == by_definition(shape, chances)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_ancestors_and_likelier_siblings_of_what_is_kept_are_kept(seed: int, coarse: bool) -> None:
    chances = random_chances(seed, coarse=coarse)
    tree = grown(USUAL, chances).tree()
    assert tree.topology.size == USUAL.size
    assert tree.topology.levels <= USUAL.levels
    for node in tree.topology.internal_nodes:
        tokens = [tree.token_ids[child] for child in tree.topology.children[node]]
        assert tokens == [token for token, _ in chances(tree.path_tokens(node))][: len(tokens)]
    depths = [tree.topology.depths[node] for node in tree.topology.internal_nodes]
    assert max(map(depths.count, depths)) <= USUAL.width


def test_a_child_as_likely_as_its_parent_never_displaces_it() -> None:
    """Chances of 1 make the scores of a whole path equal."""
    tree = grown(DynamicShape(4, 4, 3), lambda context: [(7, 1.0)]).tree()
    assert (tree.topology, tree.token_ids) == (Topology.chain(4), (0, 7, 7, 7))
    tree = grown(DynamicShape(3, 3, 2), lambda context: [(7, 0.5), (8, 0.5)] if not context else [(9, 1.0)]).tree()
    assert tree.token_ids == (0, 7, 8)


def test_nodes_that_are_forwarded_and_dropped_leave_dead_rows() -> None:
    """Of two likely children the first has unlikely ones and the second likely ones, which displace the first's."""
    table = {(): [(1, 0.5), (2, 0.4), (3, 0.1)], (1,): [(4, 0.5), (5, 0.5)], (2,): [(6, 0.99)], (2, 6): [(8, 0.99)]}
    growth = grown(DynamicShape(5, 5, 2), lambda context: table.get(context, [(9, 0.9)]))
    tree = growth.tree()
    assert {tree.path_tokens(node) for node in range(1, 5)} == {(1,), (2,), (2, 6), (2, 6, 8)}
    rows = [tree.path_tokens(node) if node != DEAD else None for node in growth.forwarded]
    assert rows == [(1,), (2,), (2, 6)]
    table[2, 6] = [(8, 0.3)]
    growth = grown(DynamicShape(4, 4, 2), lambda context: table.get(context, [(9, 0.9)]))
    assert growth.tree().token_ids == (0, 1, 2, 6)
    table[()] = [(1, 0.4), (2, 0.35), (3, 0.25)]
    table[1,], table[1, 4], table[2,] = [(4, 0.9)], [(7, 0.99)], [(6, 0.98)]
    growth = grown(DynamicShape(4, 4, 2), lambda context: table.get(context, [(9, 0.9)]))
    tree = growth.tree()
    assert [tree.path_tokens(node) for node in range(1, 4)] == [(1,), (1, 4), (1, 4, 7)]
    assert [tree.path_tokens(node) if node != DEAD else None for node in growth.forwarded] == [(1,), None, (1, 4)]
    assert growth.rows_for((1, 4, 7)) == [0, 2]


def test_growth_ends_when_nothing_could_be_displaced_any_more() -> None:
    flat = random_chances(0, coarse=True)
    assert grown(DynamicShape(2, 2, 1), flat).num_levels_grown == 1
    # A full tree in which only the unlikeliest node could have children is left as it is.
    chances: Chances = lambda context: [(1, 0.9), (2, 0.1)] if not context else [(3, 0.1), (4, 0.05)]  # noqa: E731
    growth = grown(DynamicShape(4, 4, 3), chances)
    assert growth.tree().token_ids == (0, 1, 2, 3)
    assert growth.num_levels_grown == 2


def test_unlikely_nodes_are_left_out_and_levels_that_gain_too_little_are_not_grown() -> None:
    """A chain of tokens that are taken nine times in ten, each beside one that is taken once in ten."""
    chances: Chances = lambda context: [(1, 0.9), (2, 0.1)]  # noqa: E731

    def paths(shape: DynamicShape) -> set[Context]:
        tree = grown(shape, chances).tree()
        return {tree.path_tokens(node) for node in range(tree.topology.size)}

    likely = {(), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)}
    # 0.9 ** 4 is 0.66.
    assert paths(DynamicShape(32, 5, 2, least_chance=0.3)) == likely
    assert paths(DynamicShape(32, 5, 2, least_chance=0.7)) == likely - {(1, 1, 1, 1)}
    # Nodes of the second level are reached always, of 0.9 and 0.1 with two a level; only of 0.9 with one.
    assert grown(DynamicShape(32, 16, 1, 0.0, 0.7), chances).num_levels_grown == 4
    assert grown(DynamicShape(32, 5, 2, 0.0, 0.7), chances).num_levels_grown == 4
    assert grown(DynamicShape(32, 16, 1, 0.0, 0.95), chances).num_levels_grown == 1
    assert paths(DynamicShape(4, 4, 1, least_chance=0.95)) == {()}


# ---- against a model without a cache ----


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A model that is surer of itself than a random one, so that its trees are no stars."""
    folder: Path = tmp_path_factory.mktemp("draft")
    write_tiny_model(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 4.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Bench(folder)


class Unlearnt(Calibrator):
    """What was drafted before changes no score."""

    def learn(self, decoding: Decoding, growth: DynamicGrowth, tokens: tuple[int, ...]) -> None:
        pass


@contextmanager
def session(bench: Bench, mode: str, *, reads_once: bool = False) -> Iterator[DraftSession]:
    rule, sampling = MODES[mode]
    limits = DraftLimits(prefill_chunk=8, vocab_size=400, reads_once=reads_once, calibrator=Unlearnt())
    with bench.engine.cache.slot() as slot:
        yield DraftSession(slot, Decoding(rule, sampling, 1), np.random.default_rng(0), limits, 200)


def scores(mode: str, logits: Tensor, position: int) -> list[tuple[float, int]]:
    """Of all tokens that may be children, the best first: by definition, from one row of logits (vocabulary,)."""
    rule, sampling = MODES[mode]
    ids = logits.argsort(descending=True, stable=True)[: sampling.top_k or 256]
    logs = logits[ids].double() / (sampling.temperature or 1.0)
    if rule is COUPLED:
        assert sampling.seed is not None
        logs = (logs + gumbel_noise(sampling.seed, position, ids)) * sampling.temperature / 0.8
    return sorted(zip(logs.log_softmax(0).tolist(), ids.tolist(), strict=True), reverse=True)


@pytest.mark.parametrize("mode", MODES)
def test_with_room_for_all_it_is_the_best_first_tree_of_the_models_own_scores(bench: Bench, mode: str) -> None:
    """A heap of paths, over logits of `transformers`: no level is ever looked at as a whole."""
    shape = DynamicShape(16, 5, 15)
    heap: list[tuple[float, Context]] = [(0.0, ())]
    expected: dict[Context, float] = {}
    while len(expected) < shape.size:
        negative, path = heapq.heappop(heap)
        expected[path] = -negative
        if len(path) < shape.levels - 1:
            ranked = scores(mode, bench.logits((*PROMPT, *path)), len(PROMPT) + len(path))
            for score, token in ranked[: shape.size - 1]:
                heapq.heappush(heap, (negative - score, (*path, token)))
    with session(bench, mode) as drafting:
        drafting.commit(0, PROMPT)
        tree = bench.run(drafting.grow(shape)).tree
    assert tree.topology.levels > 2
    assert {tree.path_tokens(node) for node in range(tree.topology.size)} == set(expected)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_dynamic_tree_that_came_true_serve_the_next_one(bench: Bench, mode: str) -> None:
    """Every tree is that of a session that was opened with the same tokens and has nothing to keep."""
    with session(bench, mode) as drafting:
        committed = PROMPT
        drafting.commit(0, committed)
        for node, others in ((9, (77,)), (15, (78, 79, 80)), (0, (5,)), (4, (91,)), (12, (3,))):
            tree = bench.run(drafting.grow(USUAL)).tree
            with session(bench, mode) as fresh:
                fresh.commit(0, committed)
                assert tree == bench.run(fresh.grow(USUAL)).tree
            news = (*path_tokens(tree, min(node, tree.topology.size - 1)), *others)
            drafting.commit(len(committed), news)
            committed += news


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_reads_once_grows_dynamic_trees_level_by_level(bench: Bench, mode: str) -> None:
    trees = []
    for reads_once in (False, True):
        with session(bench, mode, reads_once=reads_once) as drafting:
            drafting.commit(0, PROMPT)
            trees.append(bench.run(drafting.grow(USUAL)).tree)
    assert trees[0] == trees[1]


def test_a_dynamic_tree_costs_at_most_a_forward_a_level_of_at_most_its_width(bench: Bench) -> None:
    with session(bench, "greedy") as drafting:
        drafting.commit(0, PROMPT)
        bench.run(drafting.prefill())
        before = bench.engine.num_forwards, bench.engine.num_forward_tokens
        bench.run(drafting.grow(USUAL))
        forwards, tokens = (
            after - since
            for after, since in zip((bench.engine.num_forwards, bench.engine.num_forward_tokens), before, strict=True)
        )
    assert forwards == USUAL.levels - 1
    assert USUAL.levels - 1 < tokens <= USUAL.num_rows


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_a_verdict_that_was_guessed_is_answered_with_the_dynamic_tree_without_a_forward(
    bench: Bench, mode: str
) -> None:
    """Step after step, although rows of dropped nodes lie between those that matter."""
    num_dropped = 0
    with session(bench, mode) as drafting:
        committed = PROMPT
        drafting.commit(0, committed)
        tree = bench.run(drafting.grow(USUAL)).tree
        for number in (0, 1, 1, 0, 1):
            assert drafting._last is not None
            num_dropped += max(0, drafting._last.forwarded.count(DEAD) - 1)
            bench.run(drafting.draft_ahead(2))
            news = guessed(bench, mode, committed, tree, number)
            drafting.commit(len(committed), news)
            committed += news
            before = bench.engine.num_forwards
            drafted = bench.run(drafting.grow(USUAL))
            assert (drafted.hit, bench.engine.num_forwards) == (number, before)
            with session(bench, mode) as fresh:
                fresh.commit(0, committed)
                assert drafted.tree == bench.run(fresh.grow(USUAL)).tree
            tree = drafted.tree
    assert num_dropped, "two dropped nodes in a tree are what could be miscounted"


def guessed(bench: Bench, mode: str, committed: tuple[int, ...], tree: TokenTree, number: int) -> tuple[int, ...]:
    """The tokens of one of the likeliest verdicts, from the model without a cache."""
    guess = likely_guesses(tree.topology, 2)[number]
    path = path_tokens(tree, guess.node)
    ranked = scores(mode, bench.logits((*committed, *path)), len(committed) + len(path))
    return (*path, ranked[len(tree.topology.children[guess.node]) + guess.spare][1])


def test_children_that_are_drawn_are_never_scored() -> None:
    decoding = Decoding(SEQUOIA, Sampling(0.7), 1)
    with pytest.raises(AssertionError, match="must not be chosen among"):
        score_level(torch.zeros(1, 8), decoding, [TokenPath((1,), 1, ())], [3], 1.0)


# ---- how sharply the scores tell ----


@pytest.mark.parametrize("true", [0.0625, 0.25, 1.0])
@pytest.mark.parametrize(("rule", "sampling"), [(GREEDY, COOL), (COUPLED, Sampling(0.7, seed=5))])
def test_sharpness_is_learnt_from_what_the_target_chose(rule: Rule, sampling: Sampling, true: float) -> None:
    """Targets whose choices have the chances of the logits by a sharpness that nobody tells."""
    decoding, calibrator, generator = Decoding(rule, sampling, 1), Calibrator(), np.random.default_rng(1)
    first = calibrator.value(decoding).sharpness
    for _ in range(400):
        logits = np.sort(generator.normal(0.0, 1.0, 6))[::-1]
        chances = torch.from_numpy(logits / (true * first)).softmax(0).numpy()
        growth = grown(DynamicShape(7, 2, 6), lambda _, law=chances: list(enumerate(law.tolist(), start=1)))  # type: ignore[misc]
        growth.calibration = Calibration(true * first, 1.0)
        calibrator.learn(decoding, growth, (1 + int(generator.choice(6, p=chances)),))
    assert calibrator.value(decoding).sharpness == pytest.approx(true * first, rel=0.5)
    assert calibrator.value(decoding).hit > 0.99


def test_nothing_is_learnt_where_the_target_draws_freely() -> None:
    growth = grown(DynamicShape(3, 2, 2), lambda context: [(1, 0.6), (2, 0.4)])
    calibrator, decoding = Calibrator(), Decoding(SAMPLE_AND_WALK, Sampling(0.7), 1)
    for token in (1, 2, 9):
        calibrator.learn(decoding, growth, (token,) * 1)
    assert calibrator.value(decoding) == Calibration(0.7, 1.0)


def test_choices_that_the_draft_did_not_rank_make_every_level_less_likely() -> None:
    growth = grown(DynamicShape(3, 2, 2), lambda context: [(1, 0.6), (2, 0.4)])
    calibrator, decoding = Calibrator(), Decoding(GREEDY, COOL, 1)
    before = calibrator.value(decoding)
    for index in range(1000):
        calibrator.learn(decoding, growth, (9 if index % 5 == 0 else 1,))
    found = calibrator.value(decoding)
    assert found.sharpness < before.sharpness
    assert found.hit == pytest.approx(0.8, abs=0.03)
    chances: Chances = lambda context: [(1, 1.0)]  # noqa: E731
    shape = DynamicShape(32, 16, 1, 0.0, 0.5)
    growth = DynamicGrowth(shape, (0,), found)
    while growth.frontier:
        growth.add(level_of(growth, chances))
    # 0.8 ** 3 is above 0.5, and 0.8 ** 4 below.
    assert growth.num_levels_grown == 4


def test_a_draft_that_never_ranks_what_is_chosen_still_grows_trees() -> None:
    growth = grown(DynamicShape(3, 2, 2), lambda context: [(1, 0.6), (2, 0.4)])
    calibrator, decoding = Calibrator(), Decoding(GREEDY, COOL, 1)
    for _ in range(30_000):
        calibrator.learn(decoding, growth, (9,))
    growth = DynamicGrowth(DynamicShape(3, 2, 2), (0,), calibrator.value(decoding))
    growth.add(level_of(growth, lambda context: [(1, 0.6), (2, 0.4)]))
    assert growth.tree().topology.size == 3


def test_sessions_of_a_draft_learn_together(bench: Bench) -> None:
    limits = DraftLimits(prefill_chunk=8, vocab_size=400)
    decoding = Decoding(GREEDY, COOL, 1)
    before = limits.calibrator.value(decoding).sharpness
    with bench.engine.cache.slot() as slot:
        drafting = DraftSession(slot, decoding, np.random.default_rng(0), limits, 200)
        committed = PROMPT
        drafting.commit(0, committed)
        for _ in range(12):
            tree = bench.run(drafting.grow(USUAL)).tree
            news = (*path_tokens(tree, 1), *path_tokens(tree, 1))  # the likeliest token, always
            drafting.commit(len(committed), news)
            committed += news
        bench.run(drafting.grow(USUAL))
    assert limits.calibrator.value(decoding).sharpness < before


# ---- the law ----


def tree_from_law(shape: DynamicShape, q: Laws) -> TokenTree:
    """Grown from a draft whose q these are, at temperature 1."""
    decoding = Decoding(SAMPLE_AND_WALK, Sampling(1.0), 1)

    def chances(context: Context) -> Sequence[tuple[int, float]]:
        logits = torch.tensor([[float(p) for p in q(context)]]).log()
        level = score_level(logits, decoding, [TokenPath((0,), 1, ())], [VOCABULARY], 1.0)
        return [(token, math.exp(score)) for token, score in zip(level.children[0], level.scores[0], strict=True)]

    return grown(shape, chances).tree()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [DynamicShape(5, 3, 2), DynamicShape(6, 4, 1), DynamicShape(7, 3, 3)], ids=str)
def test_sample_and_walk_keeps_the_targets_law_with_dynamic_trees(shape: DynamicShape, pair: str) -> None:
    """Every outcome of the shipped walk over the tree, with its probability: equal to 1e-12."""
    p, q = PAIRS[pair]
    tree = tree_from_law(shape, q)
    law = target_p(tree, p)

    def emitted(source: Enumerator) -> Context:
        return walk(tree, lambda node: source.draw(law(node))).tokens(tree)

    found = padded_law(tree.topology, p, emitted, VOCABULARY)
    assert total_variation(found, tree.topology, p, VOCABULARY) < 1e-12


def test_the_laws_above_give_trees_of_several_shapes_or_they_prove_little() -> None:
    shapes = {tree_from_law(DynamicShape(6, 4, 1), q).topology for _, q in PAIRS.values()}
    assert len(shapes) > 2
