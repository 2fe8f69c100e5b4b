"""A draft's distributions mixed with what the text repeats: by hand, and the target's law whatever the mixture is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
import pytest
import reference
import torch
from test_drafter import Bench, path_tokens
from test_exactness import chi_square_z
from tiny_models import write_tiny_model

from draft_worker.choosing import Level, choose_level, score_level
from draft_worker.drafter import DraftLimits, DraftSession
from draft_worker.mixture import Mixture, NgramSource, Trust
from draft_worker.ngram import LONGEST, SHORTEST
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import Path, RandomChoices
from sequoia.engine.trie import NOWHERE, Trie, mix
from sequoia.engine.trie_rows import TrieRows
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DynamicShape, TokenTree, Topology, TreeShape
from verify_worker.verifier import VerifyLimits, VerifySession

# Behind the root 3 (weight 3/4) or 5, behind 3 only 1; 7 lies outside a vocabulary of six.
TRIE = Trie((-1, 0, 0, 0, 1), (2, 3, 5, 7, 1), (1.0, 0.6, 0.3, 0.1, 1.0), (4, 5, 5, 5, 6), (0.5, 0.8, 0.1, 0.1, 0.1))
LOGITS = torch.tensor(
    [[1.0, 0.5, 0.0, -1.0, 2.0, -2.0], [0.0, -1.5, 1.0, 0.5, -0.5, 0.2], [0.3, 0.2, 0.1, 0.0, 1.0, 2.0]]
)
# The root, a node of the trie, and one that is none.
PATHS = tuple(Path((9, 2), 1, drafted) for drafted in ((), (3,), (4,)))
TREE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7))
SMALL = Topology((-1, 0, 0, 1))
DYNAMIC = DynamicShape(12, 5, 3)
REPEATING = (*range(30, 42), *range(30, 38))


def by_hand(temperature: float) -> list[list[float]]:
    """The three mixtures, each with the sum 1."""
    q = (LOGITS.double() / temperature).softmax(1).tolist()
    inside = 0.5 * 0.9
    first = [0.5 * each for each in q[0]]
    first[3] += 0.5 * 0.6
    first[5] += 0.5 * 0.3
    second = [0.2 * each for each in q[1]]
    second[1] += 0.8
    return [[each / (0.5 + inside) for each in first], second, q[2]]


def level(rule: Rule, sampling: Sampling, counts: Sequence[int]) -> Level:
    decoding, generator = Decoding(rule, sampling, 1), np.random.default_rng(3)
    # The root is of another depth than its children: one after the other.
    levels = [
        choose_level(LOGITS[row : row + 1], decoding, [path], [counts[row]], generator, Mixture(TRIE))
        for row, path in enumerate(PATHS)
    ]
    assert all(len(each.children) == 1 for each in levels)
    q = None if levels[0].q is None else levels[0].q
    return Level(tuple(each.children[0] for each in levels), (), q)


def test_nodes_on_the_trie_are_those_whose_whole_path_is() -> None:
    tree = TokenTree(Topology((-1, 0, 0, 0, 1, 1, 3, 4)), (2, 3, 4, 7, 1, 2, 1, 1))
    assert TRIE.nodes_on(tree) == (1, 3, 4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_mixture_is_the_one_computed_by_hand(temperature: float) -> None:
    mixed = Mixture(TRIE).mixed(LOGITS, [path.drafted for path in PATHS], temperature)
    found = (mixed.double() / temperature).softmax(1)
    torch.testing.assert_close(found, torch.tensor(by_hand(temperature), dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_temperature_zero_mixes_as_temperature_one() -> None:
    paths = [path.drafted for path in PATHS]
    assert torch.equal(Mixture(TRIE).mixed(LOGITS, paths, 0.0), Mixture(TRIE).mixed(LOGITS, paths, 1.0))


def test_tokens_and_rows_that_the_trie_says_nothing_of_stay_as_they_are() -> None:
    mixed = Mixture(TRIE).mixed(LOGITS, [path.drafted for path in PATHS], 0.7)
    assert torch.equal(mixed[0, [0, 1, 2, 4]], LOGITS[0, [0, 1, 2, 4]])
    assert torch.equal(mixed[1, [0, 2, 3, 4, 5]], LOGITS[1, [0, 2, 3, 4, 5]])
    assert torch.equal(mixed[2], LOGITS[2])
    assert Mixture(TRIE).mixed(LOGITS, [(4,), (3, 1), (1,)], 0.7) is LOGITS, "leaves say nothing either"


def test_impossible_tokens_stay_impossible_and_broken_rows_broken() -> None:
    banned = np.array([1.0, 0.0, 0.0, -math.inf, 0.0, 0.0], np.float32)
    assert set(mix(banned, TRIE, 0, 1.0)) == {5}
    assert banned[3] == -math.inf
    for broken in (math.nan, math.inf):
        row = np.array([broken, *[0.0] * 5], np.float32)
        assert mix(row, TRIE, 0, 1.0) == {}
        assert row[1:].tolist() == [0.0] * 5


def test_shares_are_the_parts_of_the_probability_that_come_from_the_trie() -> None:
    mixture = Mixture(TRIE)
    mixture.mixed(LOGITS, [path.drafted for path in PATHS], 1.0)
    q = LOGITS[0].double().softmax(0).tolist()
    wanted = {3: 0.3 / (0.3 + 0.5 * q[3]), 5: 0.15 / (0.15 + 0.5 * q[5])}
    assert mixture.shares == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rule", [GREEDY, SAMPLE_AND_WALK])
def test_top_children_are_the_likeliest_of_the_mixture(rule: Rule) -> None:
    sampling = Sampling(0.0 if rule.greedy else 1.0)
    laws = by_hand(1.0)
    wanted = tuple(tuple(sorted(range(6), key=lambda token: -law[token])[:4]) for law in laws)
    assert level(rule, sampling, [4, 4, 4]).children == wanted
    assert [int(row.argmax()) for row in LOGITS] == [4, 2, 5], "the draft's own"
    assert [children[0] for children in wanted] == [3, 1, 5]


@pytest.mark.parametrize("seed", range(20))
def test_coupled_children_win_the_race_of_the_mixture(seed: int) -> None:
    found = level(COUPLED, Sampling(1.3, seed=seed), [3, 3, 3]).children
    for law, path, children in zip(by_hand(1.3), PATHS, found, strict=True):
        races = np.log(law) + gumbel_noise(seed, path.position, torch.arange(6)).numpy()
        assert children == tuple(np.argsort(-races)[:3].tolist())


@pytest.mark.parametrize("rule", [GREEDY, SAMPLE_AND_WALK])
def test_top_children_of_dynamic_trees_are_scored_by_the_mixture(rule: Rule) -> None:
    temperature = 0.0 if rule.greedy else 1.3
    decoding = Decoding(rule, Sampling(temperature, top_k=2), 1)
    for row, law in enumerate(by_hand(temperature or 1.0)):
        found = score_level(LOGITS[row : row + 1], decoding, [PATHS[row]], [4], temperature or 1.0, Mixture(TRIE))
        likeliest = sorted(range(6), key=lambda token: -law[token])[:4]  # nothing is cut
        assert found.children == (tuple(likeliest),)
        assert found.scores[0][:4] == pytest.approx([math.log(law[token]) for token in likeliest], rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_coupled_children_of_dynamic_trees_are_scored_by_the_race_of_the_mixture(seed: int) -> None:
    decoding = Decoding(COUPLED, Sampling(1.3, seed=seed), 1)
    for row, law in enumerate(by_hand(1.3)):
        found = score_level(LOGITS[row : row + 1], decoding, [PATHS[row]], [3], 0.8, Mixture(TRIE))
        races = np.log(law) + gumbel_noise(seed, PATHS[row].position, torch.arange(6)).numpy()
        first = np.argsort(-races)[:3]
        chances = torch.from_numpy(races * 1.3 / 0.8).log_softmax(0)[torch.from_numpy(first)]
        assert found.children == (tuple(first.tolist()),)
        assert found.scores[0][:3] == pytest.approx(chances.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL])
def test_the_q_that_travels_is_the_mixture(rule: Rule) -> None:
    q = level(rule, Sampling(0.8), [2, 2, 2]).q
    assert q is not None
    found = dict(zip(q.token_ids[0].tolist(), (q.weights[0] / q.weights[0].sum()).tolist(), strict=True))
    assert [found[token] for token in range(6)] == pytest.approx(by_hand(0.8)[0], rel=2**-7)


def test_trust_follows_what_only_the_trie_knew() -> None:
    right, wrong, untold = Trust(), Trust(), Trust()
    before = right.of(5)
    for _ in range(200):
        right.learn(5, 0.99)
        wrong.learn(5, 0.0)
        untold.learn(5, untold.of(5))
    assert right.of(5) > 0.9
    assert wrong.of(5) < 0.02
    assert untold.of(5) == pytest.approx(before)
    assert 0.0 < wrong.of(5) < right.of(5) < 1.0
    assert right.of(4) < before
    assert [right.of(length) for length in (LONGEST, LONGEST + 7)] == [right.of(LONGEST)] * 2


def test_trust_finds_the_weight_that_explains_the_tokens_best() -> None:
    """The trie is right 7 of 10 times; the model gives its token 1/4: the likelihood is greatest at a = 3/5."""
    trust, source = Trust(), np.random.default_rng(0)
    found = []
    for _ in range(4000):
        a = trust.of(SHORTEST)
        trust.learn(SHORTEST, a / (a + (1 - a) / 4) if source.random() < 0.7 else 0.0)
        found.append(a)
    assert np.mean(found[1000:]) == pytest.approx(0.6, abs=0.05)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: FilePath = tmp_path_factory.mktemp("mixture")
    write_tiny_model(folder, "llama")
    return Bench(folder)


def limits(*, mixes: bool) -> DraftLimits:
    return DraftLimits(prefill_chunk=8, vocab_size=400, mixes_ngrams=mixes)


def grown(
    bench: Bench, prompt: Sequence[int], sampling: Sampling, shape: TreeShape = TREE, *, mixes: bool
) -> TokenTree:
    rule = GREEDY if sampling.greedy else SEQUOIA
    with bench.engine.cache.slot() as slot:
        decoding = Decoding(rule, sampling, 1)
        session = DraftSession(slot, decoding, np.random.default_rng(0), limits(mixes=mixes), 200)
        session.commit(0, tuple(prompt))
        return bench.run(session.grow(shape)).tree


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.9, top_p=0.9)], ids=str)
def test_a_tree_without_a_match_is_the_models_own_to_the_last_bit(bench: Bench, sampling: Sampling) -> None:
    with_index, without = (grown(bench, range(30, 60), sampling, mixes=mixes) for mixes in (True, False))
    assert with_index.topology == without.topology
    assert with_index.token_ids == without.token_ids
    assert [None if each.q is None else each.q.weights.tobytes() for each in (with_index,)] == [
        None if each.q is None else each.q.weights.tobytes() for each in (without,)
    ]


def test_a_tree_proposes_what_the_text_repeats(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model knows nothing of it: its own probabilities are about 1/400."""
    monkeypatch.setattr("draft_worker.mixture._PRIOR", (0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5))
    for shape in (TREE, DYNAMIC):
        tree = grown(bench, REPEATING, Sampling(0.0), shape, mixes=True)
        assert tree.follow((38, 39, 40, 41))
        assert path_tokens(tree, tree.follow((38, 39, 40))[-1]) == (38, 39, 40)
        assert not grown(bench, REPEATING, Sampling(0.0), shape, mixes=False).follow((38,))


DEVICE_KINDS = {
    "greedy": (GREEDY, Sampling(0.0)),
    "sample_and_walk": (SAMPLE_AND_WALK, Sampling(1.0)),
    "coupled": (COUPLED, Sampling(0.7, top_p=0.9, seed=3)),
    "sequoia": (SEQUOIA, Sampling(0.9, top_k=20)),
}


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_trees_that_are_read_at_once_are_mixed_like_others(bench: Bench, kind: str) -> None:
    """Draws of the two are in another order of the generator's numbers only where a node has no token."""
    rule, sampling = DEVICE_KINDS[kind]
    found = []
    for reads_once in (True, False):
        with bench.engine.cache.slot() as slot:
            own = replace(limits(mixes=True), reads_once=reads_once)
            session = DraftSession(slot, Decoding(rule, sampling, 1), np.random.default_rng(0), own, 200)
            session.commit(0, REPEATING)
            tree = bench.run(session.grow(TREE)).tree
            assert session._last is not None
            assert session._last.mixture is not None
            found.append((tree, session._last.mixture.shares))
    (at_once, shares), (by_level, expected) = found
    assert (at_once.topology, at_once.token_ids) == (by_level.topology, by_level.token_ids)
    assert shares == pytest.approx(expected)
    assert at_once.token_ids != grown(bench, REPEATING, sampling, mixes=False).token_ids


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_rows_on_a_device_are_mixed_like_those_on_the_host(temperature: float) -> None:
    rows = TrieRows.of(TRIE, LOGITS.device)
    below = rows.follow(torch.tensor([0, 0, 0, NOWHERE]), torch.tensor([3, 4, 5, 3]))
    assert below.tolist() == [1, NOWHERE, 2, NOWHERE]
    mixed, shares = rows.mix(LOGITS, torch.tensor([0, 1, NOWHERE]), temperature)
    mixture = Mixture(TRIE)
    expected = mixture.mixed(LOGITS, [path.drafted for path in PATHS], temperature)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed[2], LOGITS[2])
    assert {TRIE.token_ids[i + 1]: each for i, each in enumerate(shares[0].tolist()) if each} == pytest.approx(
        mixture.shares, rel=1e-5
    )


@pytest.mark.parametrize(("news", "is_right"), [((38, 7), True), ((7,), False)])
def test_trust_is_learned_from_the_committed_token(bench: Bench, news: tuple[int, ...], is_right: bool) -> None:
    with bench.engine.cache.slot() as slot:
        decoding = Decoding(GREEDY, Sampling(0.0), 1)
        session = DraftSession(slot, decoding, np.random.default_rng(0), limits(mixes=True), 200)
        session.commit(0, REPEATING)
        bench.run(session.grow(TREE))
        session.commit(len(REPEATING), news)
        bench.run(session.grow(TREE))
        assert session._ngrams is not None
        trust = session._ngrams._trust.of(LONGEST)
    assert (trust > Trust().of(LONGEST)) == is_right
    assert trust != Trust().of(LONGEST)


RULES: dict[str, tuple[Rule, Sampling]] = {
    rule.name: (rule, Sampling(0.8, top_k=3)) for rule in (SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK, COUPLED)
}


class Pair:
    """A drafter and a verifier of one tiny model, and the tokens that they write."""

    def __init__(self, bench: Bench, rule: Rule, sampling: Sampling, shape: TreeShape = SMALL) -> None:
        self._bench, self._decoding, self._shape = bench, Decoding(rule, sampling, len(REPEATING)), shape
        self.num_on_trie = 0

    def write(self, num_tokens: int) -> tuple[int, ...]:
        tokens = list(REPEATING)
        with self._bench.engine.cache.slot() as a, self._bench.engine.cache.slot() as b:
            choices = RandomChoices(np.random.default_rng())
            verify = VerifySession(a, REPEATING, self._decoding, choices, VerifyLimits(8, 400), 200)
            draft = DraftSession(b, self._decoding, np.random.default_rng(), limits(mixes=True), 200)
            while len(tokens) < len(REPEATING) + num_tokens:
                draft.commit(draft.num_committed, tuple(tokens[draft.num_committed :]))
                tree = self._bench.run(draft.grow(self._shape)).tree
                last = draft._last
                self.num_on_trie += last is not None and last.mixture is not None
                tokens += self._bench.run(verify.verify(tree)).tokens(tree)
        return tuple(tokens[len(REPEATING) :][:num_tokens])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, SMALL) for name in RULES),
        *((rule.name, DynamicShape(4, 3, 2)) for rule, _ in RULES.values() if rule.takes_any_shape),
    ],
    ids=str,
)
def test_tokens_of_mixed_trees_have_the_targets_joint_law(bench: Bench, name: str, shape: TreeShape) -> None:
    """Chi-square of 400 triples, cells below 5 expected pooled, z above 3.72: false alarm 1e-4 a rule."""
    rule, sampling = RULES[name]
    draws = 400

    def law(tokens: tuple[int, ...]) -> dict[int, float]:
        p = reference.probabilities(bench.logits((*REPEATING, *tokens)).tolist(), sampling, list(REPEATING), [])
        return {token: mass for token, mass in enumerate(p) if mass > 0.0}

    pairs = {(a, b): pa * pb for a, pa in law(()).items() for b, pb in law((a,)).items()}
    triples = {(*ab, c): p * pc for ab, p in pairs.items() for c, pc in law(ab).items()}
    seeds = [replace(sampling, seed=seed if rule is COUPLED else None) for seed in range(draws)]
    writers = [Pair(bench, rule, each, shape) for each in seeds]
    found = Counter(writer.write(3) for writer in writers)
    assert sum(writer.num_on_trie for writer in writers) >= draws
    assert set(found) <= set(triples)
    assert chi_square_z(found, triples, draws) < 3.72


def test_greedy_text_of_mixed_trees_is_the_plain_one(bench: Bench) -> None:
    plain: list[int] = []
    for _ in range(40):
        plain.append(int(bench.logits((*REPEATING, *plain)).argmax()))
    pair = Pair(bench, GREEDY, Sampling(0.0))
    assert pair.write(40) == tuple(plain)
    assert pair.num_on_trie > 0


def test_guessed_tokens_are_continued_and_not_indexed() -> None:
    source, text = NgramSource(), (*range(30, 40), 1, 2)
    source.extend(text)
    assert source.mixture(text, 3) is None
    guess = source.mixture((*text, 30, 31, 32), 3)
    assert guess is not None
    assert guess.trie.token_ids == (32, 33, 34, 35)
    assert source.mixture(text, 3) is None
