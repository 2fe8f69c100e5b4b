"""The coordinator and both workers in one process: `python -m sequoia.cli.colocated --target-model REF ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from coordinator.server import CoordinatorConfig
from coordinator.server import serve as serve_clients
from draft_worker.server import DRAFT
from sequoia.config import fail, load
from sequoia.errors import SequoiaError
from sequoia.in_process import LocalServices
from sequoia.rpc import StubChannel, open_channel
from sequoia.telemetry import configure_logging
from sequoia.tls import Tls
from sequoia.tracing import tracing_as_asked
from sequoia.worker import serve
from sequoia.worker_config import WorkerConfig
from verify_worker.server import VERIFY

# Whose settings must agree, as they are the process's.
_OF_THE_PROCESS = {"num_threads": ("target", "draft"), "log_level": ("target", "draft", "coordinator")}


@dataclass(frozen=True, slots=True)
class ColocatedConfig:
    """Serves a target and a draft that take turns on one thread, each on an address of its own, and a coordinator.

    The coordinator reaches workers of this process without a connection, by the same calls and messages.
    """

    target: WorkerConfig
    draft: WorkerConfig
    coordinator: CoordinatorConfig

    def __post_init__(self) -> None:
        for name, groups in _OF_THE_PROCESS.items():
            if len({getattr(getattr(self, group), name) for group in groups}) > 1:
                *flags, last = (f"--{group}-{name.replace('_', '-')}" for group in groups)
                raise ValueError(f"{', '.join(flags)} and {last} must be the same: they are of one process")


def main() -> None:
    """Load the settings, then serve all three until told to stop."""
    config = load(ColocatedConfig, "colocated", sys.argv[1:], os.environ)
    configure_logging("system", config.target.log_level)
    try:
        with tracing_as_asked("sequoia-coordinator", os.environ) as tracing:

            async def coordinate(services: Mapping[str, LocalServices]) -> None:
                await serve_clients(config.coordinator, tracing, partial(_dial, services))

            serve((VERIFY, config.target), (DRAFT, config.draft), environ=os.environ, until=coordinate)
    except SequoiaError as error:
        fail(str(error))


def _dial(services: Mapping[str, LocalServices], address: str, tls: Tls, *, server_name: str = "") -> StubChannel:
    return services.get(address) or open_channel(address, tls, server_name=server_name)


if __name__ == "__main__":
    main()
