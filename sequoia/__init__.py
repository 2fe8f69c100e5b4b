"""Speculative decoding as a service, with optimal token trees.

`from sequoia import Client, AsyncClient` is the Python client; neither torch nor transformers is loaded by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequoia.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sequoia' has no attribute {name!r}")
    from sequoia import client

    return getattr(client, name)
