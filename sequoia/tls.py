"""The settings by which the parts of the system know each other, and where plain text is refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

from sequoia.addresses import is_local
from sequoia.config import setting
from sequoia.errors import InvalidArgument
from sequoia.watched_files import WatchedFiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files (PEM): our certificate chain and its key, and the CAs that the other side's must come from.

    `insecure` allows plain text to other hosts where these are not given.
    """

    cert: str = ""
    key: str = ""
    ca: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise InvalidArgument("goes with tls_key; give both", "tls_cert")

    def watched(self) -> WatchedFiles:
        """Its files."""
        return WatchedFiles(self.cert, self.key, self.ca)


PLAIN = Tls()


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """The settings of a process that is part of the system: the same names everywhere."""

    tls_cert: str = setting("", "file with this process's certificate chain (PEM); with --tls-key it serves TLS")
    tls_key: str = setting("", "file with the certificate's private key (PEM, not encrypted)")
    tls_ca: str = setting(
        "", "file with the CAs (PEM) that the others' certificates come from; a server then asks for one (mTLS)"
    )
    insecure: bool = setting(False, "allow plain text to and from other hosts: whoever is on the way reads and writes")

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("--tls-cert (SEQUOIA_TLS_CERT) and --tls-key (SEQUOIA_TLS_KEY) go together; give both")

    @property
    def tls(self) -> Tls:
        """As channels and servers take them."""
        return Tls(self.tls_cert, self.tls_key, self.tls_ca, self.insecure)


def check_peer(address: str, tls: Tls, remedy: str = "--tls-ca FILE") -> None:
    """Before a connection in plain text: InvalidArgument naming `address` where it leaves this machine."""
    if not is_local(address):
        warn_or_refuse(f"{address} is another host, and the connection would be plain text", tls, remedy, "address")


def check_listen(listen: str, tls: Tls) -> None:
    """Before serving plain text: InvalidArgument naming `listen` where others can reach it."""
    if not is_local(listen):
        warn_or_refuse(
            f"{listen} is open to other hosts, in plain text", tls, "--tls-cert FILE --tls-key FILE", "listen"
        )


def warn_or_refuse(problem: str, tls: Tls, remedy: str, field: str) -> None:
    """InvalidArgument naming `field`, or, where `insecure` allows it, a warning, once."""
    if not tls.insecure:
        raise InvalidArgument(f"{problem}; give {remedy}, or --insecure where the network is trusted", field)
    _warn_once(f"insecure: {problem}, as --insecure allows")


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    _log.warning(message)
