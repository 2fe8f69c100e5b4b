"""To coordinators: where they are, what each call shows them, and how long it may take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic

from sequoia.access import Access, bearer, tls_of
from sequoia.channels import Channel, Channels
from sequoia.errors import Cancelled, InvalidArgument
from sequoia.request_scope import call_metadata
from sequoia.tls import Tls
from sequoia.v1.coordinator_pb2_grpc import CoordinatorServiceStub

DEFAULT_ADDRESS = "127.0.0.1:50600"


class Connection(Generic[Channel]):
    """To one coordinator or several, in the order of `address`, each over channels that `open_one` makes.

    Raises InvalidArgument for no address, for another host without TLS, and for a wrong timeout or token.
    """

    def __init__(
        self, address: str, timeout_seconds: float, access: Access, open_one: Callable[[str, Tls], Channel]
    ) -> None:
        self.addresses, self.is_closed = _split(address), False
        self._timeout_seconds = _checked(timeout_seconds)
        self.metadata, tls = bearer(access.get("token")), tls_of(access)
        self._channels: list[Channels[Channel]] = [Channels(each, tls, open_one) for each in self.addresses]

    def close(self) -> list[Channel]:
        """Nobody is lost from now on. Returns the channels: it is the caller who closes them, in its way."""
        self.is_closed = True
        return [channel for channels in self._channels for channel in channels.all]

    def with_token(self, token: str) -> Connection[Channel]:
        """The same channels for somebody with another token."""
        other = copy.copy(self)
        other.metadata = bearer(token)
        return other

    def stub(self, place: int) -> CoordinatorServiceStub:
        """For the next call to the coordinator at that place. Raises Cancelled where the connection is closed."""
        if self.is_closed:
            raise Cancelled("the client is closed")
        return CoordinatorServiceStub(self._channels[place].current)

    @property
    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """Who asks, and for which request."""
        return (*self.metadata, *call_metadata())

    def timeout(self, seconds: float | None) -> float:
        """What was given, or the default. Raises InvalidArgument naming `timeout_seconds`."""
        return self._timeout_seconds if seconds is None else _checked(seconds)


def _split(addresses: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(filter(None, (each.strip() for each in addresses.split(",")))))
    if not found:
        raise InvalidArgument("none is given", "address")
    return found


def _checked(timeout_seconds: float) -> float:
    if not isinstance(timeout_seconds, int | float) or not timeout_seconds > 0:
        raise InvalidArgument(f"{timeout_seconds!r} is not a positive number", "timeout_seconds")
    return timeout_seconds
