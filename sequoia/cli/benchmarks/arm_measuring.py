"""Arms in turn: every prompt answered by each, one right after the other, nobody else at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.client import StageSeconds

OFF = "off"
# Answered once by every arm before anything is counted.
_NUM_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One answer. `num_step_tokens` were committed by `num_steps` forwards of the target; None where nobody knows."""

    token_ids: tuple[int, ...]
    seconds: float  # from the request to the last token
    first_token_seconds: float
    num_steps: int | None = None
    num_step_tokens: int | None = None
    stage_seconds: StageSeconds | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token (TPOT); None for fewer than two."""
        num_tokens = len(self.token_ids) - 1
        return (self.seconds - self.first_token_seconds) / num_tokens if num_tokens > 0 else None

    @property
    def tokens_per_second(self) -> float:
        """From end to end, prefill included."""
        return len(self.token_ids) / self.seconds


class Arm(Protocol):
    """A way to decode. `answer` raises PeerFailed when the benchmark is to go on without it."""

    @property
    def name(self) -> str: ...

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """What an arm made of a prompt in a round."""

    arm: str
    prompt: BenchPrompt
    round: int
    answer: ArmAnswer

    @property
    def key(self) -> tuple[str, str, int]:
        """The same for all arms."""
        return self.prompt.category, self.prompt.name, self.round

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = {"arm": self.arm, "category": self.prompt.category, "prompt": self.prompt.name, "round": self.round}
        return {**names, **asdict(self.answer)}


@dataclass(frozen=True, slots=True)
class Measured:
    """All samples of the arms that lasted, and why the others did not."""

    samples: tuple[Sample, ...]
    unavailable: dict[str, str]


def measure(arms: Sequence[Arm], asking: Asking, on_progress: Callable[[int, int], None]) -> Measured:
    """Each prompt begins with the next arm; `on_progress` is called with (answers done, answers in all)."""
    turns = _Turns(list(arms))
    turns.take(asking.prompts[0], _NUM_WARM_UP_TOKENS, first=0)
    samples: list[Sample] = []
    for index, (number, prompt) in enumerate(asking.rounds()):
        on_progress(index * len(turns.arms), asking.num_answers * len(turns.arms))
        answers = turns.take(prompt, asking.max_tokens, first=index)
        samples += [Sample(name, prompt, number, answer) for name, answer in answers.items()]
    return Measured(tuple(each for each in samples if each.arm not in turns.unavailable), turns.unavailable)


class _Turns:
    """The arms that still answer."""

    def __init__(self, arms: list[Arm]) -> None:
        self.arms = arms
        self.unavailable: dict[str, str] = {}

    def take(self, prompt: BenchPrompt, max_tokens: int, first: int) -> dict[str, ArmAnswer]:
        """By arm, in the order of the turns; an arm that fails is left out from here on."""
        start = first % len(self.arms)
        answers: dict[str, ArmAnswer] = {}
        for arm in self.arms[start:] + self.arms[:start]:
            try:
                answers[arm.name] = arm.answer(prompt, max_tokens)
            except PeerFailed as error:
                self.unavailable[arm.name] = str(error)
        self.arms = [arm for arm in self.arms if arm.name not in self.unavailable]
        return answers
