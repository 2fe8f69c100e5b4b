"""The decoder of CUDA graphs: the lean decoder's logits, in whatever shapes it computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import load_engine
from tiny_models import READABLE_ARCHITECTURES, write_tiny_model
from torch import Tensor

from sequoia.engine import graphs_decoder
from sequoia.engine.attention import Segment, chunk_segment, tree_segment
from sequoia.engine.forwards import Engine
from sequoia.engine.graphs_decoder import GraphsDecoder
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.lean_decoder import LeanDecoder
from sequoia.errors import InvalidArgument
from sequoia.topology import TokenTree, Topology

# Wider and deeper than the sliding window of the tiny models (with the prompt before it).
SHAPE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 7, 8))


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 250, count).tolist()


TREE = TokenTree(SHAPE, tuple(random_tokens(SHAPE.size, seed=2)))


@pytest.fixture(scope="module", params=READABLE_ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(path, request.param)
    return path


def decoder(engine: Engine) -> GraphsDecoder:
    assert isinstance(engine._decoder, GraphsDecoder)
    return engine._decoder


def prefill(engine: Engine, slot: KVSlot, tokens: list[int]) -> None:
    engine.forward([chunk_segment(slot, tokens, logits=False)])
    slot.keep(range(len(tokens)))


@torch.inference_mode()
def some_logits(engine: Engine) -> list[Tensor]:
    """Of ragged sessions in one forward: trees, a chunk, a token; then of rows that were kept, and of a wide chunk."""
    cache = engine.cache
    with cache.slot() as a, cache.slot() as b, cache.slot() as c, cache.slot() as d:
        for slot, length in ((a, 3), (b, 31), (c, 18), (d, 1)):
            prefill(engine, slot, random_tokens(length, seed=length))
        batch = [
            tree_segment(a, (), TREE),
            tree_segment(b, (8, 9), TREE),
            chunk_segment(c, random_tokens(40, seed=7), logits=True),
            chunk_segment(d, [9], logits=True),
        ]
        found = engine.forward(batch)
        b.keep([0, 1, 2, 3, 6, 9])
        found += engine.forward([chunk_segment(b, [77], logits=True), tree_segment(a, (), TREE)])
        found += engine.forward([chunk_segment(c, random_tokens(150, seed=8), logits=True)])
    return found


def test_logits_are_the_lean_decoders(folder: Path) -> None:
    found, expected = (some_logits(load_engine(folder, engine=engine)) for engine in ("graphs", "lean"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)
        assert theirs.std() > 0.1, "logits this flat prove nothing"


@torch.inference_mode()
def test_tokens_that_only_the_device_knows_are_tokens_like_others(folder: Path) -> None:
    for name in ("graphs", "lean"):
        engine = load_engine(folder, engine=name)
        with engine.cache.slot() as a, engine.cache.slot() as b:
            prefill(engine, a, random_tokens(20, seed=1))
            segments = [tree_segment(a, (4, 5), TREE), chunk_segment(b, [1, 2, 3], logits=True)]
            expected = engine.forward(segments)
            unread = [Segment(**{**vars(each), "token_ids": torch.tensor(each.token_ids)}) for each in segments]
            for ours, theirs in zip(engine.forward(unread), expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_tiny_model(path, "llama")
    return path


@torch.inference_mode()
def test_what_earlier_sessions_left_in_a_slot_is_never_read(llama: Path) -> None:
    found = []
    for rubbish in (0.0, torch.nan):
        engine = load_engine(llama, engine="graphs")
        for pools in engine.cache.rows:
            for pool in pools:
                pool[:, : engine.cache.scratch_row + 1] = rubbish
        found.append(some_logits(engine))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@torch.inference_mode()
def test_a_bucket_is_captured_once_and_their_number_is_bounded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_decoder, "_MOST_GRAPHS", 2)
    engine, expected = load_engine(llama, engine="graphs"), load_engine(llama, engine="lean")
    for width in (3, 4, 4, 3, 9, 20, 10, 2):
        tokens = random_tokens(width, seed=width)
        with engine.cache.slot() as ours, expected.cache.slot() as theirs:
            [found] = engine.forward([chunk_segment(ours, tokens, logits=True)])
            [wanted] = expected.forward([chunk_segment(theirs, tokens, logits=True)])
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)
    assert [bucket.num_tokens for bucket in decoder(engine)._captured] == [4, 16]


def test_low_precision_errs_like_the_lean_decoder(llama: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        found, expected = (some_logits(load_engine(llama, dtype=dtype, engine=name)) for name in ("graphs", "lean"))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).float().square().mean().sqrt() < 0.02 * theirs.float().std()


def test_on_the_cpu_it_runs_when_asked_for(llama: Path) -> None:
    assert isinstance(load_engine(llama)._decoder, LeanDecoder)
    assert isinstance(load_engine(llama, engine="graphs")._decoder, GraphsDecoder)


def test_deterministic_graphs_are_refused_by_name(llama: Path) -> None:
    with pytest.raises(InvalidArgument, match="use lean") as caught:
        load_engine(llama, engine="graphs", deterministic=True)
    assert caught.value.field == "engine"
