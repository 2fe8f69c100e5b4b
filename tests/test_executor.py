"""One thread for several engines: they take turns in order of arrival, and a forward is of one engine only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import write_tiny_model
from torch import Tensor

from sequoia.engine.attention import TREE_ATTENTION, Segment, chunk_segment, register
from sequoia.engine.decoder import TransformersDecoder
from sequoia.engine.executor import EngineThread, Executor, Job
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.sources import resolve
from sequoia.worker import feed

TOKENS = tuple(range(20, 44))
CHUNK = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_model(folder, "llama")
    register()
    return load_model(resolve(str(folder)), dtype="float32", device="cpu", attn_implementation=TREE_ATTENTION)


@dataclass
class Diary:
    """Every forward: its engine, and the slots that shared it."""

    forwards: list[tuple[str, int]] = field(default_factory=list)


class WatchedEngine(Engine):
    """An engine that keeps a diary."""

    def __init__(self, name: str, model: LoadedModel, diary: Diary) -> None:
        cache = KVCache(model.module.config.num_hidden_layers, num_slots=3, slot_rows=64)
        super().__init__(TransformersDecoder(model.module), cache, model.device, model.dtype)
        self._name, self._diary = name, diary

    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        self._diary.forwards.append((self._name, len(segments)))
        return super().forward(segments)


class Pair:
    """Two engines on one thread, which is busy until `release` is set, so that arrivals have an order."""

    def __init__(self, model: LoadedModel, thread: EngineThread, max_forward_tokens: int) -> None:
        self.diary, self.release, self._is_busy = Diary(), threading.Event(), threading.Event()
        self.a, self.b = (Executor(thread, max_forward_tokens) for _ in range(2))
        self.a.engine, self.b.engine = (WatchedEngine(name, model, self.diary) for name in "ab")

    async def arrive(self, *jobs: tuple[Executor, Job[Tensor]]) -> list[asyncio.Task[Tensor]]:
        """The jobs in this order, all before the thread comes to any of them."""
        self._gate = asyncio.create_task(self.a.run(self._wait()))
        assert await asyncio.to_thread(self._is_busy.wait, 20)
        tasks = [asyncio.create_task(executor.run(job)) for executor, job in jobs]
        await asyncio.sleep(0)  # they are submitted now, in this order
        return tasks

    def _wait(self) -> Job[Tensor]:
        self._is_busy.set()
        assert self.release.wait(20)
        return torch.zeros(())
        yield


@contextmanager
def pair_of(model: LoadedModel, max_forward_tokens: int = 64) -> Iterator[Pair]:
    with EngineThread() as thread:
        yield Pair(model, thread, max_forward_tokens)


@contextmanager
def slots(*executors: Executor) -> Iterator[list[KVSlot]]:
    """A slot of each one's engine."""
    with ExitStack() as stack:
        yield [stack.enter_context(executor.engine.cache.slot()) for executor in executors]


def prefill(slot: KVSlot) -> Job[Tensor]:
    """Three forwards."""
    yield from feed(slot, TOKENS[: 2 * CHUNK], CHUNK)
    logits = yield chunk_segment(slot, TOKENS[2 * CHUNK :], logits=True)
    return logits[-1].clone()


async def test_two_engines_take_turns_and_only_one_engine_s_jobs_share_a_forward(model: LoadedModel) -> None:
    with pair_of(model) as pair, slots(pair.a, pair.b, pair.a, pair.b) as (a1, b1, a2, b2):
        tasks = await pair.arrive(
            (pair.a, prefill(a1)), (pair.b, prefill(b1)), (pair.a, prefill(a2)), (pair.b, prefill(b2))
        )
        pair.release.set()
        found = await asyncio.gather(*tasks)
    assert pair.diary.forwards == [("a", 2), ("b", 2)] * 3
    assert all((logits - found[0]).abs().max() < 1e-3 for logits in found)


async def test_the_engine_of_the_longest_waiting_job_comes_first(model: LoadedModel) -> None:
    with pair_of(model, max_forward_tokens=CHUNK) as pair, slots(pair.a, pair.b, pair.a) as (a1, b, a2):
        tasks = await pair.arrive((pair.a, prefill(a1)), (pair.b, prefill(b)), (pair.a, prefill(a2)))
        pair.release.set()
        await asyncio.gather(*tasks)
    # A full forward holds one job: a1, b, a2, and again.
    assert pair.diary.forwards == [("a", 1), ("b", 1), ("a", 1)] * 3


async def test_a_cancelled_job_of_one_engine_does_not_disturb_the_other(model: LoadedModel) -> None:
    with pair_of(model) as pair, slots(pair.a, pair.b) as (a, b):
        cancelled, kept = await pair.arrive((pair.a, prefill(a)), (pair.b, prefill(b)))
        cancelled.cancel()
        await asyncio.sleep(0)
        pair.release.set()
        logits = await kept
    assert pair.diary.forwards == [("b", 1)] * 3
    with pair_of(model) as alone, slots(alone.b) as (b,):
        alone.release.set()
        assert torch.equal(await alone.b.run(prefill(b)), logits)


async def test_a_job_whose_session_has_ended_writes_no_rows_though_nobody_has_cancelled_it_yet(
    model: LoadedModel,
) -> None:
    with pair_of(model) as pair, slots(pair.a) as [kept]:
        with slots(pair.a) as [left]:
            late, job = await pair.arrive((pair.a, prefill(left)), (pair.a, prefill(kept)))
        pair.release.set()
        await job
        assert (await asyncio.gather(late, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert pair.diary.forwards == [("a", 1)] * 3


async def test_an_engine_that_fails_leaves_the_other_running(model: LoadedModel) -> None:
    def unknown_token(slot: KVSlot) -> Job[Tensor]:
        yield chunk_segment(slot, [10**6], logits=True)
        return torch.zeros(())

    with pair_of(model) as pair, slots(pair.a, pair.b) as (a, b):
        failing, kept = await pair.arrive((pair.a, unknown_token(a)), (pair.b, prefill(b)))
        pair.release.set()
        found = await asyncio.gather(failing, kept, return_exceptions=True)
    assert isinstance(found[0], IndexError)
    assert isinstance(found[1], Tensor)


def test_both_engines_are_called_on_one_thread(model: LoadedModel) -> None:
    with pair_of(model) as pair:
        names = {executor.call(lambda: threading.current_thread().ident) for executor in (pair.a, pair.b)}
    assert len(names) == 1
    assert threading.get_ident() not in names
