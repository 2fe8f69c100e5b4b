"""Wall clocks of processes that jump while they run, as a clock does that is set. Their monotonic clocks do not.

libfaketime does the same, but looks for its file whenever anybody asks for any clock: 20 requests of chaos.py had not
ended after 75 s with it that take 44 s with this.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from functools import cached_property
from pathlib import Path

_COMPILER = shutil.which("cc")
CAN_JUMP = sys.platform == "linux" and _COMPILER is not None


class Clocks:
    """One for each process that is started with its `environment`; one that starts again has the clock it had."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def environment(self, name: str) -> dict[str, str]:
        """Of the process of this name. Empty where no clock can jump."""
        if not CAN_JUMP:
            return {}
        file = self._file(name)
        if not file.exists():
            file.write_bytes(bytes(8))
        return {"LD_PRELOAD": str(self._library), "WALL_CLOCK": str(file)}

    def jump(self, name: str, seconds: int) -> None:
        """To so many seconds from the true time. The process must have been started."""
        with self._file(name).open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("=q", seconds))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"

    @cached_property
    def _library(self) -> Path:
        assert _COMPILER is not None
        library = self._folder / "wall_clock.so"
        source = Path(__file__).with_name("wall_clock.c")
        subprocess.run([_COMPILER, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
        return library
