"""What both of a request's streams to workers have: what opens them, and how a message is exchanged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from sequoia.border import error_from
from sequoia.errors import SequoiaError, Unavailable
from sequoia.sampling import Decoding
from sequoia.wire import rule_to_wire, sampling_to_wire

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


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


async def exchange(call: grpc.aio.StreamStreamCall[Request, Response], request: Request | None) -> Response:
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
