"""Requests of which each meets a fault: `python tests/chaos.py --requests 500 --seed 1`.

Every answer must be the undisturbed one, none may hang, and no worker may hold a slot in the end. Prints how often each
fault was survived, and exits with 1 when one was not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clocks import Clocks
from cluster import Cluster
from faults import Faults
from rich.console import Console
from tiny_models import write_tiny_pair

from sequoia.cli.steps import Steps
from sequoia.errors import SequoiaError
from sequoia.topology import Topology

_TREE = Topology((-1, 0, 0, 1, 1, 3))
_PROMPTS = [list(range(start, start + length)) for start, length in ((40, 30), (60, 5), (90, 120), (20, 64))]
_HOW: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    {"temperature": 0, "frequency_penalty": 0.4, "logprobs": 1},
]
_NUM_TOKENS = 300
_LONGEST_SECONDS = 60.0
_THINKING_SECONDS = 2.0  # of a client between two requests, on average, in a soak


@dataclass
class Outcome:
    """What a run came to."""

    survived: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0

    @property
    def num_requests(self) -> int:
        """That have ended."""
        return self.survived.total() + len(self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        survived = dict(sorted(self.survived.items()))
        return {
            "survived": survived,
            "num_survived": self.survived.total(),
            "problems": self.problems[:20],
            "num_problems": len(self.problems),
            "slowest_seconds": round(self.slowest_seconds, 2),
        }


class Chaos:
    """Faults on a cluster whose dead workers are started again at once, as an orchestrator does."""

    def __init__(self, cluster: Cluster, faults: Faults, seed: int) -> None:
        self._cluster, self._faults = cluster, faults
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._expected: dict[tuple[int, int], tuple[int, ...]] = {}
        self.outcome = Outcome()

    @property
    def process_ids(self) -> list[int]:
        """Of the cluster."""
        return self._cluster.process_ids

    def run(self, num_requests: int, num_clients: int, on_progress: Callable[[int], None] = lambda _: None) -> Outcome:
        """All requests, some at a time."""
        seeds = [self._random.random() for _ in range(num_requests)]
        return self._drive([lambda seed=seed: self._one(seed) for seed in seeds], num_clients, on_progress)  # type: ignore[misc]

    def soak(self, seconds: float, num_clients: int, on_progress: Callable[[int], None] = lambda _: None) -> Outcome:
        """Clients that ask, read and think, for so long."""
        end = time.monotonic() + seconds

        def client(seed: float) -> None:
            choose = random.Random(seed)
            while time.monotonic() < end:
                self._one(choose.random())
                time.sleep(choose.expovariate(1.0 / _THINKING_SECONDS))

        seeds = [self._random.random() for _ in range(num_clients)]
        return self._drive([lambda seed=seed: client(seed) for seed in seeds], num_clients, on_progress)  # type: ignore[misc]

    def _drive(self, jobs: list[Callable[[], None]], at_once: int, on_progress: Callable[[int], None]) -> Outcome:
        for prompt in range(len(_PROMPTS)):
            for how in range(len(_HOW)):
                self._expected[prompt, how] = self._undisturbed(prompt, how)
        with ThreadPoolExecutor(at_once) as pool:
            running = [pool.submit(job) for job in jobs]
            while not all(each.done() for each in running):
                self._faults.restart_ended()
                on_progress(self.outcome.num_requests)
            for each in running:
                each.result()
        self._faults.restart_ended()
        try:
            for name in self._cluster.all_names:
                self._wait_until_serving(name)
            self._cluster.wait_until_free(30)
        except AssertionError as error:
            self.outcome.problems.append(f"in the end: {error}")
        return self.outcome

    def _undisturbed(self, prompt: int, how: int) -> tuple[int, ...]:
        asked = {"max_tokens": _NUM_TOKENS, "ignore_eos": True, "speculation": "off", **_HOW[how]}
        return self._cluster.client.generate(_PROMPTS[prompt], **asked).token_ids

    def _one(self, seed: float) -> None:
        """A request, and a fault at some place of its answer."""
        choose = random.Random(seed)
        prompt, how = choose.randrange(len(_PROMPTS)), choose.randrange(len(_HOW))
        fault, role = choose.choice([*self._faults.names, "cancel"]), choose.choice(("verify", "draft", "coordinator"))
        name = fault if fault == "cancel" else f"{fault} {role}"
        speculation: Any = choose.choice((_TREE, _TREE, "auto", "off"))
        started = time.monotonic()
        try:
            found = self._ask(prompt, how, speculation, fault, role, choose)
        except SequoiaError as error:
            self._note(name, f"{type(error).__name__}: {error}", started)
            return
        expected = self._expected[prompt, how]
        if fault == "cancel":
            expected = expected[: len(found)]
        problem = "" if found == expected else f"{len(found)} tokens, another text from {_parting(found, expected)}"
        self._note(name, problem, started)

    def _ask(
        self, prompt: int, how: int, speculation: Any, fault: str, role: str, choose: random.Random
    ) -> tuple[int, ...]:
        asked = {"max_tokens": _NUM_TOKENS, "ignore_eos": True, "speculation": speculation, **_HOW[how]}
        stream, token_ids = self._cluster.client.stream(_PROMPTS[prompt], **asked), list[int]()
        place, is_due = choose.randrange(_NUM_TOKENS * 3 // 4), True
        for chunk in stream:
            token_ids += chunk.token_ids
            if is_due and len(token_ids) > place:
                is_due = False
                if fault == "cancel":
                    stream.close()
                    break
                self._faults.happen(fault, choose.choice(self._cluster.names(role)), choose)
        return tuple(token_ids)

    def _note(self, name: str, problem: str, started: float) -> None:
        seconds = time.monotonic() - started
        if not problem and seconds > _LONGEST_SECONDS:
            problem = f"took {seconds:.0f} s"
        with self._lock:
            self.outcome.slowest_seconds = max(self.outcome.slowest_seconds, seconds)
            if problem:
                self.outcome.problems.append(f"{name}: {problem}")
            else:
                self.outcome.survived[name] += 1

    def _wait_until_serving(self, worker: str) -> None:
        deadline = time.monotonic() + 60
        while not self._cluster.is_serving(worker):
            assert time.monotonic() < deadline, f"{worker} does not serve"
            time.sleep(0.1)


def _parting(found: tuple[int, ...], expected: tuple[int, ...]) -> int:
    pairs = zip(found, expected, strict=False)
    return next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(found), len(expected)))


@contextmanager
def chaos(seed: int, folder: Path) -> Iterator[Chaos]:
    """On a fresh cluster of tiny float32 models."""
    (folder / "logs").mkdir()
    clocks = Clocks(folder)
    with Cluster(write_tiny_pair(folder), folder / "logs", num_coordinators=2, clocks=clocks) as cluster:
        yield Chaos(cluster, Faults(cluster, clocks), seed)


def run(num_requests: int, seed: int, folder: Path, on_progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Three clients at a time."""
    with chaos(seed, folder) as run:
        return run.run(num_requests, 3, on_progress)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Requests of which each meets a fault.")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, Steps(Console(stderr=True)).step("requests") as on_progress:
        outcome = run(
            arguments.requests, arguments.seed, Path(folder), lambda done: on_progress(done, arguments.requests)
        )
    print(json.dumps(outcome.to_dict(), indent=2))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
