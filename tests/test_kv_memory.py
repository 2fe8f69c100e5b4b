from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load_engine, needs_native
from tiny_models import write_tiny_model

from sequoia.engine.attention import chunk_segment
from sequoia.engine.executor import Job
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.kv_memory import KVMemory, Run, Tokens
from sequoia.engine.sampling import RandomChoices
from sequoia.errors import ResourceExhausted
from sequoia.rules import GREEDY
from sequoia.sampling import Decoding, Sampling
from verify_worker.verifier import VerifyLimits, VerifySession

NUM_ROWS = 400
PROMPT = tuple(range(3, 43))


class Pool:
    """A pool whose row holds the tokens up to it: what a row of keys and values follows from."""

    def __init__(self, memory: KVMemory) -> None:
        self.memory, self.rows = memory, [()] * NUM_ROWS

    def adopt(self, run: Run) -> None:
        if run.source is not None:
            self.rows[run.start : run.start + run.num_shared] = self.rows[run.source.start :][: run.num_shared]
            run.length = run.num_shared
            self.memory.copied(run)

    def make(self, run: Run, tokens: Tokens) -> None:
        """Rows for all tokens that have none, as a forward writes them, and some of a tree behind them."""
        assert len(tokens) <= run.num_rows
        for row in range(run.length, len(tokens)):
            self.rows[run.start + row] = tokens[: row + 1]
        for row in range(len(tokens), run.num_rows):
            self.rows[run.start + row] = ("a tree's",)
        run.length = len(tokens)

    def session(self, tokens: Tokens, num_rows: int) -> Run:
        run = self.memory.take(num_rows, tokens)
        run.tokens = tokens
        self.adopt(run)
        self.make(run, tokens)
        return run


@pytest.fixture
def pool() -> Pool:
    return Pool(KVMemory(NUM_ROWS))


@pytest.mark.parametrize("seed", range(20))
def test_every_session_has_the_rows_of_its_own_tokens_whatever_comes_and_goes(pool: Pool, seed: int) -> None:
    chance = random.Random(seed)
    running: list[tuple[Run, Tokens]] = []
    prompts = [tuple(chance.randrange(2) for _ in range(60)) for _ in range(3)]
    for _ in range(300):
        if running and chance.random() < 0.5:
            run, tokens = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.8:  # else it is cancelled before its first forward
                pool.adopt(run)
                pool.make(run, tokens)
            assert pool.rows[run.start : run.start + run.length] == [tokens[: n + 1] for n in range(run.length)]
            pool.memory.leave(run)
            continue
        tokens = chance.choice(prompts)[: chance.randint(1, 60)] + tuple(
            chance.choices(range(9), k=chance.randint(1, 40))
        )
        try:
            run = pool.memory.take(len(tokens) + chance.randint(0, 60), tokens)
        except ResourceExhausted:
            continue
        run.tokens = tokens  # which it has before it has their rows
        assert run.num_shared < len(tokens)
        others = [other for other, _ in running]
        assert all(run.end <= other.start or other.end <= run.start for other in others)
        assert run.end <= NUM_ROWS
        if chance.random() < 0.5:
            pool.adopt(run)
            pool.make(run, tokens)
        running.append((run, tokens))
    assert pool.memory.num_reused > 0


def test_the_next_turn_goes_on_in_the_very_rows_of_the_last_one(pool: Pool) -> None:
    first = pool.session(PROMPT, 60)
    pool.memory.leave(first)
    second = pool.memory.take(200, (*PROMPT, 1, 2, 3))
    assert (second.start, second.num_shared, second.length, second.source) == (first.start, 40, 40, None)


def test_what_a_running_session_has_made_is_copied(pool: Pool) -> None:
    first = pool.session(PROMPT, 60)
    second = pool.memory.take(60, (*PROMPT[:30], 1, 2, 3))
    assert (second.source, second.num_shared, second.length) == (first, 30, 0)


def test_the_last_token_is_always_made_anew(pool: Pool) -> None:
    pool.memory.leave(pool.session(PROMPT, 60))
    assert pool.memory.take(60, PROMPT).num_shared == len(PROMPT) - 1


def test_a_short_beginning_in_common_is_not_worth_it(pool: Pool) -> None:
    pool.session(PROMPT, 60)
    assert pool.memory.take(60, (*PROMPT[:15], 1, 2)).num_shared == 0


def test_the_longest_unused_goes_first(pool: Pool) -> None:
    texts = [(n, *PROMPT) for n in range(4)]
    runs = [pool.session(text, 100) for text in texts]
    for run in runs:
        pool.memory.leave(run)
    pool.memory.leave(pool.memory.take(60, (*texts[0], 1)))
    pool.memory.take(300)
    assert [pool.memory.take(41, text).num_shared for text in texts[:2]] == [40, 0]


def test_what_is_still_to_be_copied_is_not_given_away(pool: Pool) -> None:
    first = pool.session(PROMPT, 100)
    second = pool.memory.take(100, (*PROMPT, 1))
    pool.memory.leave(first)
    with pytest.raises(ResourceExhausted, match="KV memory for 300 tokens is needed, and 300 of 400 are free"):
        pool.memory.take(300)
    pool.adopt(second)
    pool.memory.leave(second)
    assert pool.memory.take(300).num_rows == 300


def test_nothing_is_forgotten_for_a_session_that_does_not_fit_anyway(pool: Pool) -> None:
    pool.memory.leave(pool.session(PROMPT, 100))
    pool.memory.take(200)
    with pytest.raises(ResourceExhausted, match="kv-tokens"):
        pool.memory.take(399)
    assert pool.memory.take(60, (*PROMPT, 1)).num_shared == 40


def test_sessions_share_nothing_where_that_is_off() -> None:
    pool = Pool(KVMemory(NUM_ROWS, reuses=False))
    pool.session(PROMPT, 60)
    pool.memory.leave(pool.session(PROMPT, 60))
    assert pool.memory.take(60, PROMPT).num_shared == 0
    assert pool.memory.num_sessions == 2


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", pytest.param("native", marks=needs_native)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp(request.param)
    is_native = request.param == "native"
    write_tiny_model(folder, "llama" if is_native else request.param)
    return load_engine(folder, slot_rows=128, dtype="bfloat16" if is_native else "float32")


@torch.inference_mode()
def logits(engine: Engine, slot: KVSlot, tokens: Tokens) -> torch.Tensor:
    slot.adopt()
    [found] = engine.forward([chunk_segment(slot, tokens[slot.length :], logits=True)])
    slot.keep(range(len(tokens) - slot.length))
    slot.made_from(tokens)
    return found


@pytest.mark.parametrize("is_running", [True, False], ids=["of a running session", "of an ended one"])
def test_logits_behind_reused_rows_are_those_behind_own_ones(engine: Engine, is_running: bool) -> None:
    engine.cache.memory = KVMemory(engine.cache.num_session_rows)
    longer = (*PROMPT, 7, 8, 9)
    with engine.cache.slot() as slot:
        expected = logits(engine, slot, longer)
    engine.cache.memory = KVMemory(engine.cache.num_session_rows)
    with engine.cache.slot(PROMPT) as first:
        logits(engine, first, PROMPT)
        if is_running:
            with engine.cache.slot(longer) as second:
                found = logits(engine, second, longer)
    if not is_running:
        with engine.cache.slot(longer) as second:
            found = logits(engine, second, longer)
    assert engine.cache.memory.num_reused == 40
    torch.testing.assert_close(found, expected, atol=0.0 if engine.can_grow else 1e-4, rtol=0)


def test_a_job_that_ends_after_its_session_changes_nothing_for_the_next_one(engine: Engine) -> None:
    """A client that is gone in the middle of a forward, and asks the same again before that forward has ended."""
    engine.cache.memory = KVMemory(engine.cache.num_session_rows)
    longer, decoding = (*PROMPT, 7, 8, 9), Decoding(GREEDY, Sampling(temperature=0.0), len(PROMPT))
    limits = VerifyLimits(prefill_chunk=64, vocab_size=400)
    with engine.cache.slot() as slot:
        expected = logits(engine, slot, longer)
    engine.cache.memory = KVMemory(engine.cache.num_session_rows)
    with engine.cache.slot(PROMPT) as left:
        session = VerifySession(left, PROMPT, decoding, RandomChoices(np.random.default_rng(0)), limits, 100)
        logits(engine, left, PROMPT[:-1])
        job = session.verify(session.root_only)
        [answer] = engine.forward([next(job)])  # type: ignore[list-item]
    with engine.cache.slot(longer) as slot:
        assert slot.first_row == left.first_row
        for _ in job_to_its_end(job, answer):
            pytest.fail("it wants another forward")
        assert slot.adopt() == slot.length == len(PROMPT) - 1
        found = logits(engine, slot, longer)
    torch.testing.assert_close(found, expected, atol=1e-4 if not engine.can_grow else 0.0, rtol=0)


def job_to_its_end(job: Job[Any], answer: torch.Tensor) -> Iterator[object]:
    with torch.inference_mode(), suppress(StopIteration):
        yield job.send(answer)


def test_a_segment_cannot_reach_into_another_session_s_rows(engine: Engine) -> None:
    with engine.cache.slot(num_rows=4) as slot, pytest.raises(AssertionError, match="another session"):
        chunk_segment(slot, range(5), logits=True)
