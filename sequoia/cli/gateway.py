"""`sequoia gateway`: the OpenAI API over HTTP, before a system that runs already."""

from __future__ import annotations

import argparse
import os

from coordinator.gateway.__main__ import run as serve
from coordinator.gateway.config import GatewayConfig
from sequoia.config import add_flags, fill


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command, which are the process's own."""
    add_flags(parser, GatewayConfig)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    serve(fill(GatewayConfig, arguments, os.environ), os.environ)
    return 0
