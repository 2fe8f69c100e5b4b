"""Calls of tools in the text of an answer, told apart from what it says, as it grows."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from coordinator.gateway.json_objects import ObjectScanner, members
from coordinator.gateway.tool_use import ToolUse
from coordinator.tool_support import CLOSING, OPENING

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_BLANKS = " \t\n\r"
# Nine letters and digits: some chat templates take no other ids when a call comes back.
_ID_LETTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9


@dataclass(frozen=True, slots=True)
class Begun:
    """A call begins; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments of the call with that index."""

    index: int
    text: str


# What is said is a str.
Part: TypeAlias = str | Begun | Arguments


class Reader(Protocol):
    """Takes an answer piece by piece."""

    def push(self, text: str) -> Iterator[Part]:
        """What this piece sets free; to be read to its end."""

    def finish(self) -> Iterator[Part]:
        """What was held back, at the end of the answer."""

    def finish_reason(self, reason: str) -> str:
        """Why the answer ended, where its text ended for that reason."""


def reader_of(use: ToolUse | None) -> Reader:
    """For one answer to a request that may use tools like that."""
    if use is None:
        return PlainText()
    return ForcedCall(use) if use.is_forced else WrittenCalls(use)


class PlainText:
    """Nothing is a call."""

    def push(self, text: str) -> Iterator[Part]:
        """It as it is."""
        if text:
            yield text

    def finish(self) -> Iterator[Part]:
        """Nothing was held back."""
        yield from ()

    def finish_reason(self, reason: str) -> str:
        """As it was."""
        return reason


class ForcedCall:
    """The whole answer is one call, {"name": ..., "arguments": ...}, to which it is held."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._head: str | None = ""  # None: it has been read
        self._scanner = ObjectScanner()

    def push(self, text: str) -> Iterator[Part]:
        """The arguments as they come, character by character as they are written."""
        if self._head is not None:
            self._head += text
            if (found := _HEAD.match(self._head)) is None:
                return
            yield _begun(0, found[1])
            text, self._head = self._head[found.end() :], None
        if arguments := text[: self._scanner.push(text)]:
            yield Arguments(0, arguments)

    def finish(self) -> Iterator[Part]:
        """A call that was cut before its name, where there is only one that it can be."""
        if self._head is not None and len(self._use.names) == 1:
            yield _begun(0, *self._use.names)

    def finish_reason(self, reason: str) -> str:
        """OpenAI's: of a function that was named it is that of the text."""
        is_chosen = self._use.choice != "named" and self._scanner.is_complete
        return "tool_calls" if is_chosen and reason == "stop" else reason


class WrittenCalls:
    """The text is the model's own; in it `<tool_call>{"name": ..., "arguments": ...}</tool_call>` is a call.

    What is no such object, or calls none of the tools, is text like any other. Blanks around a call belong to it, but
    for those between what is said before and behind.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use, self._num_calls = use, 0
        self._text = ""  # not told yet
        self._opened: _Opened | None = None
        self._has_said = False
        self._gap: str | None = None  # behind a call: what parts text that follows from that before

    def push(self, text: str) -> Iterator[Part]:
        """What can be no part of a call, and calls that are whole."""
        self._text += text
        while not self._is_over:
            if self._opened is None:
                yield from self._say(self._num_free())
            if self._opened is None:
                return
            self._opened.read(self._text)
            if self._opened.is_open:
                return
            yield from self._close(self._opened)

    def finish(self) -> Iterator[Part]:
        """What looked like the beginning of a call."""
        while self._opened is not None and not self._is_over:
            yield from self._reject(self._opened)
            yield from self.push("")
        if not self._is_over:
            yield from self._say(len(self._text))

    def finish_reason(self, reason: str) -> str:
        """Calls are a reason of their own, unless a limit cut the text behind them."""
        return "tool_calls" if self._num_calls and (reason == "stop" or self._is_over) else reason

    @property
    def _is_over(self) -> bool:
        return self._num_calls > 0 and not self._use.allows_several

    def _num_free(self) -> int:
        """Characters before a call, which it opens, or before what may become one."""
        start = self._text.find(OPENING)
        if start >= 0:
            self._opened = _Opened(start + len(OPENING))
        else:
            sizes = (size for size in range(len(OPENING) - 1, 0, -1) if self._text.endswith(OPENING[:size]))
            start = len(self._text) - next(sizes, 0)
        return len(self._text[:start].rstrip(_BLANKS))

    def _say(self, num_characters: int) -> Iterator[Part]:
        said, self._text = self._text[:num_characters], self._text[num_characters:]
        if self._opened is not None:
            self._opened.move(-num_characters)
        if self._gap is not None and (said := said.lstrip(_BLANKS)):
            said, self._gap = self._gap + said, None
        if said:
            self._has_said = True
            yield said

    def _close(self, opened: _Opened) -> Iterator[Part]:
        found = members(opened.body(self._text)) if not opened.is_wrong else None
        if found is None or found.keys() != {"name", "arguments"} or not isinstance(found["arguments"].value, dict):
            yield from self._reject(opened)
            return
        name = found["name"].value
        if not isinstance(name, str) or name not in self._use.names:
            yield from self._reject(opened)
            return
        if self._gap is None:
            self._gap = self._text[: opened.start - len(OPENING)] if self._has_said else ""
        self._text, self._opened = self._text[opened.end :], None
        yield _begun(self._num_calls, name)
        yield Arguments(self._num_calls, found["arguments"].text)
        self._num_calls += 1

    def _reject(self, opened: _Opened) -> Iterator[Part]:
        """The opening is text, and what follows is looked at as such."""
        self._opened = None
        yield from self._say(opened.start)


class _Opened:
    """What stands behind an opening, up to its closing. Places are those of the text that is read."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.is_open, self.is_wrong = True, False
        self._at = start  # read so far; in the end behind the object
        self._scanner = ObjectScanner()

    def move(self, by: int) -> None:
        """The text begins elsewhere."""
        self.start, self.end, self._at = self.start + by, self.end + by, self._at + by

    def body(self, text: str) -> str:
        """The object."""
        return text[self.start : self._at]

    def read(self, text: str) -> None:
        """The text goes on."""
        if not self._scanner.is_complete:
            self._at += self._scanner.push(text[self._at :])
        if self._scanner.is_complete:
            rest = text[self._at :].lstrip(_BLANKS)
            self.end = len(text) - len(rest) + len(CLOSING)
            self.is_open, self.is_wrong = not rest.startswith(CLOSING), not rest.startswith(CLOSING[: len(rest)])
        if self._scanner.is_wrong or self.is_wrong:
            self.is_open, self.is_wrong = False, True


def _begun(index: int, name: str) -> Begun:
    return Begun(index, "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH)), name)
