"""Channels that follow the files of their certificates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from sequoia.credentials import Renewed
from sequoia.tls import Tls

Channel = TypeVar("Channel")


class Channels(Generic[Channel]):
    """A channel to an address, and a new one whenever the files have changed: a certificate lasts for months or days.

    Calls that run go on over the old one. It is kept until the end: after half an hour without calls gRPC closes its
    connection by itself. Raises InvalidArgument as `open_channel` does.
    """

    def __init__(self, address: str, tls: Tls, open_one: Callable[[str, Tls], Channel]) -> None:
        self.all: list[Channel] = []

        def make() -> Channel:
            channel = open_one(address, tls)
            self.all.append(channel)
            return channel

        self._renewed: Renewed[Channel] = Renewed(tls.watched(), make)

    @property
    def current(self) -> Channel:
        """The one for the next call."""
        self._renewed.news()
        return self._renewed.value
