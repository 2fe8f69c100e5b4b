"""An answer on a terminal as it comes: coloured by who wrote it, with its figures below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sequoia.generation import Chunk, Generation
from sequoia.origins import Origins, Piece

DRAFT_STYLE, TARGET_STYLE = "green", "bold yellow"
_NUM_REFRESHES = 12  # a second


class AnswerView:
    """A context manager that prints chunks: full lines for good; the last line and the figures below it move.

    Without a terminal it prints the text alone.
    """

    def __init__(
        self, console: Console, *, shows_speculation: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock = console, clock
        self._origins = Origins() if shows_speculation else None
        self._line = Text()
        self._num_tokens = self._num_steps = 0
        self._began: float | None = None
        self._last = 0.0
        self._generation: Generation | None = None
        self._live = Live(console=console, refresh_per_second=_NUM_REFRESHES, transient=True)

    def __enter__(self) -> AnswerView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._console.is_terminal:
            self._console.file.write("\n")
            return
        self._live.stop()
        self._console.print(self._line)
        self._console.print(self.figures())

    def show(self, chunk: Chunk) -> None:
        """The next chunk."""
        self._count(chunk)
        if not self._console.is_terminal:
            self._console.file.write(chunk.text)
            self._console.file.flush()
            return
        pieces = self._origins.push(chunk) if self._origins else (Piece(chunk.text, False),)
        for text, is_drafted in pieces:
            self._line.append(text, self._style(is_drafted))
        self._print_full_lines()
        self._live.update(Group(self._line, self.figures()))

    def figures(self) -> Text:
        """Tokens, tokens a second and tokens per step so far; of a finished answer as the coordinator counts them."""
        tokens, generation = self._num_tokens, self._generation
        seconds = self._last - (self._began or 0.0)
        rate = f"{(tokens - 1) / seconds:.1f}" if tokens > 1 and seconds > 0 else "-"
        # The first token is that of the opening, which is no step.
        per_step = (tokens - 1) / (self._num_steps - 1) if self._num_steps > 1 else 0.0
        if generation is not None:
            per_step = generation.speculation.mean_tokens_per_step
        told = f"{tokens} tokens · {rate} tokens/s · {per_step:.2f} tokens/step"
        if generation is not None and generation.speculation.state_reason:
            told += f" · {generation.speculation.state}: {generation.speculation.state_reason}"
        return Text(told, style="dim")

    def _count(self, chunk: Chunk) -> None:
        self._last = self._clock()
        self._began = self._last if self._began is None else self._began
        self._num_tokens += len(chunk.token_ids)
        self._num_steps += 1
        self._generation = chunk.generation

    def _style(self, is_drafted: bool) -> str:
        if self._origins is None:
            return ""
        return DRAFT_STYLE if is_drafted else TARGET_STYLE

    def _print_full_lines(self) -> None:
        *full, self._line = _lines(self._line, self._console.width, self._console)
        for line in full:
            self._console.print(line)


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(("accepted from the draft", DRAFT_STYLE), " · ", ("the target's own", TARGET_STYLE))


def _lines(text: Text, width: int, console: Console) -> Iterable[Text]:
    """At least one; the last may go on."""
    found: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        found += line.wrap(console, width) or [Text()]
    return found or [Text()]
