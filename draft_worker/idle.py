"""What a session's drafter does between an answer and the next message."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType

from draft_worker.account import Account
from draft_worker.drafter import Drafted
from draft_worker.lookup import AnySession
from sequoia.engine.executor import Executor


class IdleTime:
    """Drafts ahead from `begin` to `end`. A context manager: leaving ends it."""

    def __init__(self, executor: Executor, account: Account, session: AnySession, *, has_own_device: bool) -> None:
        self._executor, self._account, self._session = executor, account, session
        self._has_own_device = has_own_device
        self._future: Future[None] | None = None
        self._was_unfinished = False

    def __enter__(self) -> IdleTime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._future is not None:
            self._future.cancel()

    def begin(self) -> None:
        """The session has answered with a tree."""
        if num_guesses := self._account.num_guesses(has_own_device=self._has_own_device):
            self._future = self._executor.run_idle(self._session.draft_ahead(num_guesses))

    def end(self) -> None:
        """A message has arrived: no further forward begins. Raises what drafting ahead failed of."""
        future, self._future = self._future, None
        self._was_unfinished = future is not None and future.cancel()
        if future is not None and not self._was_unfinished:
            future.result()

    def settle(self, drafted: Drafted) -> None:
        """The message was answered with that."""
        self._account.settle(drafted, was_unfinished=self._was_unfinished)
