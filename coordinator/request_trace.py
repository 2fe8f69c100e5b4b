"""The spans of one request: its wait, its prefill, its steps."""

from __future__ import annotations

import time

from coordinator.report import Report
from coordinator.request import Request
from coordinator.request_metrics import STAGES
from coordinator.transcript import Step
from sequoia.tracing import Attribute, OpenSpan
from sequoia.v1 import coordinator_pb2, draft_pb2

_PARTS = ("forwards", "work", "draft_forwards", "draft_work")


class RequestTrace:
    """Tells a request's span, and those below it, what happened. Steps adjoin: one begins where the last one ended."""

    def __init__(self, span: OpenSpan) -> None:
        self._span, self._mark = span, time.monotonic()

    def asked(self, request: Request) -> None:
        """It is read, and waits to be let in from now on."""
        self._mark = time.monotonic()
        self._span.tell(
            {
                "rule": request.decoding.rule.name,
                "num_prompt_tokens": len(request.prompt),
                "num_resumed_tokens": len(request.generated),
                "max_tokens": request.max_tokens,
            }
        )

    def admitted(self) -> None:
        """It is let in."""
        self._span.ended("queue", self._lap(), {})

    def committed(self, step: Step, draft: draft_pb2.DraftResponse | None, report: Report) -> None:
        """The first verdict, or a step, has been taken into the answer."""
        if not report.message.num_steps:
            self._span.ended("prefill", self._lap(), {"num_tokens": len(step.token_ids)})
            return
        size = len(draft.tree.token_ids) if draft is not None else 1
        told: dict[str, Attribute] = {"tree_size": size, "num_tokens": len(step.token_ids), "drafted": size > 1}
        if report.fallback is not None:
            told |= {"fallback": report.fallback.value, "fallback_reason": report.message.fallback_reason}
        told |= {f"{name}_seconds": getattr(report.step_seconds, name) for name in (*STAGES, *_PARTS)}
        self._span.ended("step", report.total_step_seconds, told)

    def finished(self, finish: coordinator_pb2.Finish) -> None:
        """The answer is complete."""
        told, name = finish.speculation, coordinator_pb2.FinishReason.Name(finish.reason)
        self._span.tell(
            {
                "finish_reason": name.removeprefix("FINISH_REASON_").lower(),
                "num_completion_tokens": finish.num_completion_tokens,
                "num_cached_prompt_tokens": finish.num_cached_prompt_tokens,
                "num_steps": told.num_steps,
                "num_drafted_steps": told.num_drafted_steps,
                "num_fallback_steps": told.num_fallback_steps,
                "num_accepted_tokens": told.num_accepted_tokens,
                "speculation_state": coordinator_pb2.SpeculationState.Name(told.state)
                .removeprefix("SPECULATION_STATE_")
                .lower(),
                "speculation_reason": told.state_reason,
            }
        )

    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        return seconds
