"""What each rule makes of the same prompts on a running system, paired with plain decoding: tokens a step, and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sequoia.client import Client, Generation
from sequoia.topology import Topology
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.v1.worker_pb2 import WorkerDescription

OFF = "off"
# Answered once by every mode before anything is counted.
_NUM_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the system: every prompt in every round, once by each rule and once plainly."""

    prompts: tuple[str, ...]
    rules: tuple[str, ...]
    tree: Topology
    num_rounds: int
    max_tokens: int  # at least 2: the first is not timed

    @property
    def modes(self) -> tuple[str, ...]:
        """Plain decoding and the rules."""
        return (OFF, *self.rules)


@dataclass(frozen=True, slots=True)
class RuleTiming:
    """One mode's answers at one temperature, and plain decoding's answers to the same prompts beside them."""

    temperature: float
    mode: str
    answers: tuple[Generation, ...]
    plain_answers: tuple[Generation, ...]

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """After the first token, one an answer."""
        return tuple(1.0 / _seconds(each) for each in self.answers)

    @property
    def seconds_per_token(self) -> float:
        """The median over the answers, the first token left out."""
        return median(map(_seconds, self.answers))

    @property
    def ratios_to_off(self) -> tuple[float, ...]:
        """Speed by that of the plain answer to the same prompt in the same round."""
        pairs = zip(self.answers, self.plain_answers, strict=True)
        return tuple(_seconds(plain) / _seconds(answer) for answer, plain in pairs)

    @property
    def tokens_per_step(self) -> float:
        """Over the steps of all answers: accepted tokens and the bonus token."""
        num_accepted = sum(each.speculation.num_accepted_tokens for each in self.answers)
        return (num_accepted + self.num_steps) / self.num_steps

    @property
    def acceptance_at_rank_0(self) -> float | None:
        """P(the first child is the accepted one | its parent was reached); None when no child was offered."""
        num_offered = sum(_first(each.speculation.offered_by_rank) for each in self.answers)
        num_accepted = sum(_first(each.speculation.accepted_by_rank) for each in self.answers)
        return num_accepted / num_offered if num_offered else None

    @property
    def num_steps(self) -> int:
        """Of all answers, those decoded plainly included."""
        return sum(each.speculation.num_steps for each in self.answers)

    @property
    def num_fallback_steps(self) -> int:
        """Steps that were to be drafted and were decoded plainly."""
        return sum(each.speculation.num_fallback_steps for each in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "temperature": self.temperature,
            "rule": self.mode,
            "num_answers": len(self.answers),
            "seconds_per_token": self.seconds_per_token,
            "tokens_per_second": _spread(self.tokens_per_second),
            "ratio_to_off": _spread(self.ratios_to_off),
            "tokens_per_step": self.tokens_per_step,
            "acceptance_at_rank_0": self.acceptance_at_rank_0,
            "num_steps": self.num_steps,
            "num_fallback_steps": self.num_fallback_steps,
        }


def measure(
    client: Client, temperatures: Sequence[float], workload: Workload, on_progress: Callable[[int, int], None]
) -> list[RuleTiming]:
    """Every mode at every temperature, by temperature first.

    All modes answer a prompt one right after the other, so that what else the machine does meets them alike; each
    prompt begins with the next mode. `on_progress` is called with (answers done, answers in all).
    """
    modes = workload.modes
    prompts = workload.prompts * workload.num_rounds
    found: list[RuleTiming] = []
    for temperature in temperatures:
        for mode in modes:
            _answer(client, workload, prompts[0], temperature, mode, _NUM_WARM_UP_TOKENS)
        answers: dict[str, list[Generation]] = {mode: [] for mode in modes}
        for index, prompt in enumerate(prompts):
            on_progress(len(found) * len(prompts) + index * len(modes), len(temperatures) * len(prompts) * len(modes))
            for mode in _rotated(modes, index):
                answers[mode].append(_answer(client, workload, prompt, temperature, mode, workload.max_tokens))
        plain = tuple(answers[OFF])
        found += [RuleTiming(temperature, mode, tuple(each), plain) for mode, each in answers.items()]
    return found


def to_dict(pair: DescribePairResponse, workload: Workload, found: Sequence[RuleTiming]) -> dict[str, Any]:
    """Ready for JSON: the figures, and all that they depend on."""
    return {
        "target": worker_to_dict(pair.verify),
        "draft": worker_to_dict(pair.draft),
        "tree": list(workload.tree.parents),
        "num_prompts": len(workload.prompts),
        "num_rounds": workload.num_rounds,
        "max_tokens": workload.max_tokens,
        "results": [each.to_dict() for each in found],
    }


def worker_to_dict(worker: WorkerDescription) -> dict[str, str]:
    """What a worker runs, ready for JSON."""
    return {
        "model": worker.model,
        "revision": worker.model_revision,
        "dtype": worker.dtype,
        "quantization": worker.quantization,
        "hardware": worker.hardware_key,
    }


def _answer(
    client: Client, workload: Workload, prompt: str, temperature: float, mode: str, max_tokens: int
) -> Generation:
    return client.generate(
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=True,
        rule=None if mode == OFF else mode,
        speculation="off" if mode == OFF else workload.tree,
    )


def _rotated(modes: tuple[str, ...], count: int) -> tuple[str, ...]:
    first = count % len(modes)
    return modes[first:] + modes[:first]


def _seconds(answer: Generation) -> float:
    return answer.usage.time_per_output_token_seconds


def _first(counts: Sequence[int]) -> int:
    return counts[0] if counts else 0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}
