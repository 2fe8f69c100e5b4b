"""Both workers in one process: `python -m sequoia.cli.colocated --target-model REF --draft-model REF`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from draft_worker.server import DRAFT
from sequoia.config import fail, load
from sequoia.errors import SequoiaError
from sequoia.telemetry import configure_logging
from sequoia.worker import serve
from sequoia.worker_config import WorkerConfig
from verify_worker.server import VERIFY

_OF_THE_PROCESS = ("num_threads", "log_level")


@dataclass(frozen=True, slots=True)
class ColocatedConfig:
    """Serves a target and a draft that take turns on one thread, each on an address of its own."""

    target: WorkerConfig
    draft: WorkerConfig

    def __post_init__(self) -> None:
        for name in _OF_THE_PROCESS:
            if getattr(self.target, name) != getattr(self.draft, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--target-{flag} and --draft-{flag} must be the same: both are of one process")


def main() -> None:
    """Load the settings, then serve both until told to stop."""
    config = load(ColocatedConfig, "colocated", sys.argv[1:], os.environ)
    configure_logging("workers", config.target.log_level)
    try:
        serve((VERIFY, config.target), (DRAFT, config.draft), environ=os.environ)
    except SequoiaError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
