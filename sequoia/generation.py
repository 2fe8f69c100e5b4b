"""What comes out of a request: the answer and its figures, from their wire form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import Any, Literal

from sequoia.errors import Internal
from sequoia.topology import TokenLogprobs, Topology
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.wire import logprobs_from_wire, rule_name


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times count from its arrival at the coordinator."""

    num_prompt_tokens: int
    num_completion_tokens: int
    time_to_first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by total time, prefill included."""
        return self.num_completion_tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def time_per_output_token_seconds(self) -> float:
        """Time per generated token after the first (TPOT); 0 for a single token."""
        num_tokens = self.num_completion_tokens - 1
        return (self.total_seconds - self.time_to_first_token_seconds) / num_tokens if num_tokens > 0 else 0.0


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Wall time of all steps of a request by where it went; prefill is the opening, apart from the steps.

    Of draft and verify `forwards` are the models', and `work` what the workers do with logits, trees and KV rows.
    """

    draft: float
    verify: float
    network: float
    host: float
    prefill: float
    forwards: float = 0.0
    work: float = 0.0

    @property
    def overhead(self) -> float:
        """Of the steps, what is neither a forward nor work on logits: round trips, messages, scheduling, the loop."""
        return self.draft + self.verify + self.network + self.host - self.forwards - self.work


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """The steps of a request for which a tree of that shape was asked for, and came; root-only: plain decoding.

    `num_ahead_hits` of them had a tree that was begun while the step before was verified, and spent `hit_draft_seconds`
    of the draft's time; before `num_ahead_misses` trees had been begun that were of no use.
    """

    topology: Topology
    num_steps: int
    num_tokens: int
    stage_seconds: StageSeconds
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0
    hit_draft_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """What speculation did for a request, in all and by tree.

    `offered[depth][rank]`: how often a child of that rank stood under a reached node of that depth (the root's is 0);
    `accepted`, of the same shape: how often it was the accepted one. `state` tells whether the coordinator went along
    with the plan, and `state_reason` why; "" when the request said how to speculate. Bytes count messages to and from
    a worker.
    """

    num_steps: int
    num_drafted_steps: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    stage_seconds: StageSeconds
    trees: tuple[TreeUsage, ...]
    offered: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]
    num_fallback_steps: int
    fallback_reason: str
    num_draft_bytes: int
    num_verify_bytes: int
    state: Literal["on", "reduced", "off", ""]
    state_reason: str

    @property
    def tree(self) -> Topology:
        """The largest that was used (they are cut towards the end of an answer); root-only for plain decoding."""
        return max((each.topology for each in self.trees), key=lambda tree: tree.size, default=Topology.root_only())

    @property
    def num_ahead_hits(self) -> int:
        """Steps whose tree had been begun while the step before was verified."""
        return sum(each.num_ahead_hits for each in self.trees)

    @property
    def num_ahead_attempts(self) -> int:
        """Steps before which trees had been begun, of use or not."""
        return self.num_ahead_hits + sum(each.num_ahead_misses for each in self.trees)

    @property
    def offered_by_rank(self) -> tuple[int, ...]:
        """Over all depths."""
        return _summed(self.offered)

    @property
    def accepted_by_rank(self) -> tuple[int, ...]:
        """Over all depths."""
        return _summed(self.accepted)

    @property
    def mean_tokens_per_step(self) -> float:
        """Accepted tokens plus the bonus token, by step; 0 without a step."""
        return (self.num_accepted_tokens + self.num_steps) / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer. `token_ids` holds the end-of-sequence token, `text` does not.

    `seed` is the one that determines the text, given or drawn by the server; None when none does. `logprobs` has one
    entry a token when they were asked for, else none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    speculation: SpeculationFigures
    rule: str
    seed: int | None
    logprobs: tuple[TokenLogprobs, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: text, token_ids, finish_reason, rule, seed, usage, speculation, and logprobs if any."""
        speculation = asdict(self.speculation)
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "rule": self.rule,
            "seed": self.seed,
            **({"logprobs": [_logprobs_to_dict(each) for each in self.logprobs]} if self.logprobs else {}),
            "usage": {
                **asdict(self.usage),
                "time_per_output_token_seconds": self.usage.time_per_output_token_seconds,
                "tokens_per_second": self.usage.tokens_per_second,
            },
            "speculation": {
                "steps": speculation.pop("num_steps"),
                "mean_tokens_per_step": self.speculation.mean_tokens_per_step,
                "tree": {"size": self.speculation.tree.size, "levels": self.speculation.tree.levels},
                "seconds": speculation.pop("stage_seconds"),
                "offered_by_rank": self.speculation.offered_by_rank,
                "accepted_by_rank": self.speculation.accepted_by_rank,
                "draft_ahead": {
                    "attempts": self.speculation.num_ahead_attempts,
                    "hits": self.speculation.num_ahead_hits,
                },
                **speculation,
                "trees": [_usage_to_dict(each) for each in self.speculation.trees],
            },
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer, as it was committed. Only the last carries the whole `generation`."""

    text: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class Answer:
    """The responses of one call so far, folded into what the caller sees."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = 0
    generation: Generation | None = None

    def add(self, response: pb.GenerateResponse) -> Chunk:
        self.num_prompt_tokens = self.num_prompt_tokens or response.num_prompt_tokens
        self.text += response.text
        self.token_ids += response.token_ids
        logprobs = tuple(map(logprobs_from_wire, response.logprobs))
        self.logprobs += logprobs
        if response.HasField("finish"):
            self.generation = self._finish(response)
        return Chunk(response.text, tuple(response.token_ids), self.generation, logprobs)

    def finished(self) -> Generation:
        if self.generation is None:
            raise Internal("the coordinator ended the answer without saying how it finished")
        return self.generation

    def _finish(self, response: pb.GenerateResponse) -> Generation:
        finish = response.finish
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason="length" if finish.reason == pb.FINISH_REASON_LENGTH else "stop",
            usage=Usage(
                num_prompt_tokens=self.num_prompt_tokens,
                num_completion_tokens=finish.num_completion_tokens,
                time_to_first_token_seconds=finish.time_to_first_token_seconds,
                total_seconds=finish.total_seconds,
            ),
            speculation=_figures(finish.speculation),
            rule=rule_name(response.rule),
            seed=response.seed if response.HasField("seed") else None,
            logprobs=tuple(self.logprobs),
        )


def _logprobs_to_dict(logprobs: TokenLogprobs) -> dict[str, Any]:
    """Ready for JSON, which has no -inf: the processed logprob of a token that was cut is null."""
    top = [{"token_id": t, "raw": raw, "processed": _finite(processed)} for t, raw, processed in logprobs.top]
    return {"token_id": logprobs.token_id, "raw": logprobs.raw, "processed": _finite(logprobs.processed), "top": top}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figures(report: pb.SpeculationReport) -> SpeculationFigures:
    return SpeculationFigures(
        num_steps=report.num_steps,
        num_drafted_steps=report.num_drafted_steps,
        num_drafted_tokens=report.num_drafted_tokens,
        num_accepted_tokens=report.num_accepted_tokens,
        stage_seconds=_stage_seconds(report.stages),
        trees=tuple(
            TreeUsage(
                Topology(tuple(each.topology.parents)),
                each.num_steps,
                each.num_tokens,
                _stage_seconds(each.stages),
                each.num_ahead_hits,
                each.num_ahead_misses,
                each.hit_draft_seconds,
            )
            for each in report.trees
        ),
        offered=tuple(tuple(each.num_offered) for each in report.counts_by_depth),
        accepted=tuple(_padded(each.num_accepted, len(each.num_offered)) for each in report.counts_by_depth),
        num_fallback_steps=report.num_fallback_steps,
        fallback_reason=report.fallback_reason,
        num_draft_bytes=report.num_draft_bytes,
        num_verify_bytes=report.num_verify_bytes,
        state=state_name(report.state),
        state_reason=report.state_reason,
    )


def state_name(state: pb.SpeculationState) -> Literal["on", "reduced", "off", ""]:
    """ "" when it is not set."""
    return _STATES.get(state, "")


_STATES: dict[int, Literal["on", "reduced", "off"]] = {
    pb.SPECULATION_STATE_ON: "on",
    pb.SPECULATION_STATE_REDUCED: "reduced",
    pb.SPECULATION_STATE_OFF: "off",
}


def _stage_seconds(stages: pb.StageSeconds) -> StageSeconds:
    return StageSeconds(**{each.name: getattr(stages, each.name) for each in fields(StageSeconds)})


def _usage_to_dict(usage: TreeUsage) -> dict[str, Any]:
    return {
        "parents": usage.topology.parents,
        "steps": usage.num_steps,
        "tokens": usage.num_tokens,
        "seconds": asdict(usage.stage_seconds),
        "ahead_hits": usage.num_ahead_hits,
        "ahead_misses": usage.num_ahead_misses,
        "hit_draft_seconds": usage.hit_draft_seconds,
    }


def _padded(values: Sequence[int], length: int) -> tuple[int, ...]:
    return (*values, *[0] * (length - len(values)))


def _summed(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*rows, fillvalue=0)))
