"""The credentials of channels and servers, from certificates in files that may change while they serve."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar, cast

import grpc

from sequoia.addresses import is_socket
from sequoia.errors import InvalidArgument
from sequoia.tls import Tls, check_listen, check_peer
from sequoia.watched_files import WatchedFiles

_log = logging.getLogger(__name__)

Made = TypeVar("Made")


def channel_credentials(address: str, tls: Tls) -> grpc.ChannelCredentials | None:
    """For a channel to that address; None: plain text, on this machine or because `insecure` allows it.

    Raises InvalidArgument for files that are none, and for another host where no CA is given.
    """
    if is_socket(address):
        return None
    if not tls.ca:
        check_peer(address, tls)
        return None
    key, chain = _read_pair(tls.cert, tls.key) if tls.cert else (None, None)
    return grpc.ssl_channel_credentials(_read_authorities(tls.ca), key, chain)


def server_credentials(listen: str, tls: Tls, *, asks_certificate: bool = True) -> grpc.ServerCredentials | None:
    """For a server on that address; None: plain text, for this machine or because `insecure` allows it.

    Where there are CAs, clients need a certificate, unless it is not asked for. The files are looked at for every
    connection, and read again when they have changed: running streams go on, and what does not fit together changes
    nothing. Raises InvalidArgument for files that are none, and for another host where there is no certificate.
    """
    if is_socket(listen):
        return None
    if not tls.cert:
        check_listen(listen, tls)
        return None
    asks = bool(tls.ca) and asks_certificate

    def read() -> grpc.ServerCertificateConfiguration:
        pair, authorities = _read_pair(tls.cert, tls.key), _read_authorities(tls.ca) if asks else None
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    renewed = Renewed(tls.watched(), read)
    # gRPC asks for each connection, from its own threads; None, which its types do not know: as before.
    news = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed.news)
    return grpc.dynamic_ssl_server_credentials(renewed.value, news, asks)


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """For HTTPS: each connection is served with the files as they are then. Raises InvalidArgument for others."""
    renewed = Renewed(WatchedFiles(cert, key), lambda: _server_context(cert, key))

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        renewed.news()
        connection.context = renewed.value

    first = renewed.value
    first.sni_callback = choose
    return first


class Renewed(Generic[Made]):
    """What is made of files: the last that could be. `make` raises InvalidArgument where they do not fit together."""

    def __init__(self, files: WatchedFiles, make: Callable[[], Made]) -> None:
        self._files, self._make = files, make
        self._problem = ""
        self.value = make()

    def news(self) -> Made | None:
        """Where the files have changed, the new value; None where they have not, or are no good: `value` stays then."""
        if not self._files.changed():
            return None
        try:
            self.value = self._make()
        except InvalidArgument as error:
            # It may be half written.
            self._files.again()
            self._report(str(error))
            return None
        self._report("")
        return self.value

    def _report(self, problem: str) -> None:
        if not problem:
            _log.info("files read again", extra={"files": self._files.names})
        elif problem != self._problem:
            _log.warning("changed files not used", extra={"files": self._files.names, "reason": problem})
        self._problem = problem


def _server_context(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(context, cert, key)
    return context


def _read_pair(cert: str, key: str) -> tuple[bytes, bytes]:
    """The key and the certificate chain, which belong together."""
    pair = _read(key, "tls_key"), _read(cert, "tls_cert")
    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    if pair != (_read(key, "tls_key"), _read(cert, "tls_cert")):
        raise InvalidArgument(f"{cert} and {key} are being written", "tls_cert")
    return pair


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    try:
        # Without a password OpenSSL would ask for that of an encrypted key on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"no certificate and key that fit, {cert} and {key}: {error}", "tls_cert") from error


def _read_authorities(ca: str) -> bytes:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{ca} has no certificates: {error}", "tls_ca") from error
    return _read(ca, "tls_ca")


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field) from error
