"""The one thread that owns a model: it packs what the sessions want next into one forward after another."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sequoia.engine.attention import PackedBatch, Segment
from sequoia.engine.kv_cache import KVCache

Result = TypeVar("Result")

# A job is plain Python that yields the segment it wants forwarded next and receives that segment's logits,
# (wanted tokens, vocabulary) in the model's dtype. Jobs of several sessions share forwards without knowing it.
Job = Generator[Segment, Tensor, Result]


class Engine:
    """A model with its KV cache. `forward` is called by one thread only."""

    def __init__(self, module: nn.Module, cache: KVCache, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._device, self._dtype = module, device, dtype
        self.cache = cache
        self.num_forwards = 0
        self.num_forward_tokens = 0

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        """One forward over all segments. Returns each segment's logits, (wanted tokens, vocabulary)."""
        batch = PackedBatch(segments, self._device, self._dtype)
        self.cache.write_rows = batch.write_rows
        output = self._module(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=batch.logit_tokens,
            packed_batch=batch,
        )
        self.num_forwards += 1
        self.num_forward_tokens += batch.token_ids.shape[1]
        return list(output.logits[0].split([len(s.logit_tokens) for s in segments]))


class _Task(Generic[Result]):
    """A job on its way: what it wants forwarded next, and who waits for its result."""

    def __init__(self, job: Job[Result], *, is_idle: bool) -> None:
        self.job, self.is_idle = job, is_idle
        self.future: Future[Result] = Future()
        self.wanted: Segment | None = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more."""
        return self.future.cancelled()

    def advance(self, logits: Tensor | None) -> bool:
        """Run the job to its next forward. False when it has ended."""
        try:
            self.wanted = self.job.send(logits) if logits is not None else next(self.job)
            return True
        except StopIteration as end:
            self._finish(self.future.set_result, end.value)
        except Exception as error:  # noqa: BLE001 - it belongs to the one who awaits the job
            self.fail(error)
        return False

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        self.job.close()
        self._finish(self.future.set_exception, error)

    @staticmethod
    def _finish(settle: Callable[[Any], None], value: object) -> None:
        with suppress(InvalidStateError):  # abandoned at this very moment
            settle(value)


class Executor:
    """Runs jobs on the engine's thread. A context manager: entering starts the thread, leaving ends it.

    Every turn takes the jobs in order of arrival up to `max_forward_tokens` tokens; those left over come first in
    the next turn, so a long prompt, fed in chunks, never stalls the others for more than a forward. Idle jobs have the
    turns that no other job wants.
    """

    engine: Engine

    def __init__(self, max_forward_tokens: int) -> None:
        self._max_forward_tokens = max_forward_tokens
        self._tasks: deque[_Task[Any]] = deque()
        self._idle_tasks: deque[_Task[Any]] = deque()
        self._new: deque[_Task[Any]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Executor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread and wait for it: all of a model's life is spent there.

        A model that is loaded or measured on another thread leaves a second OpenMP pool behind. With more threads than
        cores the pools stop spinning at their barriers, and every later forward takes longer (a draft level: 90 ms
        instead of 60).
        """

        def job() -> Job[Result]:
            return function()
            yield

        return self._submit(job()).result()

    async def run(self, job: Job[Result]) -> Result:
        """The job's result. Cancelling the caller drops the job before its next forward."""
        return await asyncio.wrap_future(self._submit(job))

    def run_idle(self, job: Job[Result]) -> Future[Result]:
        """Run a job while no other wants a forward. Cancelling the future drops it before its next forward.

        A job that is submitted after that finds it as the last forward left it, with that forward's logits used.
        """
        return self._submit(job, is_idle=True)

    def _submit(self, job: Job[Result], *, is_idle: bool = False) -> Future[Result]:
        task = _Task(job, is_idle=is_idle)
        with self._wake:
            self._new.append(task)
            self._wake.notify()
        return task.future

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                turn = self._take_turn()
                if turn:
                    self._forward(turn)

    def _admit(self) -> bool:
        """Wait for work and let new jobs run to their first forward. False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._new or self._tasks or self._idle_tasks or self._stopping)
            if self._stopping:
                return False
            arrived, self._new = self._new, deque()
        for task in arrived:
            if not task.abandoned and task.advance(None):
                self._queue(task).append(task)
        return True

    def _queue(self, task: _Task[Any]) -> deque[_Task[Any]]:
        return self._idle_tasks if task.is_idle else self._tasks

    def _take_turn(self) -> list[_Task[Any]]:
        # On a busy engine they would wait for ever to be found abandoned.
        self._idle_tasks = deque(task for task in self._idle_tasks if not task.abandoned)
        turn: list[_Task[Any]] = []
        num_tokens = 0
        queue = self._tasks or self._idle_tasks
        while queue:
            task = queue[0]
            assert task.wanted is not None
            if task.abandoned:
                queue.popleft().job.close()
                continue
            if turn and num_tokens + task.wanted.num_tokens > self._max_forward_tokens:
                break
            num_tokens += task.wanted.num_tokens
            turn.append(queue.popleft())
        return turn

    def _forward(self, turn: list[_Task[Any]]) -> None:
        try:
            logits = self.engine.forward([task.wanted for task in turn if task.wanted])
        except Exception as error:  # noqa: BLE001 - it belongs to those who await the jobs of this turn
            for task in turn:
                task.fail(error)
            return
        for task, rows in zip(turn, logits, strict=True):
            if task.advance(rows):
                self._queue(task).append(task)
