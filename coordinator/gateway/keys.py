"""API keys: who may ask. Only their digests are kept, so that the file betrays none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from coordinator.clients_file import digest_of
from coordinator.gateway.failures import wrong_key
from sequoia.access import token_of
from sequoia.credentials import Renewed
from sequoia.errors import InvalidArgument
from sequoia.watched_files import WatchedFiles

_LINE = re.compile(r"(?:(?P<name>[^:]+):)?(?P<digest>[0-9a-fA-F]{64})")


class ApiKeys:
    """The keys of a file, which is read again when it has changed; a name that is empty: the coordinator decides.

    Raises InvalidArgument naming the line for a file that is none. One that becomes none changes nothing.
    """

    def __init__(self, path: str) -> None:
        self._known = Renewed(WatchedFiles(path), lambda: _read(Path(path))) if path else None

    def __bool__(self) -> bool:
        return self._known is not None

    def owner(self, authorization: str) -> str:
        """The name of the key in an Authorization header. Raises ApiError where it is none of ours."""
        assert self._known is not None, "there are keys"
        self._known.news()
        token = token_of(authorization)
        # Looking up a digest tells whoever measures the time nothing of the keys.
        owner = self._known.value.get(digest_of(token)) if token else None
        if owner is None:
            raise wrong_key(is_given=bool(authorization))
        return owner


def _read(path: Path) -> Mapping[str, str]:
    """Names by digest: a line `SHA256` or `NAME:SHA256` for each; # begins a comment."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", "api_keys") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            reason = f"line {number} of {path} is neither SHA256 nor NAME:SHA256, in hexadecimal digits"
            raise InvalidArgument(reason, "api_keys")
        found[match["digest"].lower()] = match["name"] or f"line {number}"
    if not found:
        raise InvalidArgument(f"{path} has no key: nobody would be let in", "api_keys")
    return found
