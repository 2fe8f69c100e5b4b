"""DraftService: wire <-> drafter. A stream is a session."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from draft_worker.account import Account
from draft_worker.choosing import Tokens
from draft_worker.drafter import Drafted, Drafter, DraftLimits
from draft_worker.idle import IdleTime
from draft_worker.lookup import AnySession, Lookup
from sequoia.engine.spent import Spent, timed
from sequoia.errors import InvalidArgument
from sequoia.loaded_worker import Worker
from sequoia.sampling import Decoding
from sequoia.tracing import OpenSpan, Tracing
from sequoia.v1 import draft_pb2, draft_pb2_grpc, tree_pb2
from sequoia.wire import decoding_from_wire, shape_from_wire, tokens_from_wire, tree_to_wire
from sequoia.worker import session_border, session_limit


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """One handler a session; it awaits the engine and never computes."""

    def __init__(self, worker: Worker, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._limits, self._executor = worker.description, worker.executor
        self._drafter = Lookup(worker.executor) if worker.tokenizer is None else _drafter(worker)
        self._account = Account(worker.draft_ahead)

    async def Draft(self, request_iterator: AsyncIterator[draft_pb2.DraftRequest], context: Any) -> None:
        """Opens the session with the first message, then answers every step with a tree."""
        async with session_border(context, self._tracing, "draft_session") as span:
            opening = await anext(request_iterator, None)
            if opening is None or opening.WhichOneof("kind") != "open":
                raise InvalidArgument("the first message of a stream must be `open`", "kind")
            with (
                self._drafter.session(*self._opening(opening.open)) as session,
                self._idle_time(session, opening.open) as idle_time,
            ):
                await context.write(await self._prefilled(session, span))
                async for request in request_iterator:
                    if request.WhichOneof("kind") != "step":
                        raise InvalidArgument("every message after the first must be `step`", "kind")
                    idle_time.end()
                    await context.write(await self._step(session, request.step, idle_time, span))
                    idle_time.begin()

    def _idle_time(self, session: AnySession, request: draft_pb2.DraftOpen) -> IdleTime:
        return IdleTime(self._executor, self._account, session, has_own_device=request.has_own_device)

    def _opening(self, request: draft_pb2.DraftOpen) -> tuple[Tokens, Decoding, int]:
        limit = session_limit(request.max_num_tokens, self._limits)
        decoding = decoding_from_wire(request, self._limits.vocab_size)
        # The target's law is held to it, whatever is proposed.
        free = replace(decoding, sampling=replace(decoding.sampling, json_schema=None))
        return self._tokens(request.token_ids), free, limit

    async def _prefilled(self, session: AnySession, span: OpenSpan | None) -> draft_pb2.DraftResponse:
        started = time.monotonic()
        await self._drafter.run(session.prefill())
        seconds = time.monotonic() - started
        if span is not None:
            span.ended("prefill", seconds, {"num_tokens": session.num_committed})
        return draft_pb2.DraftResponse(num_committed=session.num_committed, worker_seconds=seconds)

    async def _step(
        self, session: AnySession, request: draft_pb2.DraftStep, idle_time: IdleTime, span: OpenSpan | None
    ) -> draft_pb2.DraftResponse:
        started = time.monotonic()
        shape = shape_from_wire(request, session.rule, self._limits.max_tree_size)
        session.commit(request.base_len, self._tokens(request.token_ids))
        spent = Spent()
        drafted = await self._drafter.run(timed(session.grow(shape), spent))
        idle_time.settle(drafted)
        seconds = time.monotonic() - started
        if span is not None:
            told = {"step": request.step, "tree_size": drafted.tree.topology.size, "asked_size": shape.size}
            span.ended("draft", seconds, {**told, **spent.told})
        return draft_pb2.DraftResponse(
            step=request.step,
            num_committed=session.num_committed,
            tree=tree_to_wire(drafted.tree),
            worker_seconds=seconds,
            ahead=_ahead_to_wire(drafted),
            ngram_nodes=drafted.ngram_nodes,
            times=tree_pb2.WorkerTimes(forwards=spent.forwards, work=spent.work),
        )

    def _tokens(self, token_ids: Sequence[int]) -> Tokens:
        if len(token_ids) > self._limits.context_length:
            limit = self._limits.context_length
            raise InvalidArgument(f"{len(token_ids)} tokens do not fit a context of {limit}", "token_ids")
        return tokens_from_wire(token_ids, self._limits.vocab_size, "token_ids")


def _drafter(worker: Worker) -> Drafter:
    described, engine = worker.description, worker.executor.engine
    limits = DraftLimits(
        worker.prefill_chunk,
        described.vocab_size,
        reads_once=engine.reads_once,
        grows_whole=engine.can_grow,
        mixes_ngrams=worker.mixes_ngrams,
    )
    return Drafter(worker.executor, limits, worker.tree_rows)


def _ahead_to_wire(drafted: Drafted) -> draft_pb2.DraftAhead:
    if not drafted.num_begun:
        return draft_pb2.DRAFT_AHEAD_NOT_ATTEMPTED
    return draft_pb2.DRAFT_AHEAD_MISS if drafted.hit is None else draft_pb2.DRAFT_AHEAD_HIT
