"""What a Prometheus server can ask of a coordinator: how far it goes along with its plans, and what that realises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.gaits import Gait
from coordinator.request_metrics import RequestMetrics
from coordinator.speculation import Speculator
from coordinator.worker_metrics import WorkersCollector, has_draft
from coordinator.workers import Workers
from sequoia.errors import InvalidArgument
from sequoia.tls import PLAIN, Tls

_KIND = ["rule", "temperature", "sessions", "context"]


def complete(requests: RequestMetrics, speculator: Speculator, workers: Workers) -> CollectorRegistry:
    """All that there is to ask: of requests, of how they are decoded, of the workers, of this process."""
    registry = requests.registry
    registry.register(SpeculationCollector(speculator))
    registry.register(ActivityCollector(speculator, workers))
    registry.register(WorkersCollector(workers))
    ProcessCollector(registry=registry)
    return registry


def serve_metrics(registry: CollectorRegistry, port: int, tls: Tls = PLAIN) -> None:
    """Serve /metrics on that port, from a thread of its own, until the process ends.

    On loopback; with a certificate as HTTPS, and where plain text is allowed, on all addresses. With CAs whoever asks
    needs a certificate. The files are read once. Raises InvalidArgument for a port that cannot be had.
    """
    host = "0.0.0.0" if tls.cert or tls.insecure else "127.0.0.1"
    secure: dict[str, Any] = {"certfile": tls.cert, "keyfile": tls.key} if tls.cert else {}
    if tls.cert and tls.ca:
        secure |= {"client_cafile": tls.ca}
    try:
        start_http_server(port, host, registry=registry, client_auth_required=bool(tls.cert and tls.ca), **secure)
    except (OSError, OverflowError) as error:
        raise InvalidArgument(f"{port} cannot be listened on: {error}", "metrics_port") from error


class SpeculationCollector(Collector):
    """Reads the governors when asked; between two questions it costs nothing."""

    def __init__(self, speculator: Speculator) -> None:
        self._speculator = speculator

    def collect(self) -> Iterator[Metric]:
        """Drafting ahead; for each kind of request that was served its state, and the pace of every tree it used."""
        state = GaugeMetricFamily(
            "sequoia_speculation_state", "1 for the state it is in", labels=[*_KIND, "state", "reason"]
        )
        labels = [*_KIND, "size", "levels"]
        seconds = GaugeMetricFamily(
            "sequoia_seconds_per_token", "realised lately, by tree; size 1 is off", labels=labels
        )
        tokens = GaugeMetricFamily("sequoia_tokens_per_step", "realised lately, by tree; size 1 is off", labels=labels)
        for situation, governor in self._speculator.governors.items():
            kind = [situation.rule, situation.temperature, situation.sessions, situation.context]
            for gait in Gait:
                is_state = gait is governor.gait
                state.add_metric([*kind, gait.value, governor.cause if is_state else ""], float(is_state))
            for tree, pace in governor.paces.items():
                values = [*kind, str(tree.size), str(tree.levels)]
                seconds.add_metric(values, pace.seconds_per_token)
                tokens.add_metric(values, pace.num_tokens / pace.num_steps)
        yield from (state, seconds, tokens, *self._ahead())

    def _ahead(self) -> Iterator[Metric]:
        hits, misses = self._speculator.num_ahead_hits, self._speculator.num_ahead_misses
        text = "steps before which the drafter had begun trees"
        yield CounterMetricFamily("sequoia_draft_ahead_attempts", text, value=hits + misses)
        text = "steps whose tree the drafter had begun while the step before was verified"
        yield CounterMetricFamily("sequoia_draft_ahead_hits", text, value=hits)


class ActivityCollector(Collector):
    """Whether speculation is wanted, and whether it happens: one that is configured and not active is to be seen."""

    def __init__(self, speculator: Speculator, workers: Workers) -> None:
        self._speculator, self._workers = speculator, workers

    def collect(self) -> Iterator[Metric]:
        """Two gauges of 0 or 1."""
        configured, reason = self._workers.is_speculation_configured, self._why_not()
        yield GaugeMetricFamily("sequoia_speculation_configured", "draft workers were given", float(configured))
        text = "requests get trees, as far as the coordinator decides; else why they do not"
        active = GaugeMetricFamily("sequoia_speculation_active", text, labels=["reason"])
        active.add_metric([reason], float(not reason))
        yield active

    def _why_not(self) -> str:
        """In a word; empty where trees are grown."""
        if not self._workers.is_speculation_configured:
            return "not_configured"
        if not has_draft(self._workers.draft):
            return "no_draft_worker"
        governors = self._speculator.governors.values()
        if any(each.gait is not Gait.OFF for each in governors):
            return ""
        return max((each.cause for each in governors), default="")
