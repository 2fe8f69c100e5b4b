"""CoordinatorService: wire <-> session."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from coordinator.clients import Clients, Use
from coordinator.draft_stream import DraftStream
from coordinator.explanation import explain
from coordinator.learning import Learning
from coordinator.request import DEFAULT_MAX_TOKENS, Request, parse_request
from coordinator.request_metrics import RequestMetrics
from coordinator.request_trace import RequestTrace
from coordinator.session import Session
from coordinator.speculation import RequestSpeculation, Speculator
from coordinator.stream import Opening
from coordinator.text import TextCodec, TextStream
from coordinator.transcript import Step, Transcript
from coordinator.trees import max_tree_size
from coordinator.verify_stream import VerifyStream
from coordinator.workers import Workers
from sequoia.border import error_border
from sequoia.request_scope import request_scope
from sequoia.rules import Rule
from sequoia.tracing import Tracing, traced
from sequoia.v1 import coordinator_pb2, coordinator_pb2_grpc
from sequoia.wire import rule_to_wire

_log = logging.getLogger(__name__)

# The deadline of a request whose client sets none.
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request waits for its workers, in seconds."""

    draft: float  # for a tree
    failover: float  # for a verify worker, while none is there


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """One handler a request."""

    def __init__(
        self,
        workers: Workers,
        speculator: Speculator,
        learning: Learning,
        patience: Patience,
        rule: Rule,
        clients: Clients,
        metrics: RequestMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._workers, self._speculator, self._learning, self._rule = workers, speculator, learning, rule
        self._patience, self._clients, self._metrics = patience, clients, metrics
        self._codec = TextCodec.from_files(workers.tokenizer)

    async def Generate(self, message: coordinator_pb2.GenerateRequest, context: Any) -> None:
        """Streams the answer as it is committed."""
        with request_scope(context.invocation_metadata()) as scope:
            async with error_border(context):
                with (
                    self._metrics.request(),
                    self._clients.request(context) as use,
                    traced(self._tracing, "generate") as span,
                ):
                    trace = RequestTrace(span) if span is not None else None
                    await self._generate(message, context, use, scope.request_id, trace)

    async def _generate(
        self,
        message: coordinator_pb2.GenerateRequest,
        context: Any,
        use: Use,
        request_id: str,
        trace: RequestTrace | None,
    ) -> None:
        asked = message.max_tokens if message.HasField("max_tokens") else None
        message.max_tokens = use.max_tokens(asked, DEFAULT_MAX_TOKENS)
        target, draft = self._workers.verify_description, self._workers.draft_description
        limit = max_tree_size(target, draft)
        # Tokenising a long prompt or rendering a template must not hold up the other requests.
        request = await asyncio.to_thread(parse_request, message, self._codec, target, limit, self._rule)
        if trace is not None:
            trace.asked(request)
        use.add_tokens(len(request.prompt))
        async with (
            self._session(request, context.time_remaining() or _MOST_SECONDS, trace) as session,
            aclosing(session.run()) as steps,
        ):
            num_tokens = num_before = len(request.generated)
            async for step in steps:
                num_tokens += len(step.token_ids)
                use.add_tokens(len(step.token_ids))
                response = _response(request_id, request, session, step, num_tokens)
                if trace is not None and response.HasField("finish"):
                    trace.finished(response.finish)
                await context.write(response)
            report = session.report
            times = report.first_token_seconds, report.total_seconds
            self._metrics.finished(len(request.prompt), num_tokens - num_before, *times)
        told = {"client": use.client.name, "num_tokens": num_tokens}
        _log.info("generated", extra=told)

    async def DescribePair(
        self, message: coordinator_pb2.DescribePairRequest, context: Any
    ) -> coordinator_pb2.DescribePairResponse:
        """Both workers, the round trips to them, the plans in force."""
        async with error_border(context):
            self._clients.client(context)
            workers = self._workers
            response = coordinator_pb2.DescribePairResponse(
                verify=workers.verify_description,
                draft=workers.draft_description,
                verify_rtt_seconds=await workers.verify.measure_round_trip(),
                plans_json=[found.plan.to_json() for found in self._speculator.plans.in_force()],
                default_rule=rule_to_wire(self._rule),
                has_chat_template=self._codec.has_chat_template,
            )
            if workers.draft_description is not None:
                response.draft_rtt_seconds = await workers.draft.measure_round_trip()
        return response

    async def Explain(self, message: coordinator_pb2.ExplainRequest, context: Any) -> coordinator_pb2.ExplainResponse:
        """Why requests of a kind are decoded the way they are."""
        async with error_border(context):
            self._clients.client(context)
            return explain(message, self._speculator, self._rule)

    @asynccontextmanager
    async def _session(
        self, request: Request, timeout_seconds: float, trace: RequestTrace | None
    ) -> AsyncIterator[Session]:
        """Both streams, for as long as the request lives: their end frees both KV slots."""
        workers = self._workers
        max_num_tokens = len(request.prompt) + request.max_tokens
        opening = Opening(request.decoding, max_num_tokens, time.monotonic() + timeout_seconds)
        draft = None
        # With speculation off the draft never hears of the request; otherwise when there is a tree to grow.
        is_off = request.mode == coordinator_pb2.SPECULATION_MODE_OFF
        if not is_off and workers.draft_description is not None:
            device_id = workers.verify_description.device_id
            draft = DraftStream(workers.draft, opening, self._patience.draft, verify_device_id=device_id)
        verify = VerifyStream(workers.verify, opening, self._patience.failover)
        stream = TextStream(self._codec, request.stops)
        transcript = Transcript(request.prompt, request.max_tokens, request.decoding.sampling, stream)
        if request.generated:
            # As with a long prompt: the other requests go on.
            await asyncio.to_thread(transcript.resume, request.generated)
        speculation = RequestSpeculation(self._speculator, request, has_draft=draft is not None)
        session = Session(transcript, verify, draft, speculation, self._metrics, trace)
        try:
            async with workers.verify.admission(max_num_tokens + workers.verify_description.max_tree_size):
                if trace is not None:
                    trace.admitted()
                with self._speculator:
                    yield session
        finally:
            session.close()
            self._learning.learn(request, session.report, self._speculator.acceptance(request))


def _response(
    request_id: str, request: Request, session: Session, step: Step, num_tokens: int
) -> coordinator_pb2.GenerateResponse:
    response = coordinator_pb2.GenerateResponse(
        request_id=request_id,
        num_prompt_tokens=len(request.prompt),
        text=step.text,
        token_ids=step.token_ids,
        num_tokens_before=num_tokens - len(step.token_ids),
        logprobs=step.logprobs,
        rule=rule_to_wire(request.decoding.rule),
        seed=request.decoding.sampling.seed,
    )
    if step.finish_reason is not None:
        report = session.finish()
        response.finish.reason = step.finish_reason
        response.finish.num_completion_tokens = num_tokens
        response.finish.num_cached_prompt_tokens = session.num_cached_prompt_tokens
        response.finish.speculation.CopyFrom(report.message)
        response.finish.time_to_first_token_seconds = report.first_token_seconds
        response.finish.total_seconds = report.total_seconds
    return response
