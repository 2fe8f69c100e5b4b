"""Files that are read again when they have changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TypeAlias

_Stamp: TypeAlias = tuple[tuple[int, ...], ...]


class WatchedFiles:
    """Tells once of every change of some files: their times, sizes, or which files their names stand for.

    From any thread. A file that is missing is a change, and one that comes back another.
    """

    def __init__(self, *paths: str) -> None:
        self._paths = tuple(map(Path, filter(None, paths)))
        self._lock = Lock()
        self._stamp = _stamp(self._paths)

    def changed(self) -> bool:
        """Whether they have since this was last asked, or since the beginning."""
        with self._lock:
            before, self._stamp = self._stamp, _stamp(self._paths)
            return self._stamp != before

    @property
    def names(self) -> str:
        """Theirs."""
        return ", ".join(map(str, self._paths))

    def again(self) -> None:
        """What was read does not fit together yet: the next look is told of a change."""
        with self._lock:
            self._stamp = ()


def _stamp(paths: Sequence[Path]) -> _Stamp:
    return tuple(map(_stamp_of, paths))


def _stamp_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
