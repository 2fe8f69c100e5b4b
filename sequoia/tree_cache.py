"""Tree plans in Redis: one per pair of models, their hardware, rule and temperature bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError

from sequoia.errors import InvalidArgument, Unavailable
from sequoia.planner import TreePlan

TEMPERATURE_BUCKETS = ("0", "(0,0.4]", "(0.4,0.8]", "(0.8,inf)")
_BUCKET_ENDS = (0.0, 0.4, 0.8)

_SOCKET_TIMEOUT_SECONDS = 1.0


def temperature_bucket(temperature: float) -> str:
    """The one of TEMPERATURE_BUCKETS that a temperature of 0 or more falls in."""
    return TEMPERATURE_BUCKETS[sum(temperature > end for end in _BUCKET_ENDS)]


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan holds for. `pair` and the hardware keys are free text; the temperature bucket is one of the four."""

    pair: str
    draft_hardware: str
    verify_hardware: str
    rule: str
    temperature_bucket: str

    def __str__(self) -> str:
        """The key in Redis."""
        hashed = ":".join(map(_digest, (self.pair, self.draft_hardware, self.verify_hardware)))
        return f"sequoia:plan:v1:{hashed}:{self.rule}:{self.temperature_bucket}"


class Lookup(NamedTuple):
    """What was found. `rejected` says what is wrong with an entry that is no plan."""

    plans: dict[PlanKey, TreePlan]
    rejected: dict[PlanKey, str]


class TreeCache:
    """A connection to the Redis that holds plans: an async context manager.

    Calls give up after about a second. Raises InvalidArgument for a URL that is none, Unavailable when Redis cannot be
    reached or refuses.
    """

    def __init__(self, url: str) -> None:
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=_SOCKET_TIMEOUT_SECONDS,
                socket_connect_timeout=_SOCKET_TIMEOUT_SECONDS,
                # Once more at once: a restarted server has closed the connections of the pool.
                retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
            )
        except ValueError as error:
            raise InvalidArgument(f"{url!r} is no Redis URL: {error}", "redis") from error

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
                lookup.plans[key] = TreePlan.from_json(document)
            except ValueError as error:
                lookup.rejected[key] = str(error)
        return lookup

    async def put(self, key: PlanKey, plan: TreePlan, ttl_seconds: int) -> None:
        """Store a plan until `ttl_seconds` from now, in place of the one before."""
        try:
            await self._redis.set(str(key), plan.to_json(), ex=ttl_seconds)
        except (RedisError, OSError) as error:
            raise Unavailable(f"cannot write a tree plan to Redis: {error}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
