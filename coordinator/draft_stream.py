"""A request's stream to the draft worker: one that may answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import grpc

from coordinator.fallback import Fallback
from coordinator.member import Member
from coordinator.pool import Pool
from coordinator.replies import has_times, is_tree
from coordinator.stream import Opening, exchange
from sequoia.errors import DeadlineExceeded, SequoiaError
from sequoia.request_scope import call_metadata
from sequoia.topology import TreeShape
from sequoia.v1 import draft_pb2, draft_pb2_grpc
from sequoia.wire import shape_to_wire


class DraftStream:
    """The session on a draft worker. Never raises and never holds a step up for longer than `reply_timeout_seconds`.

    Whatever goes wrong is a missing tree: the step is decoded plainly, and the session is opened again, elsewhere where
    there is another worker, from the committed tokens. `reason` tells what happened last, `cause` why no tree came.
    """

    def __init__(self, pool: Pool, opening: Opening, reply_timeout_seconds: float, *, verify_device_id: str) -> None:
        self._pool, self._opening, self._verify_device_id = pool, opening, verify_device_id
        self._reply_timeout_seconds = reply_timeout_seconds
        self._member: Member | None = None
        self._call: grpc.aio.StreamStreamCall[draft_pb2.DraftRequest, draft_pb2.DraftResponse] | None = None
        self._pending: asyncio.Task[draft_pb2.DraftResponse] | None = None
        self._acknowledged = self._num_sent = self._num_nodes = 0
        self._step = 0
        self.num_bytes = 0
        self.reason, self.cause = "", Fallback.OPENING
        self._is_opened, self.num_rebuilds = False, 0  # openings again, behind a loss
        self._has_own_device, self._opening_seconds = False, 0.0

    @property
    def is_opening(self) -> bool:
        """Whether the session is being opened: the draft reads the prompt, and will soon be there."""
        return self._call is not None and self._pending is not None and not self._step

    @property
    def shares_device(self) -> bool:
        """Whether the worker that would be opened on, or is, computes on the target's own device."""
        member = self._member or self._pool.best()
        there = member.description if member is not None else None
        return there is not None and there.device_id == self._verify_device_id

    def open(self, token_ids: Sequence[int]) -> None:
        """Start opening the session where there is room; nothing waits for it."""
        if (member := self._pool.best()) is None or member.description is None:
            return
        self._has_own_device = member.description.device_id != self._verify_device_id
        message = draft_pb2.DraftOpen(**self._opening.fields(token_ids), has_own_device=self._has_own_device)
        stub = draft_pb2_grpc.DraftServiceStub(member.link.channel)
        self.num_rebuilds += self._is_opened
        self._is_opened = True
        self._call = stub.Draft(timeout=max(0.0, self._opening.seconds_left), metadata=call_metadata())
        self._member = member
        member.enter(self._opening.max_num_tokens)
        self._step, self._acknowledged, self._num_sent = 0, 0, len(token_ids)
        self._ask(draft_pb2.DraftRequest(open=message))

    async def tree_or_none(self, committed: Sequence[int], shape: TreeShape) -> draft_pb2.DraftResponse | None:
        """A tree for the next step, or None: the draft is not ready, late, or lost."""
        if self._call is None or self._member is None:
            self.open(committed[:-1])  # a step brings a token
            if self._member is None or self._has_own_device:
                self.reason, self.cause = self.reason or "draft: opening", Fallback.OPENING
                return None
            await self._opened(self._member)
        if self._pending is not None and not self._take_late_reply():
            return None
        self._step += 1
        self._num_sent, self._num_nodes = len(committed), shape.size
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
            self.reason, self.cause = f"draft: no tree within {patience:.3g} s", Fallback.LATE
            return None
        return self._reply(pending)

    async def _opened(self, member: Member) -> None:
        """Wait for it, for a while: on the target's own device plain steps would only make it longer."""
        assert self._pending is not None
        await asyncio.wait((self._pending,), timeout=member.patience_seconds(self._reply_timeout_seconds))

    def take_opening_seconds(self) -> float:
        """That the target's device was busy with the prompt for this draft; 0 on another device, and once told."""
        seconds, self._opening_seconds = self._opening_seconds, 0.0
        return seconds

    def refuse(self, reason: str) -> None:
        """The last tree was none: whoever sends such trees is no draft."""
        self._lose(f"draft: {reason}")
        self.cause = Fallback.REFUSED

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
            self.reason, self.cause = self.reason or "draft: not ready yet", Fallback.NOT_READY
            return False
        return self._reply(self._pending) is not None

    def _ask(self, request: draft_pb2.DraftRequest) -> asyncio.Task[draft_pb2.DraftResponse]:
        assert self._call is not None
        self.num_bytes += request.ByteSize()
        self._pending = asyncio.create_task(exchange(self._call, request))
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
        if not has_times(response) or (response.step and not self._is_tree(response)):
            self._lose("draft: lost (its answer is no tree that was asked for, or took no time that there is)")
            return None
        self._acknowledged = response.num_committed
        self.num_bytes += response.ByteSize()
        if not response.step and not self._has_own_device:
            self._opening_seconds = response.worker_seconds
        return response

    def _is_tree(self, response: draft_pb2.DraftResponse) -> bool:
        return is_tree(response.tree, self._num_nodes) and len(response.ngram_nodes) <= len(response.tree.token_ids)

    def _lose(self, reason: str, *, is_at_fault: bool = True) -> None:
        if self._member is not None and is_at_fault:
            self._member.failed(reason)
        self.close()
        self.reason, self.cause = reason, Fallback.LOST


def _record(member: Member, started: float, pending: asyncio.Task[draft_pb2.DraftResponse]) -> None:
    if not pending.cancelled() and pending.exception() is None:
        member.replied(time.monotonic() - started)
