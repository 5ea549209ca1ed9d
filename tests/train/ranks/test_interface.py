"""A host whose name leads to loopback is refused where other hosts would have to reach it."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from engine.train.ranks.interface import address_of, check_interface

ADDRESSES = {"node1": "10.0.0.1", "node2": "127.0.1.1", "node3": "::1", "localhost": "127.0.0.1"}
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1"}


@pytest.mark.parametrize(
    ("host", "env"),
    [
        ("node1", TWO),
        ("node2", {}),
        ("node2", {"WORLD_SIZE": "1", "MASTER_ADDR": "node1"}),
        ("node2", TWO | {"GLOO_SOCKET_IFNAME": "eth0"}),
        ("node2", TWO | {"MASTER_ADDR": "localhost"}),
    ],
)
def test_hosts_that_need_not_or_can_be_reached(host: str, env: dict[str, str]) -> None:
    assert check_interface(env, 1, host, ADDRESSES.get) is None


@pytest.mark.parametrize(
    ("host", "words"),
    [("node2", "node2 is 127.0.1.1"), ("node3", "node3 is ::1"), ("node4", "node4 leads to no address")],
)
def test_hosts_that_others_would_wait_for(host: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^GLOO_SOCKET_IFNAME: not set, and {words} on that host, where 3 rank"):
        check_interface(TWO | {"WORLD_SIZE": "4"}, 1, host, ADDRESSES.get)


def test_names_are_looked_up() -> None:
    assert address_of("127.0.0.1") == "127.0.0.1"
    assert address_of("no-such-host.invalid") is None
