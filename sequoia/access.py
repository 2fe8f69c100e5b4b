"""What a client shows to be let in, and by what it knows whom it talks to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

from sequoia.errors import InvalidArgument
from sequoia.tls import Tls

MOST_TOKEN_CHARACTERS = 512
# RFC 6750.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_SCHEME = "bearer"
_HEADER = "authorization"

Metadata = tuple[tuple[str, str], ...]


class Access(TypedDict, total=False):
    """How a client reaches a coordinator. What is left out is not used: plain text then, on this machine only."""

    tls_ca: str  # file with the CAs (PEM) that the coordinator's certificate comes from; it is asked over TLS then
    tls_cert: str  # file with our own certificate chain (PEM), where one is asked for (mTLS)
    tls_key: str  # file with its key
    token: str  # by which the coordinator knows us
    insecure: bool  # allow plain text to another host


def tls_of(access: Access) -> Tls:
    """Its files. Raises InvalidArgument for a certificate without its key."""
    return Tls(
        access.get("tls_cert", ""),
        access.get("tls_key", ""),
        access.get("tls_ca", ""),
        access.get("insecure", False),
    )


def bearer(token: str | None) -> Metadata:
    """The metadata that carries a token; "" carries none, but asks to be known by one, and None says nothing.

    Raises InvalidArgument for what is no token; it is not repeated, as it may be one with a typing error.
    """
    if token is None:
        return ()
    if token and not is_token(token):
        raise InvalidArgument("has characters that no token has, or is too long", "token")
    return ((_HEADER, f"Bearer {token}"),)


def read_token(path: Path) -> str:
    """The token in a file. Raises InvalidArgument naming `token_file`."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", "token_file") from error
    if not token or not is_token(token):
        raise InvalidArgument(f"{path} has no token", "token_file")
    return token


def is_token(text: str) -> bool:
    """Whether it can be one."""
    return len(text) <= MOST_TOKEN_CHARACTERS and _TOKEN.fullmatch(text) is not None


def token_of(header: str) -> str:
    """The token in an Authorization header; "" where there is none that could be one."""
    scheme, _, token = header.strip().partition(" ")
    token = token.strip()
    return token if scheme.lower() == _SCHEME and is_token(token) else ""
