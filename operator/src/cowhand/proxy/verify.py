"""Probes that prove from inside that the packet filter holds; `egress.py` runs them under the sandbox's UID.

Only an error that comes at once and that the reject rule makes counts as proof. A timeout may be a
slow network, a refused connection means that something answered: neither proves a filter.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

AT_ONCE_S: Final = 1.0
"""A rejection of the local filter takes microseconds; later ones came from the network."""

PROOF: Final = frozenset({errno.EPERM, errno.EACCES, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""What `reject with icmpx admin-prohibited` gives: EHOSTUNREACH (IPv4), EACCES (IPv6), EPERM (UDP);
ENETUNREACH where there is no route at all. ECONNREFUSED is an answer, so it is not among them."""


@dataclass(frozen=True)
class Target:
    """Something that the sandbox must not reach."""

    what: str
    host: str
    port: int
    proto: Literal["tcp", "udp"] = "tcp"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.what} ({self.proto} {host}:{self.port})"


@dataclass(frozen=True)
class Outcome:
    """What a probe saw: `ok` is what we want (refused, or loopback works), `detail` says what happened."""

    target: str
    ok: bool
    detail: str


def probe(target: Target, timeout_s: float = AT_ONCE_S) -> Outcome:
    """Try to reach a target from this process, as its own UID."""
    attempt = _connect if target.proto == "tcp" else _query
    began = time.monotonic()
    try:
        attempt(target, timeout_s)
    except TimeoutError:
        return Outcome(str(target), False, "no answer in time, which proves nothing")
    except OSError as err:
        took = time.monotonic() - began
        name = errno.errorcode.get(err.errno or 0, str(err))
        if err.errno in PROOF and took < timeout_s:
            return Outcome(str(target), True, name)
        return Outcome(str(target), False, f"{name} after {took:.3f} s is not the filter's refusal")
    return Outcome(str(target), False, "reached")


def _family(target: Target) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in target.host else socket.AF_INET


def _connect(target: Target, timeout_s: float) -> None:
    """Connect by TCP, or raise what the kernel says; TimeoutError if it says nothing.

    A rejection comes back while connect() still holds the socket. The kernel then keeps it as a soft
    error, which over IPv6 a blocking connect() reports only after the first retransmission (1 s);
    SO_ERROR shows it at once.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(_family(target), socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        code = sock.connect_ex((target.host, target.port))
        while code == errno.EINPROGRESS:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code != 0:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            _, writable, _ = select.select([], [sock], [], min(left, 0.05))
            code = errno.EINPROGRESS
            if writable:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code != 0:
            raise OSError(code, os.strerror(code))


def _query(target: Target, timeout_s: float) -> None:
    """Send a DNS query by UDP and wait for any answer."""
    with socket.socket(_family(target), socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect((target.host, target.port))
        sock.send(b"\0\1\1\0\0\1\0\0\0\0\0\0\0\0\2\0\1")
        sock.recv(512)


def loopback_works(host: str = "127.0.0.1") -> Outcome:
    """The sandbox's own loopback must stay usable: listen, connect, pass a byte."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    what = f"loopback {host}"
    try:
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind((host, 0))
            server.listen(1)
            client.settimeout(2)
            server.settimeout(2)
            client.connect(server.getsockname())
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"x")
                return Outcome(what, client.recv(1) == b"x", "works")
    except OSError as err:
        return Outcome(what, False, f"does not work: {err}")


def nameservers(resolv_conf: str) -> list[str]:
    """Addresses of the name servers in a resolv.conf, without those on loopback."""
    found = []
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            address = words[1].partition("%")[0]
            if not ipaddress.ip_address(address).is_loopback:
                found.append(address)
    return found


def default_gateway(route_table: str) -> str | None:
    """Address of the default gateway in the text of /proc/net/route, None without one."""
    for line in route_table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
            gateway = socket.inet_ntoa(struct.pack("=I", int(fields[2], 16)))
            if gateway != "0.0.0.0":  # noqa: S104
                return gateway
    return None


def targets(
    env: Mapping[str, str], *, resolv_conf: str, route_table: str, has_v6: bool
) -> list[Target]:
    """Everything that must be out of reach, from what this pod knows of its surroundings."""
    found = [
        Target("cloud metadata", "169.254.169.254", 80),
        Target("a public address", "192.0.2.1", 443),
        Target("a public address", "192.0.2.1", 443, "udp"),
    ]
    if api := env.get("KUBERNETES_SERVICE_HOST", ""):
        port = int(env.get("KUBERNETES_SERVICE_PORT", "443"))
        found.append(Target("the API server", api, port))
    for server in nameservers(resolv_conf):
        found.append(Target("DNS", server, 53, "udp"))
        found.append(Target("DNS", server, 53))
    if gateway := default_gateway(route_table):
        found.append(Target("the node's kubelet", gateway, 10250))
    if has_v6:
        found.append(Target("a public address", "2001:db8::1", 443))
        found.append(Target("a public address", "2001:db8::1", 443, "udp"))
    return found


def broker_targets(url: str) -> list[Target]:
    """The broker by address. Its name should not even resolve here: then there is nothing to dial."""
    parts = urlsplit(url)
    port = parts.port or 443
    try:
        entries = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = sorted({str(entry[4][0]) for entry in entries})
    return [Target("the broker", address, port) for address in addresses]


def run_probes(
    env: Mapping[str, str], *, resolv_conf: str, route_table: str, has_v6: bool
) -> list[Outcome]:
    """All probes; names are looked up only once DNS is known to be refused, so that nothing hangs."""
    outcomes = [
        probe(target)
        for target in targets(env, resolv_conf=resolv_conf, route_table=route_table, has_v6=has_v6)
    ]
    url = env.get("COWHAND_BROKER_URL", "")
    if url and not failures(outcomes):
        outcomes += [probe(target) for target in broker_targets(url)]
    outcomes.append(loopback_works())
    if has_v6:
        outcomes.append(loopback_works("::1"))
    return outcomes


def failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes that are not what we want."""
    return [outcome for outcome in outcomes if not outcome.ok]
