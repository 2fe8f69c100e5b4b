"""VerifyService: wire <-> verifier. A stream is a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from sequoia.engine.grammar import Grammars
from sequoia.engine.spent import Spent, timed
from sequoia.errors import InvalidArgument
from sequoia.loaded_worker import Worker
from sequoia.sampling import Constraint, Decoding
from sequoia.topology import TokenTree
from sequoia.tracing import OpenSpan, Tracing
from sequoia.v1 import tree_pb2, verify_pb2, verify_pb2_grpc
from sequoia.wire import decoding_from_wire, tokens_from_wire, tree_from_wire, verdict_to_wire
from sequoia.worker import session_border, session_limit
from verify_worker.verifier import Verifier, VerifyLimits, VerifySession

# Plain steps count on from a step, in 64 bits.
_LAST_STEP = 2**63


class _Wanted(NamedTuple):
    """What a message asks for."""

    step: int
    tree: TokenTree
    num_plain_steps: int  # to run after it


class VerifyServicer(verify_pb2_grpc.VerifyServiceServicer):
    """One handler a session; it awaits the engine and never computes."""

    def __init__(self, worker: Worker, tracing: Tracing | None = None) -> None:
        self._limits, self._tracing = worker.description, tracing
        engine = worker.executor.engine
        later = engine.make_target_later if engine.can_wait else None
        limits = VerifyLimits(worker.prefill_chunk, self._limits.vocab_size, engine.make_target, later)
        self._verifier = Verifier(worker.executor, limits, worker.tree_rows)
        self._grammars = Grammars(worker.tokenizer) if worker.tokenizer else None
        self._reading = asyncio.Lock()

    async def Verify(self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        """Opens the session with the first message and a first verdict, then answers every step."""
        async with session_border(context, self._tracing, "verify_session") as span:
            opening = await anext(request_iterator, None)
            if opening is None or opening.WhichOneof("kind") != "open":
                raise InvalidArgument("the first message of a stream must be `open`", "kind")
            with self._verifier.session(*await self._opening(opening.open)) as session:
                await self._run_on(session, context, _Wanted(0, session.root_only, 0), span)
                async for request in request_iterator:
                    if request.WhichOneof("kind") != "step":
                        raise InvalidArgument("every message after the first must be `step`", "kind")
                    await self._step(session, context, request.step, span)

    async def _opening(self, request: verify_pb2.VerifyOpen) -> tuple[tuple[int, ...], Decoding, int]:
        limit = session_limit(request.max_num_tokens, self._limits)
        if len(request.token_ids) >= limit:
            raise InvalidArgument(f"{len(request.token_ids)} tokens leave no room in a session of {limit}", "token_ids")
        committed = tokens_from_wire(request.token_ids, self._limits.vocab_size, "token_ids")
        decoding = decoding_from_wire(request, self._limits.vocab_size)
        if (schema := decoding.sampling.json_schema) is not None and self._grammars is not None:
            constraint = await self._constraint(self._grammars, schema, committed[decoding.num_prompt_tokens :])
            decoding = replace(decoding, constraint=constraint)
        return committed, decoding, limit

    async def _constraint(self, grammars: Grammars, schema: str, generated: tuple[int, ...]) -> Constraint:
        """New schemas are read one after another, and nobody else waits for them."""
        async with nullcontext() if grammars.has_read(schema) else self._reading:
            return await asyncio.to_thread(grammars.constraint, schema, generated)

    async def _step(
        self, session: VerifySession, context: Any, request: verify_pb2.VerifyStep, span: OpenSpan | None
    ) -> None:
        if request.prefix_len != session.prefix_len:
            raise InvalidArgument(f"this session holds {session.prefix_len} rows before the root", "prefix_len")
        if request.step > _LAST_STEP:
            raise InvalidArgument(f"is {request.step}; it must be {_LAST_STEP} or less", "step")
        tree = self._tree(session, request)
        await self._run_on(session, context, _Wanted(request.step, tree, request.num_plain_steps), span)

    async def _run_on(self, session: VerifySession, context: Any, wanted: _Wanted, span: OpenSpan | None) -> None:
        """A verdict on the tree, then on the plain steps after it; a forward does not wait for the answer before it."""
        running = asyncio.ensure_future(self._verify(session, wanted.tree, span))
        try:
            for index in range(wanted.num_plain_steps + 1):
                response = await running
                left = 0 if session.ended_by(response.verdict.bonus_token_id) else wanted.num_plain_steps - index
                if left:
                    running = asyncio.ensure_future(self._verify(session, session.root_only, span))
                response.step, response.num_plain_steps_left = wanted.step + index, left
                response.num_reused_tokens = 0 if response.step else session.num_reused_tokens
                await context.write(response)
                if not left:
                    break
        finally:
            running.cancel()

    def _tree(self, session: VerifySession, request: verify_pb2.VerifyStep) -> TokenTree:
        if not request.HasField("tree"):
            return session.root_only
        return tree_from_wire(request.tree, self._limits.max_tree_size, self._limits.vocab_size)

    async def _verify(
        self, session: VerifySession, tree: TokenTree, span: OpenSpan | None
    ) -> verify_pb2.VerifyResponse:
        started, prefix_len, spent = time.monotonic(), session.prefix_len, Spent()
        verdict = await self._verifier.executor.run(timed(session.verify(tree), spent))
        seconds = time.monotonic() - started
        if span is not None:
            told = {"tree_size": tree.topology.size, "prefix_len": prefix_len}
            told["num_accepted_tokens"] = len(verdict.accepted_nodes)
            span.ended("verify", seconds, {**told, **spent.told})
        return verify_pb2.VerifyResponse(
            prefix_len=prefix_len,
            verdict=verdict_to_wire(verdict),
            worker_seconds=seconds,
            times=tree_pb2.WorkerTimes(forwards=spent.forwards, work=spent.work),
        )
