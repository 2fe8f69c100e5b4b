"""Where workers are: at fixed addresses, or behind names that a DNS resolves to as many as there are now."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from typing import NamedTuple, Protocol

from coordinator.pool import Pool
from sequoia.errors import InvalidArgument

_log = logging.getLogger(__name__)

SCHEME = "dns:///"
LOOKUP_SECONDS = 5.0
# A resolver that hangs must not hold up the other names for longer.
_TIMEOUT_SECONDS = 10.0


class Name(NamedTuple):
    """A name with one record for each worker, such as a headless Service's, and the port of all of them."""

    host: str
    port: int


class Places(NamedTuple):
    """Where the workers of one role are."""

    addresses: tuple[str, ...]
    names: tuple[Name, ...]


class Resolver(Protocol):
    """Looks a name up. Raises OSError where that fails."""

    async def __call__(self, name: Name) -> frozenset[str]:
        """An address, HOST:PORT, for each A and AAAA record."""


async def resolve(name: Name) -> frozenset[str]:
    """As this machine resolves names."""
    found = await asyncio.get_running_loop().getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    hosts = {str(address[0]) for *_, address in found}
    return frozenset(f"[{host}]:{name.port}" if ":" in host else f"{host}:{name.port}" for host in hosts)


def parse_places(text: str) -> Places:
    """A list with commas of HOST:PORT, unix:PATH and dns:///NAME:PORT. Raises ValueError for a name without a port."""
    each = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    names = tuple(_name(part) for part in each if part.startswith("dns:"))
    return Places(tuple(part for part in each if not part.startswith("dns:")), names)


def _name(text: str) -> Name:
    host, _, port = text.removeprefix(SCHEME).rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if not text.startswith(SCHEME) or not host or "/" in host or not is_port:
        raise ValueError(f"{text!r} is no name to look up; write {SCHEME}NAME:PORT")
    host.encode("idna")  # as a lookup would: raises UnicodeError, a ValueError
    return Name(host, int(port))


class Discovery:
    """Keeps a pool to what its names stand for, once `begin` was called, as long as `follow` runs."""

    def __init__(self, pool: Pool, places: Places, resolver: Resolver, seconds: float) -> None:
        self._pool, self._places, self._resolver, self._seconds = pool, places, resolver, seconds
        self._known: dict[Name, frozenset[str]] = dict.fromkeys(places.names, frozenset())
        self._problems: dict[Name, str] = {}

    async def begin(self, timeout_seconds: float) -> None:
        """Look until somebody is found, or time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while True:
                    if await self._look() or not self._places.names:
                        return
                    await asyncio.sleep(min(1.0, self._seconds))

    async def follow(self) -> None:
        """Look again and again."""
        while self._places.names:
            await asyncio.sleep(self._seconds)
            try:
                await self._look()
            except InvalidArgument as error:
                # Certificates that are being written, say.
                _log.warning("new workers are left out", extra={"reason": str(error)})

    async def _look(self) -> frozenset[str]:
        await asyncio.gather(*map(self._look_up, self._places.names))
        found = {address: name.host for name, addresses in self._known.items() for address in addresses}
        found |= dict.fromkeys(self._places.addresses, "")
        self._pool.problem = "; ".join(self._problems.values())
        await self._pool.follow(found)
        return frozenset(found)

    async def _look_up(self, name: Name) -> None:
        """What was known stays where a lookup fails: a DNS that is away is no reason to leave workers that are not."""
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                self._known[name] = await self._resolver(name)
        except OSError as error:
            problem = f"{name.host} cannot be looked up: {error or type(error).__name__}"
            if problem != self._problems.get(name):
                _log.warning("lookup failed", extra={"host": name.host, "reason": problem})
            self._problems[name] = problem
        else:
            if self._problems.pop(name, ""):
                _log.info("lookup works again", extra={"host": name.host})
