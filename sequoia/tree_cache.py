"""Tree plans in Redis: one per pair of models, their hardware, and situation."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple

from redis.asyncio.lock import Lock
from redis.exceptions import RedisError

from sequoia.errors import Unavailable
from sequoia.planner import TreePlan
from sequoia.redis_connection import connect
from sequoia.situation import Situation

# A planner that died holds its lock for that long at most.
_LOCK_SECONDS = 30.0
# Says that there are new plans, to whoever listens; what it carries means nothing.
_CHANNEL = "sequoia:plans:v2"


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan holds for. `pair` (models, revisions, quantisation) and the hardware keys are free text."""

    pair: str
    draft_hardware: str
    verify_hardware: str
    situation: Situation

    def __str__(self) -> str:
        """The key in Redis."""
        at = self.situation
        buckets = ":".join((at.rule, at.temperature, at.sessions, at.context, at.round_trip))
        return f"sequoia:plan:v2:{self._hashed}:{buckets}"

    def at(self, situation: Situation) -> PlanKey:
        """That of the same pair."""
        return PlanKey(self.pair, self.draft_hardware, self.verify_hardware, situation)

    @property
    def lock(self) -> str:
        """The key of the lock that whoever plans for this pair on this hardware holds."""
        return f"sequoia:planning:v2:{self._hashed}"

    @property
    def _hashed(self) -> str:
        return ":".join(map(_digest, (self.pair, self.draft_hardware, self.verify_hardware)))


class StoredPlan(NamedTuple):
    """A plan, and when the pair was measured for it, in seconds since 1970."""

    plan: TreePlan
    measured_at: float

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"measured_at": self.measured_at, "plan": self.plan.to_dict()})


class Lookup(NamedTuple):
    """What was found. `rejected` says what is wrong with an entry that is no plan."""

    plans: dict[PlanKey, StoredPlan]
    rejected: dict[PlanKey, str]


class TreeCache:
    """A connection to the Redis that holds plans: an async context manager.

    Calls give up after about a second. Raises InvalidArgument for a URL that is none, Unavailable when Redis cannot be
    reached or refuses.
    """

    def __init__(self, url: str) -> None:
        self._redis = connect(url)

    async def __aenter__(self) -> TreeCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._redis.aclose()

    async def get_many(self, keys: Sequence[PlanKey]) -> Lookup:
        """The plans under these keys, in one round trip. An entry that is no valid plan is rejected, never used."""
        try:
            documents = await self._redis.mget([str(key) for key in keys]) if keys else []
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot read tree plans from Redis: {error}") from error
        lookup = Lookup({}, {})
        for key, document in zip(keys, documents, strict=True):
            if document is None:
                continue
            try:
                lookup.plans[key] = _read(document)
            except ValueError as error:
                lookup.rejected[key] = str(error)
        return lookup

    async def put_many(self, plans: Mapping[PlanKey, StoredPlan], ttl_seconds: int) -> None:
        """Store plans until `ttl_seconds` from now, in place of those before, all of them or none; tell who listens."""
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                for key, stored in plans.items():
                    pipeline.set(str(key), stored.to_json(), ex=ttl_seconds)
                pipeline.publish(_CHANNEL, "new")
                await pipeline.execute()
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot write tree plans to Redis: {error}") from error

    async def news(self) -> AsyncIterator[None]:
        """Yields when it begins to listen, and whenever plans were stored."""
        # Not `get_message(timeout=...)`, which can swallow the cancellation of a task (redis 7).
        try:
            async with self._redis.pubsub() as listening:
                await listening.subscribe(_CHANNEL)
                async for _ in listening.listen():
                    yield
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot listen for tree plans in Redis: {error}") from error

    @asynccontextmanager
    async def single_flight(self, key: PlanKey) -> AsyncIterator[bool]:
        """Whether the pair's lock is ours; others then keep off until we leave, or for a short while after a crash."""
        lock = self._redis.lock(key.lock, timeout=_LOCK_SECONDS, blocking=False, thread_local=False)
        try:
            is_ours = await lock.acquire()
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot take the planner's lock in Redis: {error}") from error
        if not is_ours:
            yield False
            return
        renewing = asyncio.create_task(_renew_forever(lock))
        try:
            yield True
        finally:
            renewing.cancel()
            with suppress(RedisError, OSError):  # it runs out by itself
                await lock.release()


async def _renew_forever(lock: Lock) -> None:
    while True:
        await asyncio.sleep(_LOCK_SECONDS / 3)
        with suppress(RedisError, OSError):  # two planners at a time cost time, nothing else
            await lock.reacquire()


@lru_cache(maxsize=4096)
def _read(document: bytes) -> StoredPlan:
    """Raises ValueError for what is no stored plan. Remembers what it has read: the same entries come again."""
    try:
        data = json.loads(document)
        measured_at, plan = data["measured_at"], data["plan"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a tree plan: {type(error).__name__}: {error}") from error
    if not isinstance(measured_at, int | float) or not math.isfinite(measured_at):
        raise ValueError(f"not a tree plan: measured at {measured_at!r}")
    return StoredPlan(TreePlan.from_dict(plan), float(measured_at))


@lru_cache(maxsize=64)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
