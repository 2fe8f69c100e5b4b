"""One request: the loop of verdict, draft, tree, verify."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from coordinator.draft_stream import DraftStream
from coordinator.fallback import Fallback
from coordinator.gaits import PLAIN
from coordinator.report import Report
from coordinator.request_metrics import RequestMetrics
from coordinator.request_trace import RequestTrace
from coordinator.speculation import Choice, RequestSpeculation
from coordinator.transcript import Step, Transcript
from coordinator.verify_stream import VerifyStream
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.v1 import draft_pb2, verify_pb2

# Plain steps the verify worker runs by itself while the draft is lost or late: few, for it is looked for after them.
_FALLBACK_STEPS = 4

Answers = tuple[draft_pb2.DraftResponse | None, verify_pb2.VerifyResponse]


class Session:
    """Owns a request's committed tokens; the workers own only what follows from them."""

    def __init__(
        self,
        transcript: Transcript,
        verify: VerifyStream,
        draft: DraftStream | None,
        speculation: RequestSpeculation,
        metrics: RequestMetrics | None = None,
        trace: RequestTrace | None = None,
    ) -> None:
        self._metrics = metrics or RequestMetrics()  # one of its own, which nobody reads
        self._transcript, self._verify, self._draft, self._speculation = transcript, verify, draft, speculation
        self._choice, self._was_drafted, self._trace = Choice(PLAIN), False, trace
        self.report = Report(self._metrics)
        self.num_cached_prompt_tokens = 0  # that the verify worker had read for other requests

    async def run(self) -> AsyncGenerator[Step]:
        """The steps of the answer; the last one has a finish reason. The draft is never awaited before the first.

        It reads meanwhile only where that takes nothing of the target's time, and where it is not only tried.
        """
        self._choose(self._transcript.num_tokens_left)
        is_wanted = self._choice.shape != PLAIN and not self._choice.is_tried
        if self._draft is not None and is_wanted and not self._draft.shares_device:
            self._draft.open(self._transcript.token_ids)
        verdict = await self._verify.open(self._transcript.token_ids)
        self.num_cached_prompt_tokens = min(verdict.num_reused_tokens, self._transcript.num_prompt_tokens)
        self.report.opened()
        draft = None
        while (step := self._commit(draft, verdict)).finish_reason is None:
            self.report.host()
            async with _begun(self._step()) as following:
                yield step
                draft, verdict = await following
            self._observe(draft, verdict)
        yield step

    def finish(self) -> Report:
        """The report, complete."""
        message = self.report.message
        message.num_verify_bytes = self._verify.num_bytes
        message.num_draft_bytes = self._draft.num_bytes if self._draft is not None else 0
        message.state, message.state_reason = self._speculation.state, self._speculation.reason
        return self.report

    def close(self) -> None:
        """End both workers' sessions."""
        self._verify.close()
        if self._draft is not None:
            self._draft.close()
            self._metrics.rebuilt("draft", self._draft.num_rebuilds)

    async def _step(self) -> Answers:
        """One target forward: over a tree where there is one, plain decoding otherwise."""
        most = self._transcript.num_tokens_left - 1
        if self._verify.num_plain_steps_left:
            return await self._verified(None, 0)
        self._choose(most + 1)
        shape = self._choice.shape
        if self._draft is None or shape == PLAIN:
            return await self._verified(None, min(most, self._choice.num_plain_steps))
        draft = await self._draft.tree_or_none(self._transcript.token_ids, shape)
        if reading_seconds := self._draft.take_opening_seconds():
            self._speculation.opened(reading_seconds, len(self._transcript.token_ids))
        if draft is None:
            self.report.fell_back(self._draft.reason, self._draft.cause)
            return await self._verified(None, 0 if self._draft.is_opening else min(most, _FALLBACK_STEPS))
        self.report.drafted(draft, reading_seconds)
        self._speculation.drafted(draft.ahead)
        return await self._verified(draft, 0)

    async def _verified(self, draft: draft_pb2.DraftResponse | None, num_plain_steps: int) -> Answers:
        """The verdict on a draft's tree or on a plain step; a plain one, from elsewhere, where the worker is lost or
        refuses the tree: the committed tokens are all that a session is.
        """
        # A draft that has nothing to propose answers with the root alone, which is plain decoding.
        tree = draft.tree if draft is not None and len(draft.tree.token_ids) > 1 else None
        token_ids = self._transcript.token_ids
        try:
            return draft, await self._verify.step(len(token_ids) - 1, tree, num_plain_steps)
        except Unavailable as error:
            self.report.fell_back(str(error), Fallback.VERIFY_LOST)
            self._metrics.rebuilt("verify")
        except InvalidArgument as error:
            if self._draft is None or tree is None:
                raise
            self._draft.refuse(f"refused ({error})")
            self.report.fell_back(self._draft.reason, self._draft.cause)
        return None, await self._verify.open(token_ids)

    def _choose(self, num_tokens_left: int) -> None:
        choice = self._speculation.choose(len(self._transcript.token_ids), num_tokens_left)
        self._choice = replace(choice, shape=choice.shape.truncated(num_tokens_left))

    def _observe(self, draft: draft_pb2.DraftResponse | None, verdict: verify_pb2.VerifyResponse) -> None:
        """A drafted step after a plain one catches up, and a plain one after a drafted one finds the draft's threads
        still spinning; where a tree was chosen and none came, the step waited for it.
        """
        is_drafted = draft is not None
        fell_back = not is_drafted and self._choice.shape != PLAIN
        seconds = self.report.verified(verdict, draft, self._choice.shape)
        usual = not fell_back and is_drafted == self._was_drafted
        self._speculation.observe(self._choice, seconds, len(verdict.verdict.accepted_nodes) + 1, usual=usual)
        self._was_drafted = is_drafted

    def _commit(self, draft: draft_pb2.DraftResponse | None, response: verify_pb2.VerifyResponse) -> Step:
        accepted = [draft.tree.token_ids[node] for node in response.verdict.accepted_nodes] if draft else []
        verdict = response.verdict
        step = self._transcript.commit([*accepted, verdict.bonus_token_id], verdict.logprobs)
        if self._trace is not None:
            self._trace.committed(step, draft, self.report)
        return step


@asynccontextmanager
async def _begun(step: Coroutine[Any, Any, Answers]) -> AsyncIterator[asyncio.Future[Answers]]:
    """A step that goes on while the one before it is written to the client; dropped when the client is gone."""
    task = asyncio.ensure_future(step)
    try:
        yield task
    finally:
        if not task.cancel() and not task.cancelled():
            task.exception()  # whoever awaited it has heard of it, and else nobody is left to
