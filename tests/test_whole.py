"""Trees grown in one call of the C engine: those of the level-by-level path, to the last bit of their rows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load_engine, needs_native
from safetensors.torch import load_file, save_file
from tiny_models import write_narrow_model, write_tiny_model
from torch import Tensor

from draft_worker import mixture
from draft_worker.drafter import DraftLimits, DraftSession
from sequoia.engine.attention import Segment, chunk_segment
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.executor import EngineThread, Executor, Job
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.model import load_model
from sequoia.engine.sources import resolve
from sequoia.engine.spent import Spent, timed
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree, GrownTree, WholeTree
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DynamicShape, TokenTree, Topology, TreeShape
from sequoia.worker import feed

PROMPT = tuple(range(30, 60))
NARROW_TOKENS = [0, 1, *range(25, 390, 2)]  # of the draft that knows some of its target's
SHAPES = {
    "tree": Topology((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    "chain": Topology.chain(6),
    "pair": Topology.chain(2),
    "star": Topology((-1, *[0] * 9)),
    "parents out of order": Topology((-1, 0, 0, 0, 2, 1, 3, 2, 6, 5, 4)),
    "third child goes on": Topology((-1, 0, 0, 0, 3, 3, 3, 6, 4)),
    "wide": Topology((-1, *[0] * 4, *[1] * 3, *[2] * 4, *[4] * 2, 5, 6, 6, 8, 10, 12, 12, 14, 17, 19)),
}
KINDS: dict[str, tuple[Rule, Sampling]] = {
    "greedy": (GREEDY, Sampling(0.0)),
    "sample_and_walk": (SAMPLE_AND_WALK, Sampling(0.9, top_p=0.95)),
    **{
        f"{rule.name} {name}": (rule, replace(sampling, seed=seed))
        for rule, seed in ((COUPLED, 3), (SEQUOIA, None), (TRAVERSAL, 2**64 - 1))
        for name, sampling in {
            "at 1": Sampling(1.0),
            "hot": Sampling(3.0),
            "cold": Sampling(0.05),
            "frozen": Sampling(0.004),
            "top_p": Sampling(0.9, top_p=0.8),
            "top_p, top_k": Sampling(1.2, top_p=0.7, top_k=20),
            "top_p, min_p": Sampling(0.8, top_p=0.9, min_p=0.02),
            "min_p": Sampling(1.0, min_p=0.1),
            "two candidates": Sampling(0.9, top_k=2),
            "one candidate": Sampling(0.9, top_k=1),
        }.items()
    },
    "coupled with the last seed": (COUPLED, Sampling(1.0, seed=2**64 - 1)),
}
DYNAMIC_SHAPES = {
    "two nodes": DynamicShape(2, 2, 1),
    "star": DynamicShape(9, 2, 3),
    "usual": DynamicShape(16, 5, 4),
    "wide": DynamicShape(24, 4, 8),
    "deep": DynamicShape(12, 12, 1),
    "few nodes for so many levels": DynamicShape(5, 5, 4),
    "more than a node may have children": DynamicShape(60, 3, 12),
    "likely nodes only": DynamicShape(24, 8, 4, least_chance=0.02),
    "levels that gain": DynamicShape(24, 8, 4, least_gain=0.3),
}
DYNAMIC_KINDS = [name for name, (rule, _) in KINDS.items() if rule.takes_any_shape]


pytestmark = needs_native


class Grown:
    """A session of an engine of its own, which is drafted for alone: with whole trees, or level by level."""

    def __init__(
        self, engine: Engine, kind: str, *, whole: bool, vocab_size: int = 400, mixes_ngrams: bool = False
    ) -> None:
        self._engine, self._slots, self.generator = engine, ExitStack(), np.random.default_rng(5)
        limits = DraftLimits(8, vocab_size, grows_whole=whole, mixes_ngrams=mixes_ngrams)
        rule, sampling = KINDS[kind]
        self.slot = self._slots.enter_context(engine.cache.slot())
        self.session = DraftSession(self.slot, Decoding(rule, sampling, 1), self.generator, limits, 200)
        self.num_whole = 0

    def __enter__(self) -> Grown:
        return self

    def __exit__(self, *_: object) -> None:
        self._slots.close()

    def grow(self, shape: TreeShape) -> TokenTree:
        tree: TokenTree = self.run(self.session.grow(shape)).tree
        return tree

    def run(self, job: Job[Any]) -> Any:
        answer: Any = None
        with torch.inference_mode():
            while True:
                try:
                    wanted = next(job) if answer is None else job.send(answer)
                except StopIteration as end:
                    return end.value
                self.num_whole += not isinstance(wanted, Segment)
                answer = answered(self._engine, wanted)

    @property
    def shares(self) -> dict[int, float]:
        """What the last step told of how the trie is to be trusted."""
        last = self.session._last
        return last.mixture.shares if last and last.mixture else {}

    def state(self) -> dict[str, Any]:
        """All that a step leaves behind."""
        last = self.session._last
        assert last is not None
        end = self.slot.length + len(last.forwarded)
        rows = [
            each[:, self.slot.first_row : self.slot.first_row + end]
            for pair in self._engine.cache.rows
            for each in pair
        ]
        return {
            "spares": last.spares,
            "forwarded": last.forwarded,
            "levels": last.num_levels_grown,
            "rows": torch.stack(rows).contiguous().view(torch.int16).tolist(),
            "length": self.slot.length,
            "generator": self.generator.bit_generator.state,
            "forwards": (self._engine.num_forwards, self._engine.num_forward_tokens),
        }


def answered(engine: Engine, wanted: Segment | AnyWholeTree) -> Tensor | AnyGrownTree:
    return engine.forward([wanted])[0] if isinstance(wanted, Segment) else engine.grow(wanted)


def used_q(tree: TokenTree) -> list[list[tuple[int, float]]] | None:
    """Ids and weights of what q uses."""
    if tree.q is None:
        return None
    rows = zip(tree.q.token_ids, tree.q.weights, strict=True)
    return [list(zip(ids[weights > 0].tolist(), weights[weights > 0].tolist(), strict=True)) for ids, weights in rows]


# Nodes that are accepted, and what rides along behind them: an inner node, the last one, the root, a child of it.
NEWS = ((4, (77,)), (99, (78, 79)), (0, (5,)), (1, (91,)))


def assert_same_steps(
    engines: tuple[Engine, Engine],
    kind: str,
    shape: TreeShape,
    vocab_size: int = 400,
    *,
    prompt: tuple[int, ...] = PROMPT,
    news_by_step: tuple[tuple[int, tuple[int, ...]], ...] = NEWS,
    mixes_ngrams: bool = False,
) -> list[TokenTree]:
    """Step by step, with some nodes accepted."""
    with (
        Grown(engines[0], kind, whole=True, vocab_size=vocab_size, mixes_ngrams=mixes_ngrams) as ours,
        Grown(engines[1], kind, whole=False, vocab_size=vocab_size, mixes_ngrams=mixes_ngrams) as theirs,
    ):
        for engine in engines:
            engine.num_forwards = engine.num_forward_tokens = 0
        committed, trees = prompt, []
        for each in (ours, theirs):
            each.session.commit(0, committed)
        for step, (node, others) in enumerate(news_by_step):
            tree, expected = ours.grow(shape), theirs.grow(shape)
            assert (tree.topology, tree.token_ids, used_q(tree)) == (
                expected.topology,
                expected.token_ids,
                used_q(expected),
            )
            assert ours.state() == theirs.state()
            assert ours.shares == pytest.approx(theirs.shares, rel=1e-4, abs=1e-6)
            assert bool(ours.shares) == mixes_ngrams
            assert (ours.num_whole, theirs.num_whole) == (step + 1, 0)
            news = (*tree.path_tokens(min(node, tree.topology.size - 1)), *others)
            for each in (ours, theirs):
                each.session.commit(len(committed), news)
            committed += news
            trees.append(tree)
    return trees


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in found:
            found[architecture] = tmp_path_factory.mktemp(architecture)
            if architecture == "narrow":
                write_narrow_model(folder("llama"), found[architecture], NARROW_TOKENS)
            else:
                write_tiny_model(found[architecture], architecture, num_layers=2)
        return found[architecture]

    return folder


def native(folder: Path, quantization: str = "none", num_threads: int = 1) -> Engine:
    files = resolve(str(folder))
    model = load_model(files, dtype="bfloat16", device="cpu")
    is_draft = quantization == "int8"
    arithmetic = Arithmetic("native", quantization, is_draft, num_threads=num_threads)
    decoder = build_decoder(model, arithmetic, 256, files.cache_dir)
    return Engine(decoder, KVCache(2, 4, 256), model.device, model.dtype, vocabulary=model.vocabulary)


DEEP = Topology.chain(20)  # its paths are longer than the sliding windows
MODELS = [
    ("llama", "none"),
    ("llama", "int8"),
    ("qwen2", "none"),
    ("gemma3", "int8"),
    ("gemma3", "none"),
    ("mistral", "none"),
    ("narrow", "int8"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda each: f"{each[0]}-{each[1]}")
def engines(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> tuple[Engine, Engine]:
    architecture, quantization = request.param
    return native(folders(architecture), quantization), native(folders(architecture), quantization)


@pytest.fixture(scope="module")
def sharp_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models that are surer of themselves than random ones: their dynamic trees are not all stars."""
    found: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in found:
            found[architecture] = tmp_path_factory.mktemp(f"sharp-{architecture}")
            if architecture == "narrow":
                write_narrow_model(folder("llama"), found[architecture], NARROW_TOKENS)
                return found[architecture]
            write_tiny_model(found[architecture], architecture, num_layers=2)
            weights = load_file(found[architecture] / "model.safetensors")
            weights["lm_head.weight"] *= 4.0
            save_file(weights, found[architecture] / "model.safetensors", {"format": "pt"})
        return found[architecture]

    return folder


@pytest.fixture(scope="module", params=MODELS, ids=lambda each: f"{each[0]}-{each[1]}")
def sharp_engines(request: pytest.FixtureRequest, sharp_folders: Callable[[str], Path]) -> tuple[Engine, Engine]:
    architecture, quantization = request.param
    return native(sharp_folders(architecture), quantization), native(sharp_folders(architecture), quantization)


@pytest.fixture(scope="module")
def sharp_llama(sharp_folders: Callable[[str], Path]) -> tuple[Engine, Engine]:
    return native(sharp_folders("llama")), native(sharp_folders("llama"))


@pytest.fixture(scope="module")
def llama(folders: Callable[[str], Path]) -> tuple[Engine, Engine]:
    return native(folders("llama")), native(folders("llama"))


# Every step has a match, with one continuation or two; in the third one the trust has been learned.
REPEATING = (*range(30, 42), *range(32, 37), 99, 31, *range(32, 38))
CONTINUED = ((4, (31, 32, 33, 34)), (99, (38, 39, 40)), (0, (34, 35, 36)), (1, (33, 34, 35)))


@pytest.fixture(autouse=True)
def a_trusting_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's continuations are trusted from the first step on: a few steps are all there is."""
    monkeypatch.setattr(mixture, "_PRIOR", (0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5))


def assert_same_mixed_steps(
    engines: tuple[Engine, Engine], kind: str, shape: TreeShape, renamed: Callable[[int], int] = lambda token: token
) -> list[TokenTree]:
    """With a text that repeats itself, and with other trees than without a look at it. `renamed`: its tokens."""
    prompt = tuple(map(renamed, REPEATING))
    news = tuple((node, tuple(map(renamed, others))) for node, others in CONTINUED)
    mixed, plain = (
        assert_same_steps(engines, kind, shape, prompt=prompt, news_by_step=news, mixes_ngrams=mixes)
        for mixes in (True, False)
    )
    assert [tree.token_ids for tree in mixed] != [tree.token_ids for tree in plain]
    assert mixed[0].follow(tuple(map(renamed, (38, 39, 40)))) or kind != "greedy"
    return mixed


@pytest.mark.parametrize("shape", ["tree", "chain", "wide"])
@pytest.mark.parametrize("kind", ["greedy", "sample_and_walk", "coupled top_p", "coupled hot", "sequoia top_p, top_k"])
def test_trees_mixed_with_the_texts_own_continuations_are_those_of_the_levels(
    llama: tuple[Engine, Engine], kind: str, shape: str
) -> None:
    assert_same_mixed_steps(llama, kind, SHAPES[shape])


@pytest.mark.parametrize("shape", ["usual", "wide", "deep"])
@pytest.mark.parametrize("kind", ["greedy", "sample_and_walk", "coupled top_p", "coupled hot"])
def test_dynamic_trees_are_scored_by_the_mixture(sharp_llama: tuple[Engine, Engine], kind: str, shape: str) -> None:
    assert_same_mixed_steps(sharp_llama, kind, DYNAMIC_SHAPES[shape])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *product(
            ("greedy", "sample_and_walk", "coupled cold", "sequoia top_p, top_k"), (SHAPES["tree"], SHAPES["wide"])
        ),
        *product(("greedy", "sample_and_walk", "coupled cold"), (DYNAMIC_SHAPES["usual"], DYNAMIC_SHAPES["wide"])),
    ],
    ids=str,
)
def test_continuations_that_the_draft_does_not_know_are_left_out(
    folders: Callable[[str], Path], kind: str, shape: TreeShape
) -> None:
    """It knows the odd tokens only: what follows the last step's root is one that it knows, or 100."""
    pair = native(folders("narrow")), native(folders("narrow"))
    trees = assert_same_mixed_steps(pair, kind, shape, lambda token: 100 if token == 99 else 2 * token - 29)
    assert all(token in NARROW_TOKENS for tree in trees for token in tree.token_ids[1:])


def test_paths_longer_than_a_sliding_window_are_those_of_the_levels(engines: tuple[Engine, Engine]) -> None:
    assert_same_steps(engines, "greedy", DEEP)


@pytest.mark.parametrize("shape", ["tree", "chain", "third child goes on"])
@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sequoia top_p", "sequoia two candidates"])
def test_steps_are_those_of_the_levels_for_every_model(engines: tuple[Engine, Engine], kind: str, shape: str) -> None:
    assert_same_steps(engines, kind, SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_levels_for_every_rule(llama: tuple[Engine, Engine], kind: str, shape: str) -> None:
    assert_same_steps(llama, kind, SHAPES[shape])


@pytest.mark.parametrize("kind", ["greedy", "coupled at 1", "coupled top_p", "sequoia cold", "sequoia min_p"])
def test_steps_are_those_of_the_levels_for_trees_of_any_shape(llama: tuple[Engine, Engine], kind: str) -> None:
    generator = np.random.default_rng(11)
    for _ in range(12):
        size = int(generator.integers(2, 40))
        parents = [int(generator.integers(node)) for node in range(1, size)]
        assert_same_steps(llama, kind, in_level_order((-1, *parents)))


@pytest.mark.parametrize("shape", DYNAMIC_SHAPES)
@pytest.mark.parametrize("kind", DYNAMIC_KINDS)
def test_dynamic_steps_are_those_of_the_levels_for_every_rule(
    sharp_llama: tuple[Engine, Engine], kind: str, shape: str
) -> None:
    assert_same_steps(sharp_llama, kind, DYNAMIC_SHAPES[shape])


@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sample_and_walk"])
def test_dynamic_steps_are_those_of_the_levels_for_every_model(sharp_engines: tuple[Engine, Engine], kind: str) -> None:
    assert_same_steps(sharp_engines, kind, DYNAMIC_SHAPES["usual"])


def test_dynamic_paths_longer_than_a_sliding_window_are_those_of_the_levels(
    sharp_engines: tuple[Engine, Engine],
) -> None:
    assert_same_steps(sharp_engines, "greedy", DynamicShape(22, 20, 2))


@pytest.mark.parametrize("kind", ["greedy", "coupled at 1", "coupled hot", "sample_and_walk"])
def test_dynamic_steps_are_those_of_the_levels_for_shapes_of_any_size(
    sharp_llama: tuple[Engine, Engine], kind: str
) -> None:
    generator = np.random.default_rng(12)
    for _ in range(12):
        size = int(generator.integers(2, 40))
        shape = DynamicShape(size, int(generator.integers(2, min(size, 9) + 1)), int(generator.integers(1, size)))
        assert_same_steps(sharp_llama, kind, shape)


@pytest.mark.parametrize("kind", ["greedy", "coupled hot"])
def test_padding_of_the_vocabulary_is_never_in_a_dynamic_tree(sharp_llama: tuple[Engine, Engine], kind: str) -> None:
    trees = assert_same_steps(sharp_llama, kind, DYNAMIC_SHAPES["wide"], vocab_size=101)
    assert all(max(tree.token_ids[1:]) < 101 for tree in trees)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_number_of_threads_changes_no_dynamic_tree(sharp_folders: Callable[[str], Path], num_threads: int) -> None:
    pair = native(sharp_folders("llama"), num_threads=num_threads), native(sharp_folders("llama"))
    assert_same_steps(pair, "coupled top_p", DYNAMIC_SHAPES["wide"])


def in_level_order(parents: tuple[int, ...]) -> Topology:
    """The same tree with its nodes numbered level by level."""
    depths = [0] * len(parents)
    for node, parent in enumerate(parents[1:], 1):
        depths[node] = depths[parent] + 1
    order = sorted(range(len(parents)), key=lambda node: depths[node])
    place = {node: index for index, node in enumerate(order)}
    return Topology((-1, *(place[parents[node]] for node in order[1:])))


def test_q_that_runs_out_leaves_nodes_out_and_their_rows_too(llama: tuple[Engine, Engine]) -> None:
    trees = assert_same_steps(llama, "sequoia two candidates", SHAPES["tree"])
    assert trees[0].topology == Topology((-1, 0, 0, 1, 1, 2, 3, 3, 6))
    trees = assert_same_steps(llama, "sequoia one candidate", SHAPES["third child goes on"])
    assert {tree.topology for tree in trees} == {Topology((-1, 0))}


@pytest.mark.parametrize("model", ["llama", "narrow"])
@pytest.mark.parametrize("kind", ["greedy", "coupled hot", "sequoia hot"])
def test_padding_of_the_vocabulary_is_never_proposed(folders: Callable[[str], Path], kind: str, model: str) -> None:
    pair = native(folders(model)), native(folders(model))
    trees = assert_same_steps(pair, kind, SHAPES["wide"], vocab_size=101)
    assert all(max(tree.token_ids[1:]) < 101 for tree in trees)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_few_tokens_grows_them_by_the_ids_of_all(folders: Callable[[str], Path], kind: str) -> None:
    trees = assert_same_steps((native(folders("narrow")), native(folders("narrow"))), kind, SHAPES["wide"])
    assert all(token % 2 or token == 0 for tree in trees for token in tree.token_ids[1:])


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sequoia two candidates"])
def test_number_of_threads_changes_nothing(folders: Callable[[str], Path], kind: str, num_threads: int) -> None:
    pair = native(folders("llama"), num_threads=num_threads), native(folders("llama"))
    assert_same_steps(pair, kind, SHAPES["wide"])


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Tensor]], object]) -> tuple[Engine, Engine]:
    """Engines over the same model with other weights."""
    for each in folder.iterdir():
        (to / each.name).write_bytes(each.read_bytes())
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return native(to), native(to)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_whose_logits_are_no_numbers_end_where_the_levels_have_them_end(
    folders: Callable[[str], Path], tmp_path: Path, llama: tuple[Engine, Engine], kind: str
) -> None:
    first = assert_same_steps(llama, kind, SHAPES["tree"])[0].token_ids[1]

    def break_a_token(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][first] = torch.nan

    engines = edited(folders("llama"), tmp_path, break_a_token)
    with Grown(engines[0], kind, whole=True) as ours, Grown(engines[1], kind, whole=False) as theirs:
        for each in (ours, theirs):
            each.session.commit(0, PROMPT)
        tree, expected = ours.grow(SHAPES["tree"]), theirs.grow(SHAPES["tree"])
        assert (tree.topology, tree.token_ids, used_q(tree)) == (
            expected.topology,
            expected.token_ids,
            used_q(expected),
        )
        assert not tree.topology.children[1]
        assert ours.state() == theirs.state()


@pytest.mark.parametrize("value", [torch.nan, 3e38])
@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sequoia at 1"])
def test_tokens_whose_logits_are_no_numbers(
    folders: Callable[[str], Path], tmp_path: Path, kind: str, value: float
) -> None:
    def break_tokens(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"][[7, 350]] = value

    assert_same_steps(edited(folders("llama"), tmp_path, break_tokens), kind, SHAPES["tree"])


@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sample_and_walk"])
def test_dynamic_trees_end_at_nodes_whose_logits_are_no_numbers(
    sharp_folders: Callable[[str], Path], tmp_path: Path, sharp_llama: tuple[Engine, Engine], kind: str
) -> None:
    whole = assert_same_steps(sharp_llama, kind, DYNAMIC_SHAPES["usual"])[0]
    inner = whole.token_ids[whole.topology.internal_nodes[1]]

    def break_a_token(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][inner] = torch.nan

    tree = assert_same_steps(edited(sharp_folders("llama"), tmp_path, break_a_token), kind, DYNAMIC_SHAPES["usual"])[0]
    assert not tree.topology.children[tree.token_ids.index(inner)]


@pytest.mark.parametrize("value", [torch.nan, 3e38])
@pytest.mark.parametrize("kind", ["greedy", "coupled top_p", "sample_and_walk"])
def test_dynamic_trees_with_tokens_whose_logits_are_no_numbers(
    sharp_folders: Callable[[str], Path], tmp_path: Path, kind: str, value: float
) -> None:
    def break_tokens(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"][[7, 350]] = value

    assert_same_steps(edited(sharp_folders("llama"), tmp_path, break_tokens), kind, DYNAMIC_SHAPES["usual"])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_are_ranked_by_their_ids(folders: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    engines = edited(folders("llama"), tmp_path, make_equal)
    assert_same_steps(engines, kind, SHAPES["wide"])
    if kind in DYNAMIC_KINDS:
        assert_same_steps(engines, kind, DYNAMIC_SHAPES["wide"])


def make_equal(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"][100:] = weights["lm_head.weight"][:100].repeat(3, 1)


def test_sessions_with_company_share_the_forwards_of_their_levels(llama: tuple[Engine, Engine]) -> None:
    with Grown(llama[0], "greedy", whole=True) as ours, llama[0].cache.slot():
        ours.session.commit(0, PROMPT)
        ours.grow(SHAPES["tree"])
        assert ours.num_whole == 0


def test_parameters_that_depend_on_the_path_grow_level_by_level(
    llama: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "penalised", (COUPLED, Sampling(0.9, seed=3, repetition_penalty=1.3)))
    with Grown(llama[0], "penalised", whole=True) as ours:
        ours.session.commit(0, PROMPT)
        ours.grow(SHAPES["tree"])
        assert ours.num_whole == 0


def test_other_engines_grow_no_whole_trees(folders: Callable[[str], Path], llama: tuple[Engine, Engine]) -> None:
    assert llama[0].can_grow
    for name in ("lean", "graphs", "transformers"):
        assert not load_engine(folders("llama"), engine=name).can_grow


# ---- the executor ----


class WatchedEngine(Engine):
    """An engine that keeps a diary, and fails at trees when told to."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine._decoder, KVCache(2, 3, 256), torch.device("cpu"), torch.bfloat16)
        self.diary: list[tuple[str, int]] = []
        self.fails = False

    def forward(self, segments: Any) -> list[Tensor]:
        self.diary.append(("forward", len(segments)))
        return super().forward(segments)

    def grow(self, tree: AnyWholeTree) -> AnyGrownTree:
        self.diary.append(("tree", 1))
        if self.fails:
            raise MemoryError
        return super().grow(tree)


def one_tree(slot: KVSlot) -> Job[list[int]]:
    logits = yield chunk_segment(slot, PROMPT, logits=True)
    slot.keep(range(len(PROMPT)))
    grown = yield WholeTree(slot, SHAPES["tree"], logits, "top", Sampling(0.0), 400, 5)
    return grown.token_ids[0].tolist()


def chunks(slot: KVSlot) -> Job[int]:
    yield from feed(slot, PROMPT, 10)
    return slot.length


async def turns_of(engine: WatchedEngine, *jobs: Callable[[KVSlot], Job[Any]]) -> list[Any]:
    """The jobs' results, or what they failed of; all arrive before the first turn."""
    release = threading.Event()

    def wait() -> Job[None]:
        assert release.wait(20)
        return
        yield

    with EngineThread() as thread, ExitStack() as stack:
        executor = Executor(thread, 80)
        executor.engine = engine
        gate = asyncio.create_task(executor.run(wait()))
        slots = [stack.enter_context(engine.cache.slot()) for _ in jobs]
        tasks = [asyncio.create_task(executor.run(job(slot))) for job, slot in zip(jobs, slots, strict=True)]
        await asyncio.sleep(0)
        release.set()
        await gate
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_whole_tree_has_a_turn_of_its_own_and_others_go_on(folders: Callable[[str], Path]) -> None:
    engine = WatchedEngine(native(folders("llama")))
    found = await turns_of(engine, one_tree, chunks, one_tree)
    assert engine.diary == [("forward", 3), ("tree", 1), ("forward", 1), ("tree", 1), ("forward", 1)]
    assert found[1] == len(PROMPT)
    assert found[0] == found[2]
    num_inner = len(SHAPES["tree"].internal_nodes) - 1
    assert engine.num_forwards == 3 + 2 * 3
    assert engine.num_forward_tokens == 3 * len(PROMPT) + 2 * num_inner


async def test_a_tree_that_fails_is_the_failure_of_its_job_alone(folders: Callable[[str], Path]) -> None:
    engine = WatchedEngine(native(folders("llama")))
    engine.fails = True
    found = await turns_of(engine, one_tree, chunks)
    assert isinstance(found[0], MemoryError)
    assert found[1] == len(PROMPT)


def test_rankings_are_work_and_the_rest_of_a_tree_is_forwards() -> None:
    spent = Spent()

    def job() -> Job[None]:
        yield WholeTree(*[None] * 7)  # type: ignore[arg-type]

    running = timed(job(), spent)
    next(running)
    with pytest.raises(StopIteration):
        running.send(GrownTree(np.empty((0, 1), np.int64), np.empty(0, np.int64), None, 3, ranking_seconds=1000.0))
    assert 1000.0 <= spent.work < 1010.0
    assert -1000.0 <= spent.forwards < -990.0


def test_the_engine_tells_how_long_it_ranked(llama: tuple[Engine, Engine]) -> None:
    with llama[0].cache.slot() as slot, torch.inference_mode():
        job = one_tree(slot)
        segment = next(job)
        assert isinstance(segment, Segment)
        wanted = job.send(llama[0].forward([segment])[0])
        assert isinstance(wanted, WholeTree)
        assert 0.0 < llama[0].grow(wanted).ranking_seconds < 1.0
