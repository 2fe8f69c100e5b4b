"""The system that `sequoia bench` asks: one that runs already, or one that it starts and plans for."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from coordinator.planner_job import plan_pair
from sequoia.access import Access
from sequoia.cli.access_flags import access_of, add_access
from sequoia.cli.deployment import Deployment
from sequoia.cli.steps import Steps
from sequoia.cli.up import add_model_arguments, deployment_settings
from sequoia.process_memory import peak_bytes

_QUICK_PLAN_PROMPTS, _QUICK_PLAN_TOKENS, _PLAN_TOKENS = 2, 24, 48


@dataclass(frozen=True, slots=True)
class BenchSystem:
    """Where its coordinator is; of a system that was started here also its Redis, its processes and its workers."""

    address: str
    access: Access = field(default_factory=Access)
    redis_url: str = ""
    process_ids: Mapping[str, int] = field(default_factory=dict)  # by name
    worker_addresses: Mapping[str, str] = field(default_factory=dict)  # "verify" and "draft"
    url: str | None = None  # of its OpenAI API, if it has a gateway

    def peak_bytes(self, *, with_draft: bool) -> int | None:
        """Of its processes; where no draft is needed, without that of a draft worker if it has one of its own."""
        return peak_bytes(pid for name, pid in self.process_ids.items() if with_draft or name != "draft")


def add_system(parser: argparse.ArgumentParser) -> None:
    """--address, and the flags of the models to serve without one."""
    group = parser.add_argument_group("the system", "one that runs already, or one to start")
    group.add_argument("--address", help="of a running coordinator (default: start a system of the models below)")
    add_access(group)
    add_model_arguments(group)


@contextmanager
def bench_system(arguments: argparse.Namespace, steps: Steps, *, http_port: int | None = None) -> Iterator[BenchSystem]:
    """The one at --address, or one that serves the models of the other flags, from start to stop.

    The latter has a gateway where `http_port` is not None.
    """
    access = access_of(arguments)
    if arguments.address is not None:
        yield BenchSystem(arguments.address, access)
        return
    # Arms are asked the same prompts: none may have the rows that another one made.
    settings = deployment_settings(arguments, "127.0.0.1:0", None)
    settings = replace(settings, prefix_reuse="off", http_port=http_port)
    with Deployment(settings, steps) as deployment:
        process_ids = {name: each.pid for name, each in deployment.processes.items()}
        yield BenchSystem(
            deployment.address, access, deployment.redis_url, process_ids, deployment.addresses, deployment.url
        )


@contextmanager
def planned_system(
    arguments: argparse.Namespace,
    steps: Steps,
    temperatures: Sequence[float] = (0.0,),
    *,
    http_port: int | None = None,
) -> Iterator[BenchSystem]:
    """The same, planned for at these temperatures if it was started here."""
    with bench_system(arguments, steps, http_port=http_port) as system:
        if system.redis_url and not arguments.no_draft:
            _plan(system, steps, temperatures, is_quick=arguments.quick)
        yield system


def _plan(system: BenchSystem, steps: Steps, temperatures: Sequence[float], *, is_quick: bool) -> None:
    with steps.step("measuring the pair, planning its trees") as on_progress:
        planning = plan_pair(
            system.address,
            system.redis_url,
            access=system.access,
            temperatures=temperatures,
            most_prompts=_QUICK_PLAN_PROMPTS if is_quick else None,
            max_tokens=_QUICK_PLAN_TOKENS if is_quick else _PLAN_TOKENS,
            on_progress=on_progress,
        )
        asyncio.run(planning)
