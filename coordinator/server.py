"""The coordinator's process: `python -m coordinator.server --verify ADDRESS [--draft ADDRESS] [--redis URL]`."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import MISSING, dataclass

import uvloop

from coordinator.clients import Clients
from coordinator.discovery import parse_places
from coordinator.learning import Learning
from coordinator.metrics import complete, serve_metrics
from coordinator.request_metrics import RequestMetrics
from coordinator.servicer import CoordinatorServicer, Patience
from coordinator.speculation import Speculator
from coordinator.trees import TreePlans
from coordinator.workers import Workers
from sequoia.addresses import is_local
from sequoia.config import fail, load, setting
from sequoia.errors import SequoiaError
from sequoia.redis_connection import check_redis
from sequoia.rpc import Dial, Server, open_channel, running, stop_signal
from sequoia.rules import DEFAULT_RULE, RULES, SAMPLED_RULES
from sequoia.telemetry import configure_logging
from sequoia.tls import TlsSettings
from sequoia.tracing import Tracing, tracing_as_asked
from sequoia.v1 import coordinator_pb2_grpc

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoordinatorConfig(TlsSettings):
    """Owns the committed tokens of every request and runs the loop between a draft and a verify worker."""

    verify: str = setting(
        MISSING,
        "addresses of the verify workers, with commas; all serve the same model; dns:///NAME:PORT: one for each "
        "address that the name has",
    )
    draft: str = setting("", "addresses of the draft workers, likewise; empty: plain decoding")
    redis: str = setting("", "URL of the Redis that holds tree plans, rediss:// with TLS; empty: the built-in tree")
    listen: str = setting("127.0.0.1:50600", "address to listen on; port 0 takes a free one")
    clients: str = setting("", "file (TOML) with the clients that are let in, and their limits; empty: everybody is")
    client_certificates: str = setting(
        "required",
        "with --tls-ca, whether clients must have a certificate too; none: a token of --clients is enough",
        choices=("required", "none"),
    )
    rule: str = setting(
        DEFAULT_RULE.name,
        "rule above temperature 0, for requests that name none and no seed",
        choices=tuple(each.name for each in SAMPLED_RULES),
    )
    draft_timeout_seconds: float = setting(5.0, "longest wait for a tree before the step is decoded plainly, seconds")
    failover_seconds: float = setting(30.0, "longest wait of a running request for a verify worker, seconds")
    max_waiting: int = setting(64, "requests that wait for a slot at a time; those beyond are told to try again")
    plan_refresh_seconds: float = setting(2.0, "time between two looks for new plans, seconds")
    metrics_port: int = setting(
        0, "port of Prometheus' /metrics; 0: none. On loopback; on all addresses as HTTPS, or with --insecure"
    )
    start_timeout_seconds: float = setting(120.0, "longest wait for the verify worker at start, seconds")
    log_level: str = setting("info", "log level", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        TlsSettings.__post_init__(self)
        if self.max_waiting < 0:
            raise ValueError("--max-waiting (SEQUOIA_MAX_WAITING) must not be negative")
        for name in ("verify", "draft"):
            try:
                parse_places(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"--{name} (SEQUOIA_{name.upper()}): {error}") from error
        for name in ("draft_timeout_seconds", "failover_seconds", "plan_refresh_seconds", "start_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} (SEQUOIA_{name.upper()}) must be above 0")


def main() -> None:
    """Load the settings, then serve until told to stop."""
    config = load(CoordinatorConfig, "coordinator", sys.argv[1:], os.environ)
    configure_logging("coordinator", config.log_level)
    try:
        with tracing_as_asked("sequoia-coordinator", os.environ) as tracing:
            uvloop.run(serve(config, tracing))
    except SequoiaError as error:
        fail(str(error))


async def serve(config: CoordinatorConfig, tracing: Tracing | None, dial: Dial = open_channel) -> None:
    """Serve until told to stop; workers are reached by what `dial` opens. Raises SequoiaError."""
    server, clients = _open_to_clients(config)
    if config.redis:
        check_redis(config.redis, config.tls)
    async with (
        Workers(
            config.verify, config.draft, config.start_timeout_seconds, config.max_waiting, config.tls, dial=dial
        ) as workers,
        TreePlans(config.redis, workers, config.plan_refresh_seconds, RULES[config.rule]) as plans,
        Learning(config.redis, workers, config.plan_refresh_seconds) as learning,
    ):
        speculator, rule, metrics = Speculator(plans, workers), RULES[config.rule], RequestMetrics()
        if config.metrics_port:
            serve_metrics(complete(metrics, speculator, workers), config.metrics_port, config.tls)
        patience = Patience(config.draft_timeout_seconds, config.failover_seconds)
        servicer = CoordinatorServicer(workers, speculator, learning, patience, rule, clients, metrics, tracing)
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.grpc_server)
        async with running({server: ("sequoia.v1.CoordinatorService",)}):
            await stop_signal()


def _open_to_clients(config: CoordinatorConfig) -> tuple[Server, Clients]:
    """The server, and whom it lets in. Raises InvalidArgument for settings that cannot be met."""
    asks_certificate = config.client_certificates == "required"
    server = Server(config.listen, config.tls, asks_certificate=asks_certificate)
    if not config.clients and not (config.tls_ca and asks_certificate) and not is_local(config.listen):
        _log.warning("%s serves whoever reaches it; --clients FILE names those who are let in", config.listen)
    return server, Clients(config.clients)


if __name__ == "__main__":
    main()
