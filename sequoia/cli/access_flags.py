"""The flags by which a command reaches a coordinator on another host, and is let in."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequoia.access import Access

_FILES = {
    "tls_ca": "the CAs (PEM) that the coordinator's certificate comes from; without it this machine only",
    "tls_cert": "our own certificate chain (PEM), where the coordinator asks for one",
    "tls_key": "its private key (PEM)",
    "token_file": "the token by which the coordinator knows us (or the token itself in SEQUOIA_TOKEN)",
}
ACCESS_FLAGS = (*_FILES, "insecure")


def add_access(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare them. None has a default, so that what was given can be told; else SEQUOIA_* variables count."""
    for name, text in _FILES.items():
        flag, variable = f"--{name.replace('_', '-')}", f"SEQUOIA_{name.upper()}"
        parser.add_argument(flag, metavar="FILE", help=f"file with {text} (or {variable})")
    text = "allow plain text to another host (or SEQUOIA_INSECURE)"
    parser.add_argument("--insecure", action="store_true", default=None, help=text)


def access_of(arguments: argparse.Namespace | None = None) -> Access:
    """What the flags, or the environment, say. Raises InvalidArgument naming a file that is of no use."""
    from sequoia.access import Access, read_token

    given = {name: _given(arguments, name) for name in ACCESS_FLAGS}
    access = Access(insecure=given["insecure"].lower() in ("1", "true", "yes"))
    access |= Access(tls_ca=given["tls_ca"], tls_cert=given["tls_cert"], tls_key=given["tls_key"])
    if given["token_file"]:
        return access | Access(token=read_token(Path(given["token_file"])))
    token = os.environ.get("SEQUOIA_TOKEN")
    return access | Access(token=token) if token else access


def _given(arguments: argparse.Namespace | None, name: str) -> str:
    value = getattr(arguments, name, None)
    return str(value if value is not None else os.environ.get(f"SEQUOIA_{name.upper()}", ""))
