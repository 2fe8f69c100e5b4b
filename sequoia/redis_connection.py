"""How this system talks to Redis."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from sequoia.addresses import is_loopback
from sequoia.errors import InvalidArgument
from sequoia.redaction import redacted
from sequoia.tls import Tls, warn_or_refuse

_SOCKET_TIMEOUT_SECONDS = 1.0


def connect(url: str) -> Redis:
    """A client whose calls give up after about a second. Raises InvalidArgument naming `redis` for what is no URL.

    `rediss://USER:PASSWORD@HOST:6380/0?ssl_ca_certs=FILE` is one with TLS: certificate and host are checked.
    """
    is_tls = url.startswith("rediss:")
    checked: dict[str, Any] = {"ssl_cert_reqs": "required", "ssl_check_hostname": True} if is_tls else {}
    try:
        return Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=_SOCKET_TIMEOUT_SECONDS,
            # Once more at once: a restarted server has closed the connections of the pool.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
            **checked,
        )
    except ValueError as error:
        # What a URL parser says may have parts of a password in it.
        raise InvalidArgument(f"{redacted(url)!r} is no Redis URL", "redis") from error


def check_redis(url: str, tls: Tls) -> None:
    """Raises InvalidArgument naming `redis` for plain text to another host, or TLS that believes anybody."""
    try:
        parts = urlsplit(url)
        host, options = parts.hostname or "localhost", parse_qs(parts.query)
    except ValueError as error:
        raise InvalidArgument("is no Redis URL", "redis") from error
    if parts.scheme == "unix" or is_loopback(host):
        return
    if parts.scheme != "rediss":
        problem = f"{redacted(url)} is another host, and the connection would be plain text"
        warn_or_refuse(problem, tls, "a rediss:// URL", "redis")
    elif _is_blind(options):
        warn_or_refuse(f"{redacted(url)} does not check who answers", tls, "ssl_ca_certs=FILE instead", "redis")


def _is_blind(options: dict[str, list[str]]) -> bool:
    """Whether a URL turns off what TLS is for."""
    reqs, checks = options.get("ssl_cert_reqs", ["required"]), options.get("ssl_check_hostname", ["true"])
    return reqs != ["required"] or checks[0].lower() not in ("true", "1", "yes")
