"""gRPC as this system uses it: channels, servers, and health."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sequoia.addresses import is_local
from sequoia.border import abort, unreadable
from sequoia.credentials import channel_credentials, server_credentials
from sequoia.errors import InvalidArgument
from sequoia.in_process import LocalServices
from sequoia.tls import PLAIN, Tls

MAX_REQUEST_BYTES = 4 * 2**20
# A description carries the tokenizer file: 33 MB for a vocabulary of 262144.
MAX_RESPONSE_BYTES = 128 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
# Calls at a time over one connection; a gateway has one for all its requests.
MAX_STREAMS = 1024
_KEEPALIVE_MS = 20_000
_GRACE_SECONDS = 5.0

# Keepalive has to be set on both sides: a default server closes connections that ping this often.
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    # A peer that was cut off or restarted is soon there again; calls in between would fail at once. (The option that is
    # called min_reconnect_backoff is the time that a connection may take: a far peer needs more than this.)
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC's own bandwidth probes are pings too, and a busy client would be shut out for them ("too_many_pings").
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # A message is counted when it has been unpacked: 400 MiB of zeros, packed, took as much of a server that allows 4.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Two servers on one port would share its connections in silence.
    ("grpc.so_reuseport", 0),
)


# What stubs take.
StubChannel = grpc.aio.Channel | LocalServices


class Dial(Protocol):
    """What opens a channel to an address, as `open_channel` does."""

    def __call__(self, address: str, tls: Tls, /, *, server_name: str) -> StubChannel: ...


def open_channel(address: str, tls: Tls = PLAIN, *, server_name: str = "") -> grpc.aio.Channel:
    """A channel for asyncio code; it connects when first used.

    The certificate there must be for `server_name`, or, where that is empty, for the address. Raises InvalidArgument
    for files that are no certificates, and for another host without any.
    """
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if server_name:
        options = (*options, ("grpc.ssl_target_name_override", server_name))
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def open_sync_channel(address: str, tls: Tls = PLAIN) -> grpc.Channel:
    """A channel for threads; it connects when first used. Raises InvalidArgument as `open_channel` does."""
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def channel_options(address: str) -> tuple[tuple[str, int | str], ...]:
    """Of a channel to there.

    Calls go in turn to all addresses of a dns:///NAME:PORT; a proxy for the world outside has no business with what
    stays on this machine.
    """
    options: list[tuple[str, int | str]] = [*_CHANNEL_OPTIONS]
    if address.startswith("dns:"):
        options.append(("grpc.lb_policy_name", "round_robin"))
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    return tuple(options)


class _ReadsRequests(grpc.aio.ServerInterceptor):
    """Refuses a request that cannot be read by name; gRPC itself answers UNKNOWN.

    Messages of a stream are read by their handler, inside its error border.
    """

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        parse = handler.request_deserializer
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

        def read(raw: bytes) -> Any:
            try:
                return parse(raw)
            except DecodeError as error:
                return error

        async def checked(request: Any, context: Any) -> Any:
            if isinstance(request, DecodeError):
                await abort(context, unreadable(request))
            if not inspect.isasyncgenfunction(behaviour):
                return await behaviour(request, context)
            async for response in behaviour(request, context):
                await context.write(response)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(checked, read, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(checked, read, handler.response_serializer)


class Server:
    """A gRPC server with health and reflection. Add servicers to `grpc_server`, then `start`, `serve`, `stop`.

    `asks_certificate`: with CAs, whether clients must have a certificate. Raises InvalidArgument for files that are no
    certificates, and for an address that others can reach without any.
    """

    def __init__(self, listen: str, tls: Tls = PLAIN, *, asks_certificate: bool = True) -> None:
        self._credentials = server_credentials(listen, tls, asks_certificate=asks_certificate)
        self.grpc_server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=(_ReadsRequests(),))
        self._listen = listen
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)

    async def start(self, services: Sequence[str]) -> str:
        """Listen, say SERVING for the named services, return the address with its real port."""
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc_server)
        try:
            port = self._add_port()
        except RuntimeError as error:
            raise InvalidArgument(f"cannot listen on {self._listen}: {error}", "listen") from error
        await self.grpc_server.start()
        for service in ("", *services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        is_port = not self._listen.startswith("unix:")
        return f"{self._listen.rpartition(':')[0]}:{port}" if is_port else self._listen

    def _add_port(self) -> int:
        if self._credentials is None:
            return self.grpc_server.add_insecure_port(self._listen)
        return self.grpc_server.add_secure_port(self._listen, self._credentials)

    async def stop(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, let running calls end for `grace_seconds`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_seconds)


@asynccontextmanager
async def running(servers: Mapping[Server, Sequence[str]]) -> AsyncIterator[None]:
    """Start the servers with their services, announce the addresses on stdout when all serve, stop them in the end."""
    try:
        addresses = [await server.start(services) for server, services in servers.items()]
        for address, (service, *_) in zip(addresses, servers.values(), strict=True):
            print(json.dumps({"event": "serving", "address": address, "service": service}), flush=True)
        yield
    finally:
        await asyncio.gather(*(server.stop(_GRACE_SECONDS) for server in servers))


def announce_progress(done: int, total: int) -> None:
    """Tell on stdout, before anything is served, how far a long preparation is: (parts done, parts in all)."""
    print(json.dumps({"event": "progress", "done": done, "total": total}), flush=True)


async def stop_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
