"""What a person sees while a load runs: a bar with its rate on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sequoia.cli.load.running import Live

_COLUMNS = "{task.description}", "{task.fields[running]} run, {task.fields[rate]:.0f} tokens/s"


class LiveView:
    """Shows one run after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def run(self, doing: str, total: int) -> Iterator[Callable[[Live], None]]:
        """Around one run: what it yields is told whenever something changed."""
        start, last = time.monotonic(), Live(total, lambda _: None)

        def show(live: Live) -> None:
            nonlocal last
            last = live
            progress.update(task, completed=live.num_ended, running=live.num_running, rate=live.tokens_per_second)

        name, rate = map(TextColumn, _COLUMNS)
        columns = (name, BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
        is_shown = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not is_shown) as progress:
            task = progress.add_task(doing, total=total, running=0, rate=0.0)
            yield show
        seconds = time.monotonic() - start
        line = f"{doing}: {last.num_ended} requests, {last.num_tokens / seconds:.0f} tokens/s, {seconds:.1f} s"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
