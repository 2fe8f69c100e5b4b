"""The one thread that owns the models: it packs what a model's sessions want next into one forward after another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import accumulate
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sequoia.engine.attention import Segment
from sequoia.engine.forwards import Engine
from sequoia.engine.gathering import Gathering
from sequoia.engine.tree_logits import HiddenRows
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree

Result = TypeVar("Result")

# A job is plain Python that yields the segment it wants forwarded next and receives that segment's logits,
# (wanted tokens, vocabulary) in the model's dtype. Jobs of several sessions share forwards without knowing it.
# For a whole tree, where the engine `can_grow`, it receives the grown tree; for logits later, hidden rows.
Job = Generator[Segment | AnyWholeTree, Any, Result]


class _Task(Generic[Result]):
    """A job on its way: whose engine it needs, what it wants forwarded next, and who waits for its result."""

    wanted: Segment | AnyWholeTree
    number: int  # in order of arrival

    def __init__(self, executor: Executor, job: Job[Result], *, is_idle: bool) -> None:
        self.executor, self.job, self.is_idle = executor, job, is_idle
        self.future: Future[Result] = Future()

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more, or its session's rows are others' by now."""
        return self.future.cancelled() or self.wanted.slot.is_left

    @property
    def wants_answer(self) -> bool:
        """Whether it wants a tree, or logits, and not only rows of a prompt."""
        return not isinstance(self.wanted, Segment) or bool(self.wanted.logit_tokens)

    def advance(self, answer: Tensor | HiddenRows | AnyGrownTree | None) -> bool:
        """Run the job to its next forward. False when it has ended."""
        try:
            self.wanted = self.job.send(answer) if answer is not None else next(self.job)
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


class EngineThread:
    """The thread that all models of a process share. A context manager: entering starts it, leaving ends it.

    Every turn is one forward of one engine, that of the job which waits longest, so engines take turns. The jobs of
    that engine share the forward in order of arrival as far as they fit; those left over are the longest waiting then,
    so a long prompt, fed in chunks, never stalls the others for more than a forward. Idle jobs have the turns that no
    other job wants. A job of an engine that `lets_others_end` comes after the trees that were begun before it: they are
    to be verified together, instead of one by one with a level of the others' trees in between.

    A model that is loaded, measured or run on another thread leaves a second OpenMP pool behind. With more threads than
    cores the pools stop spinning at their barriers, and every later forward takes longer (a draft level: 90 ms instead
    of 60).
    """

    def __init__(self) -> None:
        self._tasks: list[_Task[Any]] = []
        self._new: list[_Task[Any]] = []
        self._num_submitted = 0
        self._gathering = Gathering()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, task: _Task[Any]) -> None:
        """Put a task behind those that wait."""
        with self._wake:
            task.number = self._num_submitted = self._num_submitted + 1
            self._gathering.came(time.monotonic())
            self._new.append(task)
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                self._drop_abandoned()
                if self._tasks:
                    self._forward(self._take_turn())

    def _admit(self) -> bool:
        """Wait for work and let new jobs run to their first forward. False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._new or self._tasks or self._stopping)
            while not self._stopping and (seconds := self._gathering.seconds_left(time.monotonic())):
                self._wake.wait(seconds)
            if self._stopping:
                return False
            arrived, self._new = self._new, []
        self._tasks.extend(task for task in arrived if not task.future.cancelled() and task.advance(None))
        return True

    def _drop_abandoned(self) -> None:
        waiting, self._tasks = self._tasks, []
        for task in waiting:
            if task.abandoned:
                task.job.close()
                task.future.cancel()
            else:
                self._tasks.append(task)

    def _take_turn(self) -> list[_Task[Any]]:
        waiting = [task for task in self._tasks if not task.is_idle] or self._tasks
        executor = _next(waiting).executor
        turn = executor.fitting([task for task in waiting if task.executor is executor])
        self._tasks = [task for task in self._tasks if task not in turn]
        return turn

    def _forward(self, turn: list[_Task[Any]]) -> None:
        started = time.monotonic()
        try:
            answers = _answers(turn[0].executor.engine, [task.wanted for task in turn])
        except Exception as error:  # noqa: BLE001 - it belongs to those who await the jobs of this turn
            for task in turn:
                task.fail(error)
            return
        going_on = [task for task, answer in zip(turn, answers, strict=True) if task.advance(answer)]
        self._tasks.extend(going_on)
        ended = time.monotonic()
        with self._wake:
            self._gathering.ended(len(turn) - len(going_on), ended - started, ended)


class Executor:
    """Runs the jobs of one engine on the thread, at most `max_forward_tokens` tokens in a forward of several jobs."""

    engine: Engine

    def __init__(self, thread: EngineThread, max_forward_tokens: int, *, lets_others_end: bool = False) -> None:
        self._thread, self._max_forward_tokens = thread, max_forward_tokens
        self.lets_others_end = lets_others_end

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread and wait for it: all of a model's life is spent there."""

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

    def fitting(self, tasks: Sequence[_Task[Any]]) -> list[_Task[Any]]:
        """The first of the tasks, and as many behind it as share its forward; a whole tree shares none."""
        if isinstance(tasks[0].wanted, AnyWholeTree):
            return [tasks[0]]
        sharing = [(task, task.wanted.num_tokens) for task in tasks if isinstance(task.wanted, Segment)]
        totals = accumulate(num_tokens for _, num_tokens in sharing)
        num_fitting = sum(total <= self._max_forward_tokens for total in totals)
        return [task for task, _ in sharing[: max(num_fitting, 1)]]

    def _submit(self, job: Job[Result], *, is_idle: bool = False) -> Future[Result]:
        task = _Task(self, job, is_idle=is_idle)
        self._thread.submit(task)
        return task.future


def _next(waiting: Sequence[_Task[Any]]) -> _Task[Any]:
    """The one that waits longest, or one that it lets go first."""
    first = waiting[0]
    if not first.executor.lets_others_end:
        return first
    others = (task for task in waiting if task.executor is not first.executor and task.number < first.number)
    return next((task for task in others if task.wants_answer), first)


def _answers(engine: Engine, wanted: Sequence[Segment | AnyWholeTree]) -> Sequence[Tensor | HiddenRows | AnyGrownTree]:
    """To several segments, or to one whole tree."""
    if isinstance(wanted[0], AnyWholeTree):
        return [engine.grow(wanted[0])]
    return engine.forward_some([each for each in wanted if isinstance(each, Segment)])
