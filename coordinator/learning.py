"""What requests taught about acceptance, on its way to Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType

from coordinator.background import end
from coordinator.report import Report
from coordinator.request import Request
from coordinator.trees import Pair, pair_name
from sequoia.acceptance import AcceptanceCounts
from sequoia.acceptance_counts import CountsKey, LiveAcceptance, LiveCounts
from sequoia.errors import Unavailable
from sequoia.optimal_tree import Acceptance, expected_tokens
from sequoia.situation import TEMPERATURES
from sequoia.topology import Topology
from sequoia.v1.coordinator_pb2 import SpeculationReport
from sequoia.wire import known_shape

_log = logging.getLogger(__name__)


class Learning:
    """Adds up what finished requests counted, and sends it while it is entered. Nobody waits for it.

    While Redis is down the counts are kept, as one sum for each pair, rule and temperature, and sent later.
    """

    def __init__(self, redis_url: str, pair: Pair, flush_seconds: float) -> None:
        self._live = LiveCounts(redis_url) if redis_url else None
        self._pair = pair
        self._flush_seconds = flush_seconds
        self._pending: dict[CountsKey, LiveAcceptance] = {}
        self._is_failing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Learning:
        self._task = asyncio.create_task(self._flush_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await end(self._task)
        await self.flush()
        if self._live is not None:
            await self._live.__aexit__(kind, error, trace)

    def learn(self, request: Request, report: Report, acceptance: Acceptance) -> None:
        """Take a finished request's counts, and what its trees brought beside what that acceptance promised."""
        draft = self._pair.draft_description
        learnt = learnt_from(report.message, acceptance)
        if draft is None or self._live is None or not learnt.num_steps:
            return
        decoding = request.decoding
        bucket = TEMPERATURES.name(decoding.sampling.temperature)
        key = CountsKey(pair_name(self._pair.verify_description, draft), decoding.rule.name, bucket)
        self._pending[key] = self._pending.get(key, LiveAcceptance()) + learnt

    async def flush(self) -> None:
        """Send what there is. What cannot be sent stays; that it cannot is logged once."""
        if self._live is None:
            return
        while self._pending:
            key, learnt = self._pending.popitem()
            try:
                await self._live.add(key, learnt, now=time.time())
            except Unavailable as error:
                self._pending[key] = self._pending.get(key, LiveAcceptance()) + learnt
                if not self._is_failing:
                    _log.warning("acceptance counts not sent", extra={"reason": str(error)})
                self._is_failing = True
                return
        self._is_failing = False

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._flush_seconds)
            await self.flush()


def learnt_from(message: SpeculationReport, acceptance: Acceptance) -> LiveAcceptance:
    """What a request offered and accepted; what its drafted steps brought, and were expected to bring.

    Steps with dynamic trees teach nothing about ranks, and are left out of all.
    """
    by_depth, usages = message.counts_by_depth, [(each, known_shape(each)) for each in message.trees]
    planned = [(each, shape) for each, shape in usages if isinstance(shape, Topology) and shape.size > 1]
    drafted = [each for each, _ in planned]
    expected = (each.num_steps * expected_tokens(tree, acceptance) for each, tree in planned)
    return LiveAcceptance(
        AcceptanceCounts(
            tuple(tuple(each.num_offered) for each in by_depth), tuple(tuple(each.num_accepted) for each in by_depth)
        ),
        num_steps=sum(each.num_steps for each in drafted),
        num_tokens=sum(each.num_tokens for each in drafted),
        expected_tokens=sum(expected),
        num_ahead_hits=sum(each.num_ahead_hits for each in drafted),
        num_ahead_misses=sum(each.num_ahead_misses for each in drafted),
    )
