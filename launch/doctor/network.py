"""This host's name, its interfaces, and whether two processes on it can join a process group."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
SIOCGIFADDR = 0x8915


def addresses_of(host: str) -> list[str]:
    """The addresses that a name resolves to, IPv4 first; none if it doesn't."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    ordered = sorted(answers, key=lambda answer: answer[0] != socket.AF_INET)
    return list(dict.fromkeys(str(answer[4][0]) for answer in ordered))


def interfaces() -> dict[str, str]:
    """The network interfaces that have an IPv4 address, with it."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            addresses[name] = socket.inet_ntoa(request.tobytes()[20:24])
    return addresses


def check_hostname(several_nodes: bool) -> Iterator[Finding]:
    """Whether the others could find this host by its name, and which interfaces gloo and NCCL would take."""
    name = socket.gethostname()
    addresses = addresses_of(name)
    yield judge_hostname(name, addresses, several_nodes)
    yield from judge_interfaces(interfaces(), addresses, os.environ)


def judge_hostname(name: str, addresses: Sequence[str], several_nodes: bool) -> Finding:
    """Whether a host's name leads to it from elsewhere.

    Args:
        addresses: that the name resolves to here.
        several_nodes: whether a run over nodes is meant; a single machine is content with loopback.
    """
    if not addresses:
        remedy = f"add a line with this machine's address and {name} to /etc/hosts"
        return Finding("host name", "problem", f"{name} doesn't resolve", remedy)
    found = f"{name} is {', '.join(addresses)}"
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        remedy = f"for runs over nodes: give {name} its network address in /etc/hosts, and set GLOO_SOCKET_IFNAME"
        return Finding("host name", "problem" if several_nodes else "note", f"{found}, loopback only", remedy)
    return Finding("host name", "ok", found)


def judge_interfaces(there: Mapping[str, str], own: Sequence[str], env: Mapping[str, str]) -> Iterator[Finding]:
    """The interface that each back end would take.

    Args:
        there: interfaces with their addresses.
        own: addresses of this host's name, by which gloo chooses.
        env: may hold GLOO_SOCKET_IFNAME (a list) and NCCL_SOCKET_IFNAME (prefixes; = exact, ^ all but these).
    """
    remedy = f"unset it, or give one of {', '.join(there)}"
    for variable, exact in (("GLOO_SOCKET_IFNAME", True), ("NCCL_SOCKET_IFNAME", False)):
        given = env.get(variable)
        backend = variable.split("_")[0].replace("GLOO", "gloo")
        if given is None:
            taken = by_name(there, own) if exact else next(iter(selected("^lo,docker", there)), "lo")
            yield Finding(f"{backend} interface", "ok", f"{taken} ({there.get(taken, 'unknown')}), by default")
            continue
        names = [name for name in given.split(",") if name in there] if exact else selected(given, there)
        if names:
            yield Finding(f"{backend} interface", "ok", f"{names[0]} ({there[names[0]]}), by {variable}={given}")
        else:
            yield Finding(f"{backend} interface", "problem", f"{variable}={given} names no interface here", remedy)


def by_name(there: Mapping[str, str], own: Sequence[str]) -> str:
    """The interface that has an address of the host's name; loopback if none has."""
    return next((name for name, address in there.items() if address in own), "lo")


def selected(rule: str, there: Mapping[str, str]) -> list[str]:
    """The interfaces that NCCL's rule takes: prefixes by commas, after ^ those to leave out, after = whole names."""
    excluding, text = rule.startswith("^"), rule.removeprefix("^")
    exact, text = text.startswith("="), text.removeprefix("=")
    wanted = text.split(",")
    match = [name for name in there if any(name == prefix if exact else name.startswith(prefix) for prefix in wanted)]
    return [name for name in there if name not in match] if excluding else match


def check_gloo(host: str | None = None, timeout: float = 60.0) -> Iterator[Finding]:
    """Two processes of this machine join a process group at a host's name, by default this one's, and sum a tensor.

    Args:
        timeout: seconds to import torch, to meet and to sum.
    """
    host = host or socket.gethostname()
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "launch.doctor.gloo_rank", host, str(port), str(timeout)]
    start, deadline = time.monotonic(), time.monotonic() + timeout
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    message = ""
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))
            message = message or (errors.strip().splitlines() or ["it ended without a message"])[-1] * bool(
                rank.returncode
            )
        except subprocess.TimeoutExpired:
            message = message or f"no answer within {timeout:g} s"
            rank.kill()
            rank.communicate()
    remedy = "let the host's name resolve (/etc/hosts), set GLOO_SOCKET_IFNAME, and open the firewall for this machine"
    if message:
        yield Finding("gloo", "problem", f"two processes at {host}:{port} didn't meet: {message}", remedy)
    else:
        yield Finding("gloo", "ok", f"two processes met at {host} and summed, in {time.monotonic() - start:.1f} s")
