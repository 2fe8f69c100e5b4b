"""API keys: who may ask. Only their digests are kept, so that the file betrays none."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from coordinator.gateway.failures import ApiError
from sequoia.errors import InvalidArgument

_LINE = re.compile(r"(?:(?P<name>[^:]+):)?(?P<digest>[0-9a-fA-F]{64})")


class ApiKeys:
    """The keys that are let in, by their SHA-256; none: everybody is."""

    def __init__(self, name_by_digest: dict[str, str]) -> None:
        self._name_by_digest = name_by_digest

    def __bool__(self) -> bool:
        return bool(self._name_by_digest)

    @staticmethod
    def from_file(path: Path) -> ApiKeys:
        """A line `SHA256` or `NAME:SHA256` for each; # begins a comment. Raises InvalidArgument naming the line."""
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
        return ApiKeys(found)

    def owner(self, authorization: str) -> str:
        """The name of the key in an Authorization header. Raises ApiError where it is none of ours."""
        if not self:
            return ""
        scheme, _, key = authorization.partition(" ")
        # Looking up a digest tells whoever measures the time nothing of the keys.
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        owner = self._name_by_digest.get(digest) if scheme.lower() == "bearer" else None
        if owner is None:
            problem = "Incorrect API key provided" if authorization else "No API key was provided"
            reason = f"{problem}; send one as the header Authorization: Bearer KEY."
            raise ApiError(401, reason, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return owner
