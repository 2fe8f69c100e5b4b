"""Moderate load with a fault in every request, for long: `python tests/soak.py --minutes 60`.

Three clients ask, read and think. Prints what tests/chaos.py prints, and what all processes held in memory meanwhile;
exits with 1 when an answer was not the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from chaos import Chaos, chaos
from rich.console import Console

from sequoia.cli.steps import Steps
from sequoia.process_memory import anonymous_bytes

_SAMPLE_SECONDS, _MIB = 10.0, 2**20


class Memory:
    """What the cluster's processes hold beside mapped files, sampled; those that are down at the time hold nothing."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos, self._next = chaos, time.monotonic()
        self._samples: list[float] = []

    def look(self) -> None:
        """Once in a while."""
        if time.monotonic() >= self._next:
            self._next += _SAMPLE_SECONDS
            held = [anonymous_bytes(each) or 0 for each in self._chaos.process_ids]
            self._samples.append(sum(held) / _MIB)

    def to_dict(self) -> dict[str, float]:
        """Medians of each quarter of the time, and the most, in MiB."""
        samples, quarter = self._samples, max(1, len(self._samples) // 4)
        by_quarter = {
            f"quarter_{at + 1}": round(median(samples[at * quarter : (at + 1) * quarter] or samples)) for at in range(4)
        }
        return {**by_quarter, "most": round(max(samples))}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Moderate load with a fault in every request, for long.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    begun, seconds = time.monotonic(), arguments.minutes * 60.0
    with tempfile.TemporaryDirectory() as folder, chaos(arguments.seed, Path(folder)) as run:
        memory = Memory(run)
        with Steps(Console(stderr=True)).step("seconds") as on_progress:

            def look(_: int) -> None:
                memory.look()
                on_progress(min(round(time.monotonic() - begun), round(seconds)), round(seconds))

            outcome = run.soak(seconds, arguments.clients, look)
    print(json.dumps({**outcome.to_dict(), "memory_mib": memory.to_dict()}, indent=2))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
