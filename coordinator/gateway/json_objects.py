"""JSON objects in a text that grows: where one ends, and what the members of one are, as they are written."""

from __future__ import annotations

import json
from typing import NamedTuple, NoReturn

_BLANKS = " \t\n\r"
# What a JSON text has outside of strings.
_OUTSIDE = frozenset('{}[]:,"+-.0123456789aeflnrstuE' + _BLANKS)


class ObjectScanner:
    """Reads one object, after blanks, character by character up to its end. What it lets pass may still be no JSON."""

    def __init__(self) -> None:
        self.is_complete = self.is_wrong = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, text: str) -> int:
        """How many of these characters belong to the object: not all where it ends, or where it cannot be one."""
        for index, character in enumerate(text):
            if self.is_complete or self.is_wrong:
                return index
            self._read(character)
        return len(text)

    def _read(self, character: str) -> None:
        if self._in_string:
            self._read_in_string(character)
        elif character not in _OUTSIDE or (not self._depth and character not in "{" + _BLANKS):
            self.is_wrong = True
        else:
            self._in_string = character == '"'
            self._depth += (character == "{") - (character == "}")
            self.is_complete = character == "}" and not self._depth

    def _read_in_string(self, character: str) -> None:
        self.is_wrong = character < " "
        self._in_string = self._is_escaped or character != '"'
        self._is_escaped = character == "\\" and not self._is_escaped


class Member(NamedTuple):
    """Of an object."""

    value: object  # None for numbers: `text` has them as they are written
    text: str  # of the value


def members(text: str) -> dict[str, Member] | None:
    """Of the object that the text is; None where it is none, or has a name twice."""
    found: dict[str, Member] = {}
    try:
        at = _skipped(text, 0, "{")
        while text[at] != "}":
            name, at = _decode(text, _skipped(text, at, "," if found else ""))
            start = _skipped(text, at, ":")
            value, end = _decode(text, start)
            if not isinstance(name, str) or name in found:
                return None
            found[name] = Member(value, text[start:end])
            at = _skipped(text, end, "")
    except (ValueError, IndexError, RecursionError):
        return None
    return found if not text[at + 1 :].strip(_BLANKS) else None


def _skipped(text: str, at: int, sign: str) -> int:
    """The place behind the sign and the blanks around it."""
    at = _behind_blanks(text, at)
    if not text.startswith(sign, at):
        raise ValueError(f"{sign} is missing")
    return _behind_blanks(text, at + len(sign))


def _behind_blanks(text: str, at: int) -> int:
    while text[at] in _BLANKS:
        at += 1
    return at


def _no_number(text: str) -> None:
    """They may be too large for Python, and nobody asks for them."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not in JSON")


_decode = json.JSONDecoder(parse_int=_no_number, parse_float=_no_number, parse_constant=_no_constant).raw_decode
