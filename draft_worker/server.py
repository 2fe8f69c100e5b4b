"""The draft worker's process: `python -m draft_worker.server --model REF`; `--model ngram` needs no model."""

from __future__ import annotations

import os
import sys

from draft_worker.model_free import start
from draft_worker.servicer import DraftServicer
from sequoia.config import fail, load
from sequoia.errors import SequoiaError
from sequoia.telemetry import configure_logging
from sequoia.v1 import draft_pb2_grpc, worker_pb2
from sequoia.worker import WorkerKind, serve
from sequoia.worker_config import WorkerConfig


def main() -> None:
    """Load the settings, then serve until told to stop."""
    config = load(WorkerConfig, "draft_worker", sys.argv[1:], os.environ)
    configure_logging("draft_worker", config.log_level)
    try:
        serve((DRAFT, config), environ=os.environ)
    except SequoiaError as error:
        fail(str(error))


DRAFT = WorkerKind(
    worker_pb2.WORKER_ROLE_DRAFT,
    "sequoia.v1.DraftService",
    "sequoia-draft",
    DraftServicer,
    draft_pb2_grpc.add_DraftServiceServicer_to_server,
    start,
)


if __name__ == "__main__":
    main()
