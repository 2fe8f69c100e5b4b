"""`python -m coordinator.gateway`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from coordinator.gateway.config import GatewayConfig
from sequoia.config import fail, load
from sequoia.errors import InvalidArgument
from sequoia.telemetry import configure_logging
from sequoia.tracing import tracing_as_asked


def main() -> None:
    """Load the settings, then serve until told to stop."""
    run(load(GatewayConfig, "gateway", sys.argv[1:], os.environ), os.environ)


def run(config: GatewayConfig, environ: Mapping[str, str]) -> None:
    """Serve until told to stop. A setting that cannot be met ends the process with status 2 and one line."""
    configure_logging("gateway", config.log_level)
    try:
        from coordinator.gateway.server import serve
    except ModuleNotFoundError as error:
        fail(f"the gateway needs {error.name}: pip install sequoia-serving[gateway]")
    try:
        with tracing_as_asked("sequoia-gateway", environ) as tracing:
            serve(config, tracing)
    except InvalidArgument as error:
        fail(f"--{error.field.replace('_', '-')}: {error.message}" if error.field else error.message)


if __name__ == "__main__":
    main()
