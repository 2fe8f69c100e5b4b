"""Two systems of the same models that differ in one setting: both answer each prompt, one at work at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from sequoia.cli.access_flags import access_of
from sequoia.cli.benchmarks.modes import Mode, TreeWorkload
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Client, Generation
from sequoia.process_memory import available_bytes, peak_bytes
from sequoia.v1.coordinator_pb2 import DescribePairResponse

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two systems."""

    name: str
    settings: DeploymentSettings


@dataclass(frozen=True, slots=True)
class SideAnswer:
    """What a side answered to a prompt in a round."""

    side: str
    mode: Mode
    shape: str
    prompt: BenchPrompt
    round: int
    generation: Generation

    @property
    def seconds_per_token(self) -> float:
        """After the first token."""
        return self.generation.usage.time_per_output_token_seconds


class Compared(NamedTuple):
    """All answers, and how they came to be."""

    pair: DescribePairResponse
    were_together: bool  # both systems were up, the other one idle
    answers: list[SideAnswer]


class _System(NamedTuple):
    side: Side
    client: Client
    process_ids: list[int]


class _Turn(NamedTuple):
    system: _System
    mode: Mode
    shape: str
    prompt: BenchPrompt
    round: int


def compare(sides: tuple[Side, Side], workload: TreeWorkload, steps: Steps, *, one_at_a_time: bool) -> Compared:
    """Both sides up at once, where memory allows it and nobody says otherwise: each answers a prompt right after the
    other, the next one first at each prompt. On CPUs an idle system takes memory only: its threads sleep.

    One at a time: every round starts both sides, one after the other has stopped, the next one first in each round.
    Pairs are then minutes apart, and drift of the machine does not cancel.
    """
    if not one_at_a_time:
        with _serving(sides[0], steps) as first:
            if _has_room(first, steps):
                with _serving(sides[1], steps) as second:
                    return Compared(first.client.describe_pair(), True, _together((first, second), workload, steps))
    return _apart(sides, workload, steps)


@contextmanager
def _serving(side: Side, steps: Steps) -> Iterator[_System]:
    log_dir = side.settings.log_dir
    settings = replace(side.settings, log_dir=log_dir / side.name) if log_dir else side.settings
    steps.say(f"the system {side.name}:")
    with Deployment(settings, steps) as deployment, Client(deployment.address, **access_of()) as client:
        yield _System(side, client, [each.pid for each in deployment.processes.values()])


def _has_room(first: _System, steps: Steps) -> bool:
    """Whether a second system fits beside the first, as far as the machine tells."""
    peak, available = peak_bytes(first.process_ids), available_bytes()
    if peak is None or available is None or peak <= available:
        return True
    steps.say(f"one at a time: a system takes {peak / _GIB:.1f} GiB, and {available / _GIB:.1f} are left")
    return False


def _together(systems: tuple[_System, _System], workload: TreeWorkload, steps: Steps) -> list[SideAnswer]:
    for system in systems:
        workload.warm_up(system.client)
    return _answers(workload, _turns(systems, workload, workload.asking.rounds()), steps)


def _apart(sides: tuple[Side, Side], workload: TreeWorkload, steps: Steps) -> Compared:
    asking, answers = workload.asking, []
    for number in range(asking.num_rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            with _serving(side, steps) as system:
                workload.warm_up(system.client)
                pair = system.client.describe_pair()
                rounds = [(number, prompt) for prompt in asking.prompts]
                answers += _answers(workload, _turns((system,), workload, rounds), steps)
    return Compared(pair, False, answers)


def _turns(
    systems: Sequence[_System], workload: TreeWorkload, rounds: Iterable[tuple[int, BenchPrompt]]
) -> list[_Turn]:
    """The other system is first at every next tree, and at every next prompt."""
    return [
        _Turn(system, mode, shape, prompt, number)
        for index, (number, prompt) in enumerate(rounds)
        for place, (mode, shape) in enumerate(workload.cells)
        for system in (systems if (index + place) % 2 == 0 else systems[::-1])
    ]


def _answers(workload: TreeWorkload, turns: Sequence[_Turn], steps: Steps) -> list[SideAnswer]:
    found: list[SideAnswer] = []
    with steps.step(f"{len(turns)} answers") as on_progress:
        for system, mode, shape, prompt, number in turns:
            on_progress(len(found), len(turns))
            generation = workload.answer(system.client, mode, shape, prompt)
            found.append(SideAnswer(system.side.name, mode, shape, prompt, number, generation))
    return found
