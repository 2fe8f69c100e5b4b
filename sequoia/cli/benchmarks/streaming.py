"""Answers of a system whose target is offloaded: what its forwards took, and how much faster they could have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, Protocol

from sequoia.cli.benchmarks.arm_figures import ArmFigures
from sequoia.cli.benchmarks.arm_measuring import Arm, ArmAnswer
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.errors import InvalidArgument
from sequoia.planner import PricedTree
from sequoia.v1 import worker_pb2, worker_pb2_grpc


@dataclass(frozen=True, slots=True)
class Streamed:
    """What some forwards took together; those of prompts are among them."""

    num_forwards: int
    num_bytes: int  # read from the slower tier
    read_seconds: float  # in which it was read, in parts beside the forwards
    forward_seconds: float
    stall_seconds: float  # of the forwards', in which they waited for a layer

    @classmethod
    def of(cls, worker: worker_pb2_grpc.WorkerServiceStub) -> Streamed:
        """Since the worker's start. Raises InvalidArgument naming `offload` where it streams nothing."""
        status = worker.GetStatus(worker_pb2.GetStatusRequest())
        if not status.HasField("offload"):
            raise InvalidArgument("the target's layers are all in memory; ask for disk", "offload")
        return cls(*(getattr(status.offload, each.name) for each in fields(cls)))

    def since(self, earlier: Streamed) -> Streamed:
        """What came after."""
        return Streamed(*(getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)))

    @property
    def bytes_of_forward(self) -> float:
        """That one forward reads."""
        return self.num_bytes / self.num_forwards

    @property
    def compute_seconds(self) -> float:
        """Of one forward, in which it did not wait."""
        return (self.forward_seconds - self.stall_seconds) / self.num_forwards

    @property
    def bytes_per_second(self) -> float:
        """Read, by the time that forwards took."""
        return self.num_bytes / self.forward_seconds


class RawTier(Protocol):
    """The tier itself."""

    def bytes_per_second(self) -> float:
        """That it gives at this moment to whoever only reads."""
        ...


class WatchedArm:
    """An arm of ours whose target's forwards are counted, each answer behind a look at what the tier gives."""

    def __init__(self, arm: Arm, worker: worker_pb2_grpc.WorkerServiceStub, tier: RawTier) -> None:
        self.name, self._arm, self._worker, self._tier = arm.name, arm, worker, tier
        self.streamed: list[Streamed] = []
        self.raw: list[float] = []  # bytes per second

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer:
        """As the arm has it."""
        self.raw.append(self._tier.bytes_per_second())
        before = Streamed.of(self._worker)
        answer = self._arm.answer(prompt, max_tokens)
        self.streamed.append(Streamed.of(self._worker).since(before))
        return answer

    @property
    def total(self) -> Streamed:
        """Of all answers but the first, which is there to warm up."""
        return Streamed(*(sum(getattr(one, each.name) for one in self.streamed[1:]) for each in fields(Streamed)))


@dataclass(frozen=True, slots=True)
class ArmStreaming:
    """One arm at one temperature, over all of its answers."""

    name: str
    seconds_per_token: float  # after the first token
    tokens_per_step: float
    draft_seconds: float  # of a step
    streamed: Streamed

    @classmethod
    def of(cls, figures: ArmFigures, streamed: Streamed) -> ArmStreaming:
        """Every token and every step counts the same, whichever answer it is of."""
        answers = [each.answer for each in figures.samples]
        num_tokens = sum(len(each.token_ids) - 1 for each in answers)
        num_steps = sum(each.num_steps or 0 for each in answers)
        return cls(
            name=figures.name,
            seconds_per_token=sum(each.seconds - each.first_token_seconds for each in answers) / num_tokens,
            tokens_per_step=sum(each.num_step_tokens or 0 for each in answers) / num_steps,
            draft_seconds=sum(each.stage_seconds.draft for each in answers if each.stage_seconds) / num_steps,
            streamed=streamed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **asdict(self),
            "bytes_of_forward": self.streamed.bytes_of_forward,
            "bytes_per_second": self.streamed.bytes_per_second,
            "compute_seconds_of_forward": self.streamed.compute_seconds,
            "stall_seconds_of_forward": self.streamed.stall_seconds / self.streamed.num_forwards,
        }


@dataclass(frozen=True, slots=True)
class OffloadFigures:
    """Plain decoding against the plan at one temperature, and against what the disk and the acceptance allow."""

    temperature: float
    off: ArmStreaming
    plan: ArmStreaming
    raw_bytes_per_second: float  # the median of direct reads of the same files, between the answers
    predicted: PricedTree | None
    by_category: dict[str, float]  # the median of pairs
    num_prompts_that_differ: int

    @classmethod
    def of(
        cls, temperature: float, arms: Sequence[WatchedArm], figures: Sequence[ArmFigures], predicted: PricedTree | None
    ) -> OffloadFigures:
        """Of plain decoding and the plan, in this order."""
        off, plan = (ArmStreaming.of(each, arm.total) for each, arm in zip(figures, arms, strict=True))
        ratios = {name: each.ratio_to_off for name, each in figures[1].by_category.items()}
        return cls(
            temperature=temperature,
            off=off,
            plan=plan,
            raw_bytes_per_second=median(rate for arm in arms for rate in arm.raw),
            predicted=predicted,
            by_category={name: each.median for name, each in ratios.items() if each},
            num_prompts_that_differ=len(figures[1].differences),
        )

    @property
    def speedup(self) -> float:
        """Seconds per token of plain decoding by those of the plan."""
        return self.off.seconds_per_token / self.plan.seconds_per_token

    @property
    def ceiling(self) -> float:
        """F t(1) / (t(n) + draft), reading at the raw rate, computing beside it, with the acceptance that was met."""
        plain = self._least_seconds(self.off)
        return self.plan.tokens_per_step * plain / (self._least_seconds(self.plan) + self.plan.draft_seconds)

    @property
    def streaming_efficiency(self) -> float:
        """Of plain decoding: bytes read per second of its forwards by the raw rate."""
        return self.off.streamed.bytes_per_second / self.raw_bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "temperature": self.temperature,
            "off": self.off.to_dict(),
            "plan": self.plan.to_dict(),
            "raw_bytes_per_second": self.raw_bytes_per_second,
            "streaming_efficiency": self.streaming_efficiency,
            "speedup": self.speedup,
            "ceiling": self.ceiling,
            "predicted": self.predicted.to_dict() if self.predicted else None,
            "speedup_by_category": self.by_category,
            "num_prompts_that_differ": self.num_prompts_that_differ,
        }

    def _least_seconds(self, arm: ArmStreaming) -> float:
        """Of a forward that reads at the raw rate all the time and computes beside it."""
        return max(arm.streamed.bytes_of_forward / self.raw_bytes_per_second, arm.streamed.compute_seconds)
