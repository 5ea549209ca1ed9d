"""Checks that the ranks of other hosts can reach this one at the address that gloo announces."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping

from engine.errors import UserError


def address_of(host: str) -> str | None:
    """The first address that a host name resolves to, which gloo uses; None if it can't be resolved."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    except (OSError, UnicodeError):
        return None


def check_interface(env: Mapping[str, str], local_size: int, host: str, lookup: Callable[[str], str | None]) -> None:
    """Refuse a host that would announce its loopback address to other hosts, whose ranks would wait in vain.

    Many systems write such a line into /etc/hosts (127.0.1.1 on Debian). Where MASTER_ADDR is a loopback address all
    ranks are on one machine, whatever their hosts are called.

    Args:
        env: with WORLD_SIZE, MASTER_ADDR and perhaps GLOO_SOCKET_IFNAME.
        local_size: ranks on this host.
        host: its name.
        lookup: resolves a host name to an address, None if it can't be resolved.

    Raises:
        UserError: there are other hosts, and they can't reach this one.
    """
    others = int(env.get("WORLD_SIZE") or "1") - local_size
    if others <= 0 or env.get("GLOO_SOCKET_IFNAME") or is_loopback(lookup(env.get("MASTER_ADDR", ""))):
        return
    address = lookup(host)
    if address is None or is_loopback(address):
        leads = "leads to no address" if address is None else f"is {address}"
        raise UserError(
            f"GLOO_SOCKET_IFNAME: not set, and {host} {leads} on that host, where {others} rank(s) of other hosts "
            "can't reach it; set it to the interface of the nodes' network (`ip -brief address`), or correct /etc/hosts"
        )


def is_loopback(address: str | None) -> bool:
    """Whether an address is a loopback address."""
    return address is not None and ipaddress.ip_address(address).is_loopback
