"""The body of a request: read within bounds, its fields by type."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from coordinator.gateway.failures import ApiError
from sequoia.errors import InvalidArgument

Value = TypeVar("Value")


async def read_body(request: Request, max_bytes: int, seconds: float) -> Body:
    """The JSON object that was sent. Raises ApiError where it is too large, too slow, or none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of a foreign origin may send any other kind without being asked for leave.
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(request, max_bytes)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s") from error
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return Body(fields)


async def _read(request: Request, max_bytes: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise ApiError(413, f"the body has more than {max_bytes} bytes", code="request_too_large")
    return b"".join(pieces)


class Body:
    """The fields of a JSON object by type: each is a value, or None where it is null or left out.

    All raise InvalidArgument naming the field where it is of another type. `group` is what the names stand in.
    """

    def __init__(self, fields: Mapping[str, Any], group: str = "") -> None:
        self.fields, self._group = fields, group

    def number(self, name: str) -> float | None:
        """A number."""
        value = self._of_type(name, (int, float), "a number")
        # Larger ones are no floats, and JSON has no bounds.
        return None if value is None else float(max(-1e300, min(1e300, value)))

    def whole(self, name: str) -> int | None:
        """A whole number."""
        return self._of_type(name, (int,), "a whole number")

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string that UTF-8 can write: JSON has others."""
        value = self._of_type(name, (str,), "a string")
        if value is not None:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidArgument(f"has half of a surrogate pair at {error.start}", self.name_of(name)) from error
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        return self._of_type(name, (list,), "a list")

    def group(self, name: str) -> Body | None:
        """An object."""
        value = self._of_type(name, (dict,), "an object")
        return None if value is None else Body(value, self.name_of(name))

    def name_of(self, name: str) -> str:
        """As an error names it."""
        return f"{self._group}.{name}" if self._group else name

    def _of_type(self, name: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise self._wrong(name, expected)
        return value

    def _wrong(self, name: str, expected: str) -> InvalidArgument:
        return InvalidArgument(f"{self.fields[name]!r:.80} is not {expected}", self.name_of(name))
