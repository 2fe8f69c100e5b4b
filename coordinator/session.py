"""One request: the loop of verdict, draft, tree, verify."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from coordinator.report import Report
from coordinator.streams import DraftStream, VerifyStream
from coordinator.transcript import Step, Transcript
from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, verify_pb2

# Plain steps the verify worker runs by itself: few while the draft is missing, because it is looked for after them.
_FALLBACK_STEPS = 4
_PLAIN_STEPS = 64


class Session:
    """Owns a request's committed tokens; the workers own only what follows from them."""

    def __init__(
        self,
        transcript: Transcript,
        verify: VerifyStream,
        draft: DraftStream | None,
        topology: Callable[[], Topology],
    ) -> None:
        self._transcript, self._verify, self._draft, self._topology = transcript, verify, draft, topology
        self.report = Report()

    async def run(self) -> AsyncGenerator[Step]:
        """The steps of the answer; the last one has a finish reason. The draft is never awaited before the first."""
        if self._draft is not None:
            self._draft.open(self._transcript.token_ids)
        verdict = await self._verify.open(self._transcript.token_ids)
        self.report.opened()
        draft = None
        while (step := self._commit(draft, verdict)).finish_reason is None:
            yield step
            self.report.host()
            draft, verdict = await self._step()
            self.report.verified(verdict, draft)
        yield step

    async def _step(self) -> tuple[draft_pb2.DraftResponse | None, verify_pb2.VerifyResponse]:
        """One target forward: over a tree where there is one, plain decoding otherwise."""
        prefix_len, most = len(self._transcript.token_ids) - 1, self._transcript.num_tokens_left - 1
        topology = self._topology().truncated(most + 1)
        if self._verify.num_plain_steps_left or self._draft is None or topology.size == 1:
            return None, await self._verify.step(prefix_len, None, min(most, _PLAIN_STEPS))
        draft = await self._draft.tree_or_none(self._transcript.token_ids, topology)
        if draft is None:
            self.report.fell_back(self._draft.reason)
            return None, await self._verify.step(prefix_len, None, min(most, _FALLBACK_STEPS))
        self.report.drafted(draft)
        return draft, await self._verify.step(prefix_len, draft.tree, 0)

    def _commit(self, draft: draft_pb2.DraftResponse | None, response: verify_pb2.VerifyResponse) -> Step:
        accepted = [draft.tree.token_ids[node] for node in response.verdict.accepted_nodes] if draft else []
        verdict = response.verdict
        return self._transcript.commit([*accepted, verdict.bonus_token_id], verdict.logprobs)
