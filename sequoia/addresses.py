"""Which addresses stay on this machine."""

from __future__ import annotations

import ipaddress

_SOCKETS = ("unix:", "unix-abstract:")


def is_socket(address: str) -> bool:
    """Whether it is a Unix socket, which the file system protects."""
    return address.startswith(_SOCKETS)


def is_local(address: str) -> bool:
    """Whether HOST:PORT is loopback, or the address a Unix socket: nobody on the network reads along."""
    return is_socket(address) or is_loopback(address.rpartition(":")[0].strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether a host's name or number is this machine's own; what is not known to be is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
