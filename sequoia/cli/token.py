"""`sequoia token`: a new bearer token for a client, and the lines that let it in."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
from pathlib import Path

from sequoia.errors import InvalidArgument

_NUM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.epilog = "the token is kept nowhere: the lines for the coordinator's --clients file have its digest only"
    parser.add_argument("name", metavar="NAME", help="of the client, as it will be in logs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the token here, readable by you alone")


def run(arguments: argparse.Namespace) -> int:
    """Make it, and print: the lines for the file to stdout, the token to the file or to stderr."""
    from coordinator.clients_file import digest_of

    if not _NAME.fullmatch(arguments.name):
        raise InvalidArgument(f"{arguments.name!r} must be of letters, digits, _ and -", "name")
    token = "sq-" + secrets.token_urlsafe(_NUM_BYTES)
    if arguments.out is None:
        print(f"the token, told once: {token}", file=sys.stderr)
    else:
        _write(arguments.out, token)
    print(f'[clients.{arguments.name}]\ntoken_sha256 = "{digest_of(token)}"')
    return 0


def _write(path: Path, token: str) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error}", "out") from error
