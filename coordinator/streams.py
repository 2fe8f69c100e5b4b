"""A request's streams to two workers: one that must answer, on whichever worker, and one that may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from coordinator.member import Member
from coordinator.pool import Pool
from sequoia.errors import Cancelled, DeadlineExceeded, ResourceExhausted, SequoiaError, Unavailable
from sequoia.rpc import error_from
from sequoia.sampling import Decoding
from sequoia.topology import TreeShape
from sequoia.v1 import draft_pb2, draft_pb2_grpc, tree_pb2, verify_pb2, verify_pb2_grpc
from sequoia.wire import rule_to_wire, sampling_to_wire, shape_to_wire

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

# Between two looks for a worker that takes a session.
_LOOK_SECONDS = 0.05
# A verify stream that ends so is lost, and its session goes on elsewhere.
_LOST = (Unavailable, Cancelled)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session needs, besides its tokens, to start on a worker or to start there again."""

    decoding: Decoding
    max_num_tokens: int  # the prompt's and all that may be generated
    deadline: float  # of the request, by the monotonic clock

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def fields(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The fields that both workers' opening messages have."""
        return {
            "token_ids": token_ids,
            "num_prompt_tokens": self.decoding.num_prompt_tokens,
            "sampling": sampling_to_wire(self.decoding.sampling),
            "rule": rule_to_wire(self.decoding.rule),
            "max_num_tokens": self.max_num_tokens,
        }


class VerifyStream:
    """The session on a verify worker: the one with the most room, and when that is lost, another one.

    Where none is there, one is waited for, `failover_seconds` at most. Raises SequoiaError.
    """

    def __init__(self, pool: Pool, opening: Opening, failover_seconds: float) -> None:
        self._pool, self._opening, self._failover_seconds = pool, opening, failover_seconds
        self._member: Member | None = None
        self._call: grpc.aio.StreamStreamCall[verify_pb2.VerifyRequest, verify_pb2.VerifyResponse] | None = None
        self._step = 0
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
        return await self._ask(verify_pb2.VerifyRequest(step=message))

    def close(self) -> None:
        """End the session, if there is one; the worker frees its KV slot."""
        if self._call is not None and self._member is not None:
            self._call.cancel()
            self._member.leave(self._opening.max_num_tokens)
            self._call = self._member = None

    def _enter(self, member: Member) -> None:
        stub = verify_pb2_grpc.VerifyServiceStub(member.link.channel)
        self._call = stub.Verify(timeout=max(0.0, self._opening.seconds_left))
        self._member, self._step, self.num_plain_steps_left = member, 0, 0
        member.enter(self._opening.max_num_tokens)

    async def _ask(self, request: verify_pb2.VerifyRequest | None) -> verify_pb2.VerifyResponse:
        assert self._call is not None
        assert self._member is not None
        member, started = self._member, time.monotonic()
        # How long an opening takes depends on its prompt: that a worker hangs then is for keepalive to find out.
        has_history = self._step > 0 and self._pool.has_other(member)
        try:
            async with asyncio.timeout(member.hang_seconds if has_history else None):
                response = await _exchange(self._call, request)
        except TimeoutError as error:
            problem = (
                f"the verify worker at {member.link.address} hangs: nothing for {time.monotonic() - started:.0f} s"
            )
            member.failed(problem)
            raise Unavailable(problem) from error
        except _LOST as error:
            member.failed(str(error))
            raise Unavailable(f"the verify worker at {member.link.address} is lost ({error})") from error
        self.num_bytes += response.ByteSize() + (request.ByteSize() if request else 0)
        if request is None:
            self._step += 1
        if response.step != self._step:
            member.failed("answers another step than it was asked")
            raise Unavailable(f"{member.link.address} answered step {response.step} instead of {self._step}")
        member.replied(time.monotonic() - started)
        self.num_plain_steps_left = response.num_plain_steps_left
        return response


class DraftStream:
    """The session on a draft worker. Never raises and never holds a step up for longer than `reply_timeout_seconds`.

    Whatever goes wrong is a missing tree: the step is decoded plainly, and the session is opened again, elsewhere where
    there is another worker, from the committed tokens. `reason` tells what happened last.
    """

    def __init__(self, pool: Pool, opening: Opening, reply_timeout_seconds: float, *, verify_device_id: str) -> None:
        self._pool, self._opening, self._verify_device_id = pool, opening, verify_device_id
        self._reply_timeout_seconds = reply_timeout_seconds
        self._member: Member | None = None
        self._call: grpc.aio.StreamStreamCall[draft_pb2.DraftRequest, draft_pb2.DraftResponse] | None = None
        self._pending: asyncio.Task[draft_pb2.DraftResponse] | None = None
        self._acknowledged = self._num_sent = 0
        self._step = 0
        self.num_bytes = 0
        self.reason = ""

    @property
    def is_opening(self) -> bool:
        """Whether the session is being opened: the draft reads the prompt, and will soon be there."""
        return self._call is not None and self._pending is not None and not self._step

    def open(self, token_ids: Sequence[int]) -> None:
        """Start opening the session where there is room; nothing waits for it."""
        if (member := self._pool.best()) is None or member.description is None:
            return
        message = draft_pb2.DraftOpen(
            **self._opening.fields(token_ids),
            has_own_device=member.description.device_id != self._verify_device_id,
        )
        stub = draft_pb2_grpc.DraftServiceStub(member.link.channel)
        self._call, self._member = stub.Draft(timeout=max(0.0, self._opening.seconds_left)), member
        member.enter(self._opening.max_num_tokens)
        self._step, self._acknowledged, self._num_sent = 0, 0, len(token_ids)
        self._ask(draft_pb2.DraftRequest(open=message))

    async def tree_or_none(self, committed: Sequence[int], shape: TreeShape) -> draft_pb2.DraftResponse | None:
        """A tree for the next step, or None: the draft is not ready, late, or lost."""
        if self._call is None or self._member is None:
            self.reason = self.reason or "draft: opening"
            self.open(committed)
            return None
        if self._pending is not None and not self._take_late_reply():
            return None
        self._step += 1
        self._num_sent = len(committed)
        message = draft_pb2.DraftStep(
            step=self._step,
            base_len=self._acknowledged,
            token_ids=committed[self._acknowledged :],
            **shape_to_wire(shape),
        )
        pending = self._ask(draft_pb2.DraftRequest(step=message))
        # Late ones count too: a draft that has become slower is waited for as long as it then takes.
        pending.add_done_callback(partial(_record, self._member, time.monotonic()))
        patience = self._member.patience_seconds(self._reply_timeout_seconds)
        await asyncio.wait((pending,), timeout=patience)
        if not pending.done():
            self.reason = f"draft: no tree within {patience:.3g} s"
            return None
        return self._reply(pending)

    def refuse(self, reason: str) -> None:
        """The last tree was none: whoever sends such trees is no draft."""
        self._lose(f"draft: {reason}")

    def close(self) -> None:
        """End the session; the worker frees its KV slot."""
        if self._pending is not None and not self._pending.cancel() and not self._pending.cancelled():
            self._pending.exception()  # nobody is left to hear of it
        if self._call is not None and self._member is not None:
            self._call.cancel()
            self._member.leave(self._opening.max_num_tokens)
        self._call = self._member = self._pending = None

    def _take_late_reply(self) -> bool:
        """Whether the drafter is free again. A tree that came too late is dropped; what it acknowledged stays."""
        assert self._pending is not None
        if not self._pending.done():
            self.reason = self.reason or "draft: not ready yet"
            return False
        return self._reply(self._pending) is not None

    def _ask(self, request: draft_pb2.DraftRequest) -> asyncio.Task[draft_pb2.DraftResponse]:
        assert self._call is not None
        self.num_bytes += request.ByteSize()
        self._pending = asyncio.create_task(_exchange(self._call, request))
        return self._pending

    def _reply(self, pending: asyncio.Task[draft_pb2.DraftResponse]) -> draft_pb2.DraftResponse | None:
        self._pending = None
        try:
            response = pending.result()
        except SequoiaError as error:
            # Of a request that ran out of time the draft is innocent.
            is_late = isinstance(error, DeadlineExceeded)
            self._lose(f"draft: lost ({error.code.name}: {error})", is_at_fault=not is_late)
            return None
        if response.step != self._step or response.num_committed > self._num_sent:
            told = f"step {response.step} of {response.num_committed} tokens"
            self._lose(f"draft: lost (answered {told} instead of {self._step} of {self._num_sent})")
            return None
        self._acknowledged = response.num_committed
        self.num_bytes += response.ByteSize()
        return response

    def _lose(self, reason: str, *, is_at_fault: bool = True) -> None:
        if self._member is not None and is_at_fault:
            self._member.failed(reason)
        self.close()
        self.reason = reason


def _record(member: Member, started: float, pending: asyncio.Task[draft_pb2.DraftResponse]) -> None:
    if not pending.cancelled() and pending.exception() is None:
        member.replied(time.monotonic() - started)


async def _exchange(call: grpc.aio.StreamStreamCall[Request, Response], request: Request | None) -> Response:
    """Write a request, if there is one, and read the next answer. Raises SequoiaError when the stream has ended."""
    try:
        if request is not None:
            await call.write(request)
        response = await call.read()
    except grpc.aio.AioRpcError as error:
        raise error_from(error) from error
    except asyncio.InvalidStateError as error:
        # Writing to a stream that has ended.
        raise await _end_of(call) from error
    if response is grpc.aio.EOF:
        raise await _end_of(call)
    return cast(Response, response)


async def _end_of(call: grpc.aio.StreamStreamCall[Request, Response]) -> SequoiaError:
    """The error behind a stream that has ended."""
    code, details, metadata = await call.code(), await call.details(), await call.trailing_metadata()
    if code is grpc.StatusCode.OK:
        return Unavailable("the worker ended the stream")
    return error_from(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details))
