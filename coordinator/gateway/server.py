"""The gateway's process: `python -m coordinator.gateway [--address ADDRESS] [--listen ADDRESS]`."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import ssl
from pathlib import Path

import uvicorn
import uvloop

from coordinator.gateway.app import build_app
from coordinator.gateway.config import GatewayConfig
from coordinator.gateway.http_protocol import BoundedHttp
from coordinator.gateway.keys import ApiKeys
from sequoia.access import read_token
from sequoia.addresses import is_local
from sequoia.client import AsyncClient
from sequoia.credentials import server_context
from sequoia.errors import InvalidArgument
from sequoia.tls import Tls, check_listen
from sequoia.tracing import Tracing

_log = logging.getLogger(__name__)

# In which a client that does read takes leave.
_FAREWELL_SECONDS = 0.5


def serve(config: GatewayConfig, tracing: Tracing | None) -> None:
    """Serve until told to stop; running answers then end. Raises InvalidArgument for a setting that cannot be met."""
    keys, tls = ApiKeys(config.api_keys), Tls(config.tls_cert, config.tls_key, insecure=config.insecure)
    context = server_context(tls.cert, tls.key) if tls.cert else None
    if context is None:
        check_listen(config.listen, tls)
    token = read_token(Path(config.token_file)) if config.token_file else None
    listener = _listen(config)
    _warn(config, keys)
    # uvicorn raises the signal that ended it again when it is done, which would be a death by signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with listener:
        uvloop.run(_serve(config, keys, token, listener, context, tracing))


async def _serve(
    config: GatewayConfig,
    keys: ApiKeys,
    token: str | None,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    tracing: Tracing | None,
) -> None:
    access = config.access(token)
    async with AsyncClient(config.address, timeout_seconds=config.request_timeout_seconds, **access) as client:
        app = build_app(config, client, keys, tracing)
        settings = uvicorn.Config(
            app,
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=config.grace_seconds,
            ssl_certfile=config.tls_cert or None,
            ssl_keyfile=config.tls_key or None,
        )
        settings.load()
        settings.ssl = context
        await _Announced(settings).serve([listener])


class _Announced(uvicorn.Server):
    """Tells on stdout where it serves, as the other servers do."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            print(json.dumps({"event": "serving", "address": address, "service": "http"}), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        leaving = asyncio.create_task(self._leave_idle())
        await super().shutdown(sockets)
        leaving.cancel()

    async def _leave_idle(self) -> None:
        """Drop connections without an answer: a client that does not read would never agree to the end of TLS."""
        if running := set(self.server_state.tasks):
            await asyncio.wait(running)
        await asyncio.sleep(_FAREWELL_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _listen(config: GatewayConfig) -> socket.socket:
    assert config.host_and_port is not None, "the settings are checked"
    host, _ = config.host_and_port
    try:
        return socket.create_server(config.host_and_port, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InvalidArgument(f"{config.listen} cannot be listened on: {error}", "listen") from error


def _warn(config: GatewayConfig, keys: ApiKeys) -> None:
    if not keys and not is_local(config.listen):
        _log.warning("%s asks for no keys of its own: the coordinator's --clients decide who is let in", config.listen)
