"""A request's streams to the two workers: one that must answer, one that may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from coordinator.workers import WorkerLink
from sequoia.errors import Internal, SequoiaError, Unavailable
from sequoia.rpc import error_from
from sequoia.sampling import Decoding
from sequoia.topology import TreeShape
from sequoia.v1 import draft_pb2, draft_pb2_grpc, tree_pb2, verify_pb2, verify_pb2_grpc
from sequoia.wire import rule_to_wire, sampling_to_wire, shape_to_wire

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

_REOPEN_AFTER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session needs, besides its tokens, to start on a worker or to start there again."""

    decoding: Decoding
    timeout_seconds: float

    def fields(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The fields that both workers' opening messages have."""
        return {
            "token_ids": token_ids,
            "num_prompt_tokens": self.decoding.num_prompt_tokens,
            "sampling": sampling_to_wire(self.decoding.sampling),
            "rule": rule_to_wire(self.decoding.rule),
        }


class VerifyStream:
    """The session on the verify worker. Raises SequoiaError when it is lost."""

    def __init__(self, link: WorkerLink, opening: Opening) -> None:
        stub = verify_pb2_grpc.VerifyServiceStub(link.channel)
        self._address = link.address
        self._opening = opening
        self._call = stub.Verify(timeout=opening.timeout_seconds)
        self._step = 0
        self.num_plain_steps_left = 0
        self.num_bytes = 0

    async def open(self, token_ids: Sequence[int]) -> verify_pb2.VerifyResponse:
        """Prefill and the first verdict."""
        message = verify_pb2.VerifyOpen(**self._opening.fields(token_ids))
        return await self._ask(verify_pb2.VerifyRequest(open=message))

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
        """End the session; the worker frees its KV slot."""
        self._call.cancel()

    async def _ask(self, request: verify_pb2.VerifyRequest | None) -> verify_pb2.VerifyResponse:
        try:
            response = await _exchange(self._call, request)
        except Unavailable as error:
            raise Unavailable(f"the verify worker at {self._address} is lost ({error})") from error
        self.num_bytes += response.ByteSize() + (request.ByteSize() if request else 0)
        if request is None:
            self._step += 1
        if response.step != self._step:
            raise Internal(f"the verify worker answered step {response.step} instead of {self._step}")
        self.num_plain_steps_left = response.num_plain_steps_left
        return response


class DraftStream:
    """The session on the draft worker. Never raises and never holds a step up for longer than `reply_timeout_seconds`.

    Whatever goes wrong is a missing tree: the step is decoded plainly, and the session is opened again from the
    committed tokens. `reason` tells what happened last.
    """

    def __init__(
        self, link: WorkerLink, opening: Opening, reply_timeout_seconds: float, *, has_own_device: bool
    ) -> None:
        self._has_own_device = has_own_device
        self._stub = draft_pb2_grpc.DraftServiceStub(link.channel)
        self._opening = opening
        self._reply_timeout_seconds = reply_timeout_seconds
        self._call: grpc.aio.StreamStreamCall[draft_pb2.DraftRequest, draft_pb2.DraftResponse] | None = None
        self._pending: asyncio.Task[draft_pb2.DraftResponse] | None = None
        self._acknowledged = 0
        self._step = 0
        self._reopen_at = 0.0
        self.num_bytes = 0
        self.reason = ""

    @property
    def is_opening(self) -> bool:
        """Whether the session is being opened: the draft reads the prompt, and will soon be there."""
        return self._call is not None and self._pending is not None and not self._step

    def open(self, token_ids: Sequence[int]) -> None:
        """Start opening the session; nothing waits for it."""
        message = draft_pb2.DraftOpen(**self._opening.fields(token_ids), has_own_device=self._has_own_device)
        self._call = self._stub.Draft(timeout=self._opening.timeout_seconds)
        self._step = 0
        self._ask(draft_pb2.DraftRequest(open=message))

    async def tree_or_none(self, committed: Sequence[int], shape: TreeShape) -> draft_pb2.DraftResponse | None:
        """A tree for the next step, or None: the draft is not ready, late, or lost."""
        if self._call is None:
            if time.monotonic() >= self._reopen_at:
                self.reason = self.reason or "draft: opening"
                self.open(committed)
            return None
        if self._pending is not None and not self._take_late_reply():
            return None
        self._step += 1
        message = draft_pb2.DraftStep(
            step=self._step,
            base_len=self._acknowledged,
            token_ids=committed[self._acknowledged :],
            **shape_to_wire(shape),
        )
        pending = self._ask(draft_pb2.DraftRequest(step=message))
        await asyncio.wait((pending,), timeout=self._reply_timeout_seconds)
        if not pending.done():
            self.reason = f"draft: no tree within {self._reply_timeout_seconds:g} s"
            return None
        return self._reply(pending)

    def close(self) -> None:
        """End the session; the worker frees its KV slot."""
        if self._pending is not None and not self._pending.cancel() and not self._pending.cancelled():
            self._pending.exception()  # nobody is left to hear of it
        if self._call is not None:
            self._call.cancel()

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
            self._lose(f"draft: lost ({error.code.name}: {error})")
            return None
        if response.step != self._step:
            self._lose(f"draft: lost (answered step {response.step} instead of {self._step})")
            return None
        self._acknowledged = response.num_committed
        self.num_bytes += response.ByteSize()
        return response

    def _lose(self, reason: str) -> None:
        assert self._call is not None
        self._call.cancel()
        self._call, self._acknowledged = None, 0
        self._reopen_at = time.monotonic() + _REOPEN_AFTER_SECONDS
        self.reason = reason


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
        return Internal("the worker ended the stream")
    return error_from(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details))
