"""`python -m sequoia.health [ADDRESS]`: whether a server of this system serves, for whoever restarts containers.

Asks grpc.health.v1 at ADDRESS, by default where SEQUOIA_LISTEN says that the server of this container listens: over TLS
where SEQUOIA_TLS_CA is set, with the container's own certificate (SEQUOIA_TLS_CERT, SEQUOIA_TLS_KEY) where the server
wants one (mTLS). The server's must be for the host of ADDRESS; for `localhost` where it listens everywhere. Exit
status: 0 it serves, 1 it does not, 2 a setting is of no use.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sequoia.config import fail, load
from sequoia.errors import InvalidArgument
from sequoia.rpc import open_sync_channel
from sequoia.tls import PLAIN, Tls, TlsSettings

_TIMEOUT_SECONDS = 5.0
_EVERYWHERE = ("0.0.0.0", "[::]")


def main() -> None:
    """Ask once and exit."""
    listen = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SEQUOIA_LISTEN", "127.0.0.1:50600")
    tls = load(TlsSettings, "sequoia.health", [], os.environ).tls
    try:
        sys.exit(0 if is_serving(reached_at(listen), tls) else 1)
    except InvalidArgument as error:
        fail(str(error))


def reached_at(listen: str) -> str:
    """The address under which this machine reaches a server of its own that listens there."""
    host, _, port = listen.rpartition(":")
    return f"localhost:{port}" if host in _EVERYWHERE else listen


def is_serving(address: str, tls: Tls = PLAIN) -> bool:
    """Whether the server there says so. Raises InvalidArgument as `open_channel` does."""
    with open_sync_channel(address, tls) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS
            )
        except grpc.RpcError:
            return False
    return bool(health.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    main()
