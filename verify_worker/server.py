"""The verify worker's process: `python -m verify_worker.server --model REF`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from sequoia.config import fail, load
from sequoia.errors import SequoiaError
from sequoia.telemetry import configure_logging
from sequoia.v1 import verify_pb2_grpc, worker_pb2
from sequoia.worker import WorkerKind, serve
from sequoia.worker_config import WorkerConfig
from verify_worker.servicer import VerifyServicer


def main() -> None:
    """Load the settings, then serve until told to stop."""
    config = load(WorkerConfig, "verify_worker", sys.argv[1:], os.environ)
    check_world(config.tensor_parallel, os.environ)
    configure_logging("verify_worker", config.log_level)
    try:
        serve((VERIFY, config), environ=os.environ)
    except SequoiaError as error:
        fail(str(error))


def check_world(num_ranks: int, environ: Mapping[str, str]) -> None:
    """End the process unless a launcher has started as many as there are to be."""
    started = environ.get("WORLD_SIZE", "1")
    if started != str(num_ranks):
        problem = f"--tensor-parallel (SEQUOIA_TENSOR_PARALLEL) is {num_ranks}, and WORLD_SIZE is {started}"
        fail(f"{problem}; start it by torchrun --nproc-per-node {num_ranks} -m verify_worker.server")


VERIFY = WorkerKind(
    worker_pb2.WORKER_ROLE_VERIFY,
    "sequoia.v1.VerifyService",
    "sequoia-verify",
    VerifyServicer,
    verify_pb2_grpc.add_VerifyServiceServicer_to_server,
)


if __name__ == "__main__":
    main()
