"""The clients that a coordinator lets in, as a file names them."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sequoia.errors import InvalidArgument

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 2**53
_FIELD = "clients"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may use; 0: as much as there is."""

    max_sessions: int = 0  # requests at a time
    max_tokens: int = 0  # of a request's answer
    tokens_per_minute: int = 0  # of prompts and answers together
    requests_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class KnownClient:
    """By its name in logs. `token_sha256` are lower-case hexadecimal, `identities` names in certificates."""

    name: str
    token_sha256: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    limits: Limits = Limits()


_LIMITS = tuple(each.name for each in fields(Limits))


def digest_of(token: str) -> str:
    """By which a token is kept: the file betrays none."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_clients(path: Path) -> tuple[KnownClient, ...]:
    """All clients of a TOML file with a table `[clients.NAME]` for each. Raises InvalidArgument naming the entry."""
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", _FIELD) from error
    if document.keys() != {"clients"} or not isinstance(document["clients"], dict) or not document["clients"]:
        raise InvalidArgument(f"{path} must have a table [clients.NAME] for each client, and nothing else", _FIELD)
    found = tuple(_client(name, entry) for name, entry in document["clients"].items())
    _check_unique(found)
    return found


def _client(name: str, entry: Any) -> KnownClient:
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{name} is no table", _FIELD)
    if unknown := sorted(entry.keys() - {"token_sha256", "identity", *_LIMITS}):
        raise InvalidArgument(f"{name}.{unknown[0]} is not known; known are token_sha256, identity and limits", _FIELD)
    digests, identities = _texts(name, entry, "token_sha256"), _texts(name, entry, "identity")
    if not all(map(_DIGEST.fullmatch, digests)):
        # It is not repeated: it may be the token itself.
        raise InvalidArgument(f"{name}.token_sha256 must be 64 hexadecimal digits, as `sequoia token` prints", _FIELD)
    if not digests and not identities:
        raise InvalidArgument(f"{name} has neither token_sha256 nor identity: nobody could be that client", _FIELD)
    return KnownClient(name, digests, identities, Limits(**dict(_limits(name, entry))))


def _texts(name: str, entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A string, or a list of some: for a while, an old token and a new one."""
    value = entry.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise InvalidArgument(f"{name}.{key} must be a string, or a list of strings", _FIELD)
    return tuple(texts)


def _limits(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key in entry.keys() & set(_LIMITS):
        value = entry[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise InvalidArgument(f"{name}.{key} must be a whole number, 1 or more; without one there is none", _FIELD)
        yield key, value


def _check_unique(clients: tuple[KnownClient, ...]) -> None:
    owners: dict[str, str] = {}
    for client in clients:
        for mark in (*client.token_sha256, *client.identities):
            if (other := owners.setdefault(mark, client.name)) != client.name:
                raise InvalidArgument(f"{other} and {client.name} have the same token or identity", _FIELD)
