"""What a person sees while something long runs: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status

# Takes how far a step is: (parts done, parts in all).
Progress = Callable[[int, int], None]


class Steps:
    """Tells one step after the other. `Steps(Console(quiet=True))` says nothing."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, doing: str) -> Iterator[Progress]:
        """Around one step: said when it begins (on a terminal: a spinner), and with its duration when it is done.

        What it yields takes how far the step is: (parts done, parts in all).
        """
        start = time.monotonic()
        if self._console.is_terminal:
            with Status(doing, console=self._console) as status:
                yield lambda done, total: status.update(f"{doing}: {done} of {total}")
        else:
            self.say(f"{doing} ...")
            yield lambda done, total: None
        self.say(f"{doing}: {time.monotonic() - start:.1f} s")

    def say(self, line: str) -> None:
        """One line, as it is."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()
