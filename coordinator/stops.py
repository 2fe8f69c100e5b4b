"""Stop strings: read from a request, and found in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence

from sequoia.errors import InvalidArgument

MAX_STOPS = 16
MAX_STOP_BYTES = 256


class StopMatcher:
    """Ends a growing text before its first stop string: the first to be complete, of two that end together the longer.

    Holds back exactly the longest suffix that could still become a stop string.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    def push(self, text: str, pending: str = "") -> str:
        """The text now free to go. `pending` follows `text` and is only searched: it comes again or never was."""
        text = self._held + text
        if (start := self._find(text + pending)) is not None:
            self.stopped, self._held = True, ""
            return (text + pending)[:start]
        num_free = len(text) - self._num_held(text)
        self._held = text[num_free:]
        return text[:num_free]

    def flush(self) -> str:
        """The text held back, which can no longer become a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        found = ((text.find(stop), stop) for stop in self._stops)
        spans = [(start + len(stop), start) for start, stop in found if start >= 0]
        return min(spans)[1] if spans else None

    def _num_held(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stops), default=0) - 1)
        sizes = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops))
        return next(sizes, 0)


def parse_stops(raw: Sequence[bytes]) -> tuple[str, ...]:
    """The stop strings of a request. Raises InvalidArgument naming `stop` or `stop[i]`."""
    if len(raw) > MAX_STOPS:
        raise InvalidArgument(f"{len(raw)} stop strings were given; send at most {MAX_STOPS}", "stop")
    return tuple(_parse_stop(stop, f"stop[{index}]") for index, stop in enumerate(raw))


def _parse_stop(stop: bytes, field: str) -> str:
    if not 1 <= len(stop) <= MAX_STOP_BYTES:
        raise InvalidArgument(f"it has {len(stop)} bytes; send 1 to {MAX_STOP_BYTES}", field)
    try:
        return stop.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"byte {error.start} is not UTF-8; send the string encoded as UTF-8", field) from error
