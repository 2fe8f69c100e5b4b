"""One answer over several calls: where a coordinator is lost, another one goes on behind what was received."""

from __future__ import annotations

import time

import grpc

from sequoia.border import error_from, has_details
from sequoia.errors import Cancelled, SequoiaError, Unavailable
from sequoia.generation import Answer, OutOfStep
from sequoia.v1 import coordinator_pb2 as pb

# An answer that has begun, or that several coordinators may give, is tried again for that long after its last piece.
_RETRY_SECONDS = 20.0
_PAUSE_SECONDS = 0.1


class Attempts:
    """Decides, call by call, where to ask next, for what, and for how long.

    A coordinator is lost when its connection is: what it says itself is an answer, and another coordinator is asked
    only once each. What was received stands: the next one is told its tokens, the rule and the seed that were in
    effect, and neither text nor law changes.
    """

    def __init__(self, addresses: tuple[str, ...], request: pb.GenerateRequest, seconds: float, answer: Answer) -> None:
        self._addresses, self._answer = addresses, answer
        self._deadline = time.monotonic() + seconds
        self._num_calls = self._num_fruitless = 0
        self._num_tokens = 0
        # Where nobody is at the only address, that is told at once.
        self._give_up = time.monotonic() + _RETRY_SECONDS if len(addresses) > 1 else 0.0
        self.request = request

    @property
    def place(self) -> int:
        """The index of the address to ask."""
        return self._num_calls % len(self._addresses)

    @property
    def seconds_left(self) -> float:
        """Until the caller's deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def failed(self, error: grpc.RpcError | OutOfStep, *, is_closed: bool = False) -> float:
        """Prepare the next call. Returns the seconds to wait before it; raises a SequoiaError where none is of use.

        `is_closed`: the caller has closed its connection, so that nobody is lost.
        """
        is_told = isinstance(error, grpc.RpcError) and has_details(error)
        address = self._addresses[self.place]
        failure = failure_at(error, address) if isinstance(error, grpc.RpcError) else Unavailable(f"{address}: {error}")
        self._num_calls += 1
        if len(self._answer.token_ids) > self._num_tokens:
            self._num_tokens, self._num_fruitless = len(self._answer.token_ids), 0
            self._give_up = time.monotonic() + _RETRY_SECONDS
        self._num_fruitless += 1
        is_lost = not is_told and isinstance(failure, Unavailable | Cancelled)
        may_retry = is_lost and time.monotonic() < self._give_up
        may_ask_another = isinstance(failure, Unavailable) and self._num_fruitless < len(self._addresses)
        if is_closed or not (may_retry or may_ask_another):
            raise failure from error
        self._answer.resume(self.request)
        return _PAUSE_SECONDS if self._num_fruitless >= len(self._addresses) else 0.0


def ask_another(error: grpc.RpcError, addresses: tuple[str, ...], place: int) -> None:
    """Raises the failure of the coordinator at that place as ours, unless the next one may do better."""
    failure = failure_at(error, addresses[place])
    if not isinstance(failure, Unavailable) or place + 1 == len(addresses):
        raise failure from error


def failure_at(error: grpc.RpcError, address: str) -> SequoiaError:
    """The error as ours; one that never left this machine says where nobody answered."""
    failure = error_from(error)
    if isinstance(failure, Unavailable) and failure.message.startswith("failed to connect"):
        return Unavailable(f"no coordinator answers at {address}; is `sequoia up` running? ({failure.message})")
    return failure
