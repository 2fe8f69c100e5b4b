"""How this system talks to Redis."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from sequoia.errors import InvalidArgument

_SOCKET_TIMEOUT_SECONDS = 1.0


def connect(url: str) -> Redis:
    """A client whose calls give up after about a second. Raises InvalidArgument naming `redis` for what is no URL."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=_SOCKET_TIMEOUT_SECONDS,
            # Once more at once: a restarted server has closed the connections of the pool.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
        )
    except ValueError as error:
        raise InvalidArgument(f"{url!r} is no Redis URL: {error}", "redis") from error
