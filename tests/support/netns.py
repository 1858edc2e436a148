"""Two network namespaces joined by a cable: a pod, and everything that it could reach.

`Pair` needs root, `ip` and `nft`. The peer answers on the addresses of an API server, a name server, the
metadata service, a node and the internet, so that a probe which is not stopped does arrive.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from types import TracebackType
from typing import Any

POD_V4, POD_V6 = "10.99.0.1", "fd99::1"
NODE_V4, NODE_V6 = "10.99.0.2", "fd99::2"
API, DNS = "10.96.0.1", "10.96.0.10"
METADATA, INTERNET_V4, INTERNET_V6 = "169.254.169.254", "192.0.2.1", "2001:db8::1"
HOSTS = (NODE_V4, NODE_V6, API, DNS, METADATA, INTERNET_V4, INTERNET_V6)
TCP_PORTS = (22, 53, 80, 443, 853, 6443, 8080, 8443, 10250)
UDP_PORTS = (53, 443, 3478, 5353)
READY_S = 30

_SERVER = """
import selectors, socket, sys
tcp, udp = eval(sys.argv[1]), eval(sys.argv[2])
chosen = selectors.DefaultSelector()
for port in tcp:
    s = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    chosen.register(s, 1, "tcp")
for host in eval(sys.argv[3]):
    for port in udp:
        # One socket for each address: an answer must come from where the query went.
        s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((host, port))
        chosen.register(s, 1, "udp")
chosen.register(sys.stdin, 1, "end")
print("ready", flush=True)
while True:
    for key, _ in chosen.select():
        if key.data == "end":
            sys.exit()
        if key.data == "tcp":
            peer, _ = key.fileobj.accept()
            peer.close()
        else:
            data, address = key.fileobj.recvfrom(2048)
            key.fileobj.sendto(b"answer", address)
"""

_PRELUDE = """
import encodings.idna, errno, json, os, socket, subprocess, sys, time
from cowhand.proxy import egress, rules, verify
args = json.loads(sys.argv[1])
uid = int(sys.argv[2])
if uid:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
def attempt(host, port, proto="tcp"):
    outcome = verify.probe(verify.Target("x", host, port, proto), args.get("timeout_s", verify.AT_ONCE_S))
    return [outcome.ok, outcome.detail]
def out(value):
    print(json.dumps(value), flush=True)
"""


def missing() -> str:
    """Why namespaces cannot be used here, empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"needs the command {tool}"
    name = f"cw-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else "network namespaces are not allowed here"


class Pair:
    """The namespaces `pod` and `peer`; use as a context manager."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.pod, self.peer = f"cw-pod-{tag}", f"cw-peer-{tag}"
        self._cable = (f"cwp{tag}", f"cwq{tag}")
        self._servers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Pair:
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.close()
            server.wait(timeout=10)
            server.stdout.close()
        for name in (self.pod, self.peer):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _build(self) -> None:
        a, b = self._cable
        for name in (self.pod, self.peer):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            for scope in ("all", "default"):
                dad = f"net.ipv6.conf.{scope}.accept_dad=0"
                _run("ip", "netns", "exec", name, "sysctl", "-qw", dad)
        _run(
            "ip", "link", "add", a, "netns", self.pod, "type", "veth", "peer", b, "netns", self.peer
        )
        for name, link, v4, v6 in (
            (self.pod, a, POD_V4, POD_V6),
            (self.peer, b, NODE_V4, NODE_V6),
        ):
            _run("ip", "-n", name, "addr", "add", f"{v4}/24", "dev", link)
            _run("ip", "-n", name, "addr", "add", f"{v6}/64", "dev", link, "nodad")
            _run("ip", "-n", name, "link", "set", link, "up")
        _run("ip", "-n", self.pod, "route", "add", "default", "via", NODE_V4)
        _run("ip", "-n", self.pod, "-6", "route", "add", "default", "via", NODE_V6)
        for address in (API, DNS, METADATA, INTERNET_V4):
            _run("ip", "-n", self.peer, "addr", "add", f"{address}/32", "dev", "lo")
        _run("ip", "-n", self.peer, "addr", "add", f"{INTERNET_V6}/128", "dev", "lo", "nodad")
        ping = "net.ipv4.ping_group_range=0 2147483647"
        _run("ip", "netns", "exec", self.pod, "sysctl", "-qw", ping)
        self._await_links()
        self.serve(self.peer, 0, TCP_PORTS, UDP_PORTS)

    def _await_links(self) -> None:
        """Wait until both ends carry packets and no address is still being checked for a duplicate.

        The kernel brings a link up up to a second after its cable; until then it drops what is sent.
        """
        deadline = time.monotonic() + READY_S
        for name, link in zip((self.pod, self.peer), self._cable, strict=True):
            while (found := _unready(name, link)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not found, f"after {READY_S} s in {name}: {found}"

    def serve(self, name: str, uid: int, tcp: tuple[int, ...], udp: tuple[int, ...] = ()) -> None:
        """Start a server in a namespace under a UID; it ends with the pair."""
        drop = (
            f"import os, selectors, socket, sys; os.setgid({uid}); os.setuid({uid})\n"
            if uid
            else ""
        )
        arguments = [sys.executable, "-c", drop + _SERVER, repr(tcp), repr(udp), repr(HOSTS)]
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

    def run(self, source: str, *, uid: int, name: str = "", **args: Any) -> Any:
        """Run Python in a namespace (default: the pod's) under a UID; answers what it gives to `out`."""
        done = subprocess.run(
            [
                *("ip", "netns", "exec", name or self.pod),
                *(sys.executable, "-c", _PRELUDE + source, json.dumps(args), str(uid)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def load(self, log: str) -> int:
        """Load the rules as the init container does; answers its exit code."""
        return int(self.run("out(egress.run_rules(termination_log=args['log']))", uid=0, log=log))

    def flush(self) -> None:
        """Take the rules away."""
        _run("ip", "netns", "exec", self.pod, "nft", "flush", "ruleset")


def _unready(name: str, link: str) -> str:
    """What is not ready yet in a namespace, empty if everything is."""
    (state,) = json.loads(_run("ip", "-n", name, "-j", "link", "show", "dev", link))
    if state["operstate"] != "UP":
        return f"{link} is {state['operstate']}"
    tentative = _run("ip", "-n", name, "-6", "-o", "addr", "show", "tentative").strip()
    return f"tentative addresses: {tentative}" if tentative else ""


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=READY_S)
    return done.stdout
