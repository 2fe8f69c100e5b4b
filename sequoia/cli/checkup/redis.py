"""Whether Redis is there, and keeps plans."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from redis.exceptions import RedisError

from sequoia.cli.checkup.finding import Finding
from sequoia.errors import InvalidArgument
from sequoia.redaction import redacted
from sequoia.redis_connection import check_redis, connect
from sequoia.tls import Tls

_EVICTING = ("allkeys-", "volatile-")
_REMEDY = "start one, or say where it is: --redis. Without it the last plans serve, and no new ones are kept"


def look_at_redis(url: str, tls: Tls) -> Iterator[Finding]:
    """Its version, and whether it throws away what it keeps. Nothing is sent in plain text that must not be."""
    try:
        check_redis(url, tls)
        info = asyncio.run(_info(url))
    except (RedisError, OSError, InvalidArgument) as error:
        yield Finding("redis", "bad", redacted(f"{type(error).__name__}: {error}"), _REMEDY)
        return
    server, version = info.get("server_name", "redis"), info.get("redis_version", "?")
    told = f"{server} {version}, {info.get('used_memory_human', '?')} in use"
    policy = str(info.get("maxmemory_policy", ""))
    if policy.startswith(_EVICTING):
        yield Finding(
            "redis", "note", f"{told}; it evicts by {policy}", "plans may vanish: maxmemory-policy noeviction"
        )
    else:
        yield Finding("redis", "good", told)


async def _info(url: str) -> dict[str, Any]:
    async with connect(url) as redis:
        found: dict[str, Any] = await redis.info()
        return found
