"""A request's stream to the verify worker: one that must answer, on whichever worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc

from coordinator.member import Member
from coordinator.pool import Pool
from coordinator.replies import has_times, is_verdict
from coordinator.stream import Opening, exchange
from sequoia.errors import Cancelled, ResourceExhausted, SequoiaError, Unavailable
from sequoia.request_scope import call_metadata
from sequoia.v1 import tree_pb2, verify_pb2, verify_pb2_grpc

# Between two looks for a worker that takes a session.
_LOOK_SECONDS = 0.05
# A verify stream that ends so is lost, and its session goes on elsewhere.
_LOST = (Unavailable, Cancelled)


class VerifyStream:
    """The session on a verify worker: the one with the most room, and when that is lost, another one.

    Where none is there, one is waited for, `failover_seconds` at most. Raises SequoiaError.
    """

    def __init__(self, pool: Pool, opening: Opening, failover_seconds: float) -> None:
        self._pool, self._opening, self._failover_seconds = pool, opening, failover_seconds
        self._member: Member | None = None
        self._call: grpc.aio.StreamStreamCall[verify_pb2.VerifyRequest, verify_pb2.VerifyResponse] | None = None
        self._step = self._vocab_size = 0
        self.num_plain_steps_left = 0
        self.num_bytes = 0

    async def open(self, token_ids: Sequence[int]) -> verify_pb2.VerifyResponse:
        """Prefill and a first verdict, or the next one where the session was elsewhere before.

        Raises Unavailable where no worker takes it, ResourceExhausted where none has room for it.
        """
        message = verify_pb2.VerifyRequest(open=verify_pb2.VerifyOpen(**self._opening.fields(token_ids)))
        problem: SequoiaError | None = None
        give_up = time.monotonic() + self._failover_seconds
        while True:
            self.close()
            if (member := self._pool.best()) is not None:
                self._enter(member)
                try:
                    return await self._ask(message)
                except (Unavailable, ResourceExhausted) as error:
                    problem = error
            if time.monotonic() >= give_up:
                raise problem or self._pool.nobody()
            await asyncio.sleep(_LOOK_SECONDS)

    async def step(
        self, prefix_len: int, tree: tree_pb2.TokenTree | None, num_plain_steps: int
    ) -> verify_pb2.VerifyResponse:
        """The next verdict: of `tree`, or of a plain step, of which the worker may run that many more by itself."""
        if self.num_plain_steps_left:
            assert tree is None, "the worker is already ahead of this tree"
            return await self._ask(None)
        self._step += 1
        message = verify_pb2.VerifyStep(step=self._step, prefix_len=prefix_len, num_plain_steps=num_plain_steps)
        if tree is not None:
            message.tree.CopyFrom(tree)
        return await self._ask(verify_pb2.VerifyRequest(step=message), message.tree.topology.parents)

    def close(self) -> None:
        """End the session, if there is one; the worker frees its KV slot."""
        if self._call is not None and self._member is not None:
            self._call.cancel()
            self._member.leave(self._opening.max_num_tokens)
            self._call = self._member = None

    def _enter(self, member: Member) -> None:
        stub = verify_pb2_grpc.VerifyServiceStub(member.link.channel)
        self._call = stub.Verify(timeout=max(0.0, self._opening.seconds_left), metadata=call_metadata())
        self._member, self._step, self.num_plain_steps_left = member, 0, 0
        # It may be taken for gone while its stream lives.
        self._vocab_size = member.description.vocab_size if member.description else 0
        member.enter(self._opening.max_num_tokens)

    async def _ask(
        self, request: verify_pb2.VerifyRequest | None, parents: Sequence[int] = ()
    ) -> verify_pb2.VerifyResponse:
        """The next verdict, on the tree with these parents or on a plain step."""
        assert self._call is not None
        assert self._member is not None
        member, started = self._member, time.monotonic()
        most_left = request.step.num_plain_steps if request else self.num_plain_steps_left - 1
        # How long an opening takes depends on its prompt: that a worker hangs then is for keepalive to find out.
        has_history = self._step > 0 and self._pool.has_other(member)
        try:
            async with asyncio.timeout(member.hang_seconds if has_history else None):
                response = await exchange(self._call, request)
        except TimeoutError as error:
            raise self._lost(member, f"hangs: nothing for {time.monotonic() - started:.0f} s") from error
        except _LOST as error:
            raise self._lost(member, f"is lost ({error})") from error
        self.num_bytes += response.ByteSize() + (request.ByteSize() if request else 0)
        if request is None:
            self._step += 1
        if response.step != self._step:
            raise self._lost(member, f"answered step {response.step} instead of {self._step}")
        if not has_times(response) or not self._is_verdict(response.verdict, parents):
            raise self._lost(member, "gave a verdict that cannot be one on what it was sent")
        if response.num_plain_steps_left > most_left:
            raise self._lost(member, f"goes on for {response.num_plain_steps_left} steps, and was told {most_left}")
        member.replied(time.monotonic() - started)
        self.num_plain_steps_left = response.num_plain_steps_left
        return response

    def _is_verdict(self, verdict: verify_pb2.Verdict, parents: Sequence[int]) -> bool:
        num_logprobs = self._opening.decoding.sampling.num_logprobs
        return is_verdict(verdict, parents, self._vocab_size, num_logprobs=num_logprobs)

    @staticmethod
    def _lost(member: Member, what: str) -> Unavailable:
        problem = f"the verify worker at {member.link.address} {what}"
        member.failed(problem)
        return Unavailable(problem)
