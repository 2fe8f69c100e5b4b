"""Who asks, and what they may: by token or certificate, within their limits."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coordinator.allowance import Allowance, limited_tokens
from coordinator.clients_file import KnownClient, digest_of, read_clients
from sequoia.access import token_of
from sequoia.credentials import Renewed
from sequoia.errors import PermissionDenied, Unauthenticated
from sequoia.watched_files import WatchedFiles

_NAMES = ("x509_subject_alternative_name", "x509_common_name")
_ANYBODY = KnownClient("")


class CallContext(Protocol):
    """The part of a servicer context that tells who asks."""

    def invocation_metadata(self) -> Any: ...

    def auth_context(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Use:
    """One request of a client, while it runs."""

    client: KnownClient
    allowance: Allowance

    def max_tokens(self, asked: int | None, default: int) -> int:
        """What its answer may have. Raises PermissionDenied where that was asked for and is too much."""
        return limited_tokens(asked, default, self.client.limits)

    def add_tokens(self, number: int) -> None:
        """It has read or written so many."""
        self.allowance.use_tokens(number)


class Clients:
    """Those of a file, which is read again when it has changed; an empty name: everybody is let in, without limits.

    Raises InvalidArgument for a file that is none. One that becomes none changes nothing.
    """

    def __init__(self, path: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._allowances: dict[str, Allowance] = {}
        self._known = Renewed(WatchedFiles(path), lambda: read_clients(Path(path))) if path else None

    def client(self, context: CallContext) -> KnownClient:
        """Who asks. Raises Unauthenticated or PermissionDenied.

        A token that is sent decides, also where a certificate would do: a gateway asks for others.
        """
        if self._known is None:
            return _ANYBODY
        self._known.news()
        header = _header(context)
        if header is not None:
            return _by_token(self._known.value, token_of(header))
        return _by_certificate(self._known.value, context.auth_context())

    @contextmanager
    def request(self, context: CallContext) -> Iterator[Use]:
        """Around a request. Raises as `client` does, and ResourceExhausted for what goes beyond a limit."""
        client = self.client(context)
        allowance = self._allowances.setdefault(client.name, Allowance(self._now()))
        allowance.begin(client.limits, self._now())
        try:
            yield Use(client, allowance)
        finally:
            allowance.end()


def _header(context: CallContext) -> str | None:
    metadata = context.invocation_metadata() or ()
    return next((value for key, value in metadata if key == "authorization"), None)


def _by_token(known: Sequence[KnownClient], token: str) -> KnownClient:
    digest, found = digest_of(token), None
    for client in known:
        for each in client.token_sha256:
            # All are compared, each in constant time.
            found = client if hmac.compare_digest(each, digest) else found
    if found is None or not token:
        raise Unauthenticated("is none that is known here" if token else "is missing", "token")
    return found


def _by_certificate(known: Sequence[KnownClient], peer: Mapping[str, Any]) -> KnownClient:
    names = [each.decode(errors="replace") for kind in _NAMES for each in peer.get(kind, ())]
    if not names:
        raise Unauthenticated("is missing", "token")
    found = next((client for client in known if not set(names).isdisjoint(client.identities)), None)
    if found is None:
        raise PermissionDenied(f"{', '.join(names):.200} is no client that is known here", "certificate")
    return found
