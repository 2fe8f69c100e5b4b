"""What a Prometheus server can ask about requests: how many, how fast, and what speculation did for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram

from coordinator.fallback import Fallback
from sequoia.errors import ERROR_BY_CODE, SequoiaError
from sequoia.topology import Topology

STAGES = ("draft", "verify", "network", "host")
ROLES = ("verify", "draft")
_STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_REQUEST_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class Stages(Protocol):
    """Seconds of one step by stage."""

    draft: float
    verify: float
    network: float
    host: float


class RequestMetrics:
    """Of all requests of a coordinator, in a registry of its own. No label tells one request from another."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests that have ended, by gRPC status", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of requests that were answered")
        self._generation_tokens = self._counter("generation_tokens", "tokens of answers that came to their end")
        self._num_drafts = self._counter("spec_decode_num_drafts", "token trees that were verified")
        text = "levels of these trees below the root: what could be accepted, as with chains"
        self._num_draft_tokens = self._counter("spec_decode_num_draft_tokens", text)
        self._num_nodes = self._counter("spec_decode_num_draft_nodes", "nodes of these trees, without their roots")
        self._num_accepted = self._counter("spec_decode_num_accepted_tokens", "drafted tokens that were accepted")
        text = "drafted tokens that were accepted, by their depth in the tree less 1"
        self._accepted_at = self._counter("spec_decode_num_accepted_tokens_per_pos", text, "position")
        text = "steps decoded plainly although a tree was wanted"
        self._fallbacks = self._counter("fallback_steps", text, "reason")
        text = "sessions opened again from the committed tokens"
        self._rebuilds = self._counter("session_rebuilds", text, "role")
        text = "the queue included"
        self._first_token = self._histogram("time_to_first_token_seconds", text, _FIRST_TOKEN_BUCKETS)
        text = "(whole time - time to first token) / (tokens - 1)"
        self._per_token = self._histogram("time_per_output_token_seconds", text, _STEP_BUCKETS)
        self._whole = self._histogram("e2e_request_latency_seconds", "of answers that came to an end", _REQUEST_BUCKETS)
        rounds = self._histogram("round_seconds", "one step, by where its time went", _STEP_BUCKETS, "stage")
        self._rounds = {stage: rounds.labels(stage) for stage in STAGES}
        self._begin_at_zero()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around each request."""
        status = grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            status = grpc.StatusCode.CANCELLED
            raise
        except SequoiaError as error:
            status = error.code
            raise
        except BaseException:
            status = grpc.StatusCode.INTERNAL
            raise
        finally:
            self._requests.labels(status.name).inc()

    def opened(self, seconds: float) -> None:
        """A request has its first token."""
        self._first_token.observe(seconds)

    def stepped(self, stages: Stages) -> None:
        """A step has its verdict. Without a draft there is no such stage."""
        for stage in STAGES:
            seconds = getattr(stages, stage)
            if seconds or stage != "draft":
                self._rounds[stage].observe(seconds)

    def drafted(self, tree: Topology, num_accepted: int) -> None:
        """A tree has its verdict: the first so many positions of its accepted path were right."""
        self._num_drafts.inc()
        self._num_draft_tokens.inc(tree.levels - 1)
        self._num_nodes.inc(tree.size - 1)
        self._num_accepted.inc(num_accepted)
        for position in range(num_accepted):
            self._accepted_at.labels(str(position)).inc()

    def fell_back(self, cause: Fallback) -> None:
        """A tree was wanted and did not come."""
        self._fallbacks.labels(cause.value).inc()

    def rebuilt(self, role: str, number: int = 1) -> None:
        """So many sessions were opened again on a worker of that role."""
        self._rebuilds.labels(role).inc(number)

    def finished(self, num_prompt_tokens: int, num_tokens: int, first_token_seconds: float, seconds: float) -> None:
        """An answer of so many tokens is complete."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_tokens)
        self._whole.observe(seconds)
        if num_tokens > 1:
            self._per_token.observe((seconds - first_token_seconds) / (num_tokens - 1))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sequoia_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"sequoia_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _begin_at_zero(self) -> None:
        """A series that begins with its first event hides it from rate()."""
        for code in (grpc.StatusCode.OK, *ERROR_BY_CODE):
            self._requests.labels(code.name)
        for cause in Fallback:
            self._fallbacks.labels(cause.value)
        for role in ROLES:
            self._rebuilds.labels(role)
        self._accepted_at.labels("0")
