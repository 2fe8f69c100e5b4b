"""Certificates of authorities that tests make up: in files, as operators have them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import trustme

_LONG_AGO = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 2, 1, tzinfo=UTC))


class Pair(NamedTuple):
    """The files of a certificate and its key."""

    cert: str
    key: str

    def read(self) -> tuple[bytes, bytes]:
        """Both, the key first."""
        return Path(self.key).read_bytes(), Path(self.cert).read_bytes()

    def write(self, key: bytes | None, cert: bytes) -> None:
        """Both; without a key its file is gone."""
        Path(self.cert).write_bytes(cert)
        Path(self.key).write_bytes(key or b"")
        if key is None:
            Path(self.key).unlink()


class Authority:
    """One that issues certificates into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._authority = folder, trustme.CA()
        self.path = str(folder / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.path)

    def issue(self, name: str, *identities: str, common_name: str | None = None, is_expired: bool = False) -> Pair:
        """A certificate for hosts or clients, in NAME.pem and NAME.key; it replaces the one that was there."""
        since, until = _LONG_AGO if is_expired else (None, None)
        leaf = self._authority.issue_cert(*identities, common_name=common_name, not_before=since, not_after=until)
        pair = Pair(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"))
        Path(pair.cert).write_bytes(b"".join(each.bytes() for each in leaf.cert_chain_pems))
        Path(pair.key).write_bytes(leaf.private_key_pem.bytes())
        return pair

    def server(self, *, is_expired: bool = False) -> Pair:
        """For a server on loopback."""
        return self.issue("server", "127.0.0.1", "localhost", is_expired=is_expired)
