"""Going around the proxy (threat list A) against the real packet filter, in network namespaces.

Each probe is also made without the rules, where it must arrive: a probe that cannot succeed proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.netns import (
    API,
    DNS,
    INTERNET_V4,
    INTERNET_V6,
    METADATA,
    NODE_V4,
    NODE_V6,
    POD_V4,
    POD_V6,
    Pair,
    missing,
)

WHY = missing()
pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(WHY), reason=WHY)]

SANDBOX, PROXY, SOMEBODY = 1000, 62017, 4242
ARRIVES_S = 20
"""How long a probe that is to arrive may take; one that is to be refused has the check's own second."""

PROBES: dict[str, tuple[str, int, str]] = {
    "A1 https": (INTERNET_V4, 443, "tcp"),
    "A2 odd port": (INTERNET_V4, 8080, "tcp"),
    "A2 ssh": (INTERNET_V4, 22, "tcp"),
    "A2 the proxy's port elsewhere": (INTERNET_V4, 8443, "tcp"),
    "A3 IPv6": (INTERNET_V6, 443, "tcp"),
    "A3 IPv4 in IPv6": (f"::ffff:{INTERNET_V4}", 443, "tcp"),
    "A4 QUIC": (INTERNET_V4, 443, "udp"),
    "A4 QUIC over IPv6": (INTERNET_V6, 443, "udp"),
    "A4 STUN": (INTERNET_V4, 3478, "udp"),
    "A6 DNS": (DNS, 53, "udp"),
    "A6 DNS over TCP": (DNS, 53, "tcp"),
    "A8 DNS over TLS": (INTERNET_V4, 853, "tcp"),
    "A10 metadata": (METADATA, 80, "tcp"),
    "A11 kubelet": (NODE_V4, 10250, "tcp"),
    "A11 kubelet over IPv6": (NODE_V6, 10250, "tcp"),
    "A12 API server": (API, 443, "tcp"),
    "A13 another pod": (NODE_V4, 8443, "tcp"),
    "A27 mDNS": (NODE_V4, 5353, "udp"),
}

ATTEMPTS = "out({name: attempt(*where) for name, where in args['probes'].items()})"
ENV = {"KUBERNETES_SERVICE_HOST": API, "COWHAND_BROKER_URL": f"https://{NODE_V4}:8443"}
VERIFY = """
outcomes = verify.run_probes(args["env"], resolv_conf="nameserver 10.96.0.10\\n",
    route_table=open("/proc/net/route").read(), has_v6=True)
out([[o.target, o.ok, o.detail] for o in outcomes])
"""
PING = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
s.settimeout(args["timeout_s"])
try:
    s.sendto(b"\\x08\\0\\0\\0\\0\\0\\0\\0", (args["host"], 0)); s.recv(100); out("reached")
except OSError as e:
    out(errno.errorcode.get(e.errno, "timeout"))
"""


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pod with the rules loaded as its init container loads them."""
    with Pair() as pair:
        assert pair.load(str(tmp_path_factory.mktemp("rules") / "log")) == 0
        pair.serve(pair.pod, PROXY, (8443, 9901))
        pair.serve(pair.pod, SANDBOX, (8000, 7070))
        yield pair


@pytest.fixture(scope="module")
def bare() -> Iterator[Pair]:
    """The same pod without rules: the positive control."""
    with Pair() as pair:
        pair.serve(pair.pod, SANDBOX, (8000,))
        yield pair


@pytest.fixture(scope="module")
def attempts(closed: Pair, bare: Pair) -> dict[str, dict[str, list[Any]]]:
    """Outcome of every probe: under three UIDs with the rules, and as the sandbox without."""
    return {
        "sandbox": closed.run(ATTEMPTS, uid=SANDBOX, probes=PROBES),
        "somebody": closed.run(ATTEMPTS, uid=SOMEBODY, probes=PROBES),
        "proxy": closed.run(ATTEMPTS, uid=PROXY, probes=PROBES, timeout_s=ARRIVES_S),
        "bare": bare.run(ATTEMPTS, uid=SANDBOX, probes=PROBES, timeout_s=ARRIVES_S),
    }


@pytest.mark.parametrize("name", PROBES)
def test_the_sandbox_gets_nowhere_and_hears_it_at_once(
    attempts: dict[str, dict[str, list[Any]]], name: str
) -> None:
    assert attempts["bare"][name] == [False, "reached"], "the probe does not arrive without rules"
    assert attempts["sandbox"][name][0], attempts["sandbox"][name]
    assert attempts["somebody"][name][0], "everybody who is not the proxy is sandbox"


@pytest.mark.parametrize("name", PROBES)
def test_the_proxy_gets_out_but_not_to_metadata(
    attempts: dict[str, dict[str, list[Any]]], name: str
) -> None:
    reached = attempts["proxy"][name] == [False, "reached"]
    assert reached is (name != "A10 metadata")


def test_a5_ping(closed: Pair, bare: Pair) -> None:
    ping = {"host": INTERNET_V4, "timeout_s": ARRIVES_S}
    assert bare.run(PING, uid=SANDBOX, **ping) == "reached"
    assert closed.run(PING, uid=SANDBOX, **ping) in ("EPERM", "EHOSTUNREACH")


def test_a22_a26_loopback_is_the_sandboxes_own_but_not_the_proxys_port(closed: Pair) -> None:
    own = {
        "v4": ("127.0.0.1", 8000, "tcp"),
        "v6": ("::1", 8000, "tcp"),
        "sandboxd": ("127.0.0.1", 7070, "tcp"),
    }
    for uid in (SANDBOX, PROXY):
        found = closed.run(ATTEMPTS, uid=uid, probes=own)
        assert set(map(tuple, found.values())) == {(False, "reached")}
    door = {
        "v4": ("127.0.0.1", 8443, "tcp"),
        "v6": ("::1", 8443, "tcp"),
        "other loopback": ("127.0.0.2", 8443, "tcp"),
        "pod address": (POD_V4, 8443, "tcp"),
        "pod address v6": (POD_V6, 8443, "tcp"),
        "own server by pod address": (POD_V4, 8000, "tcp"),
    }
    found = closed.run(ATTEMPTS, uid=SANDBOX, probes=door)
    assert all(ok for ok, _ in found.values()), found


def test_a_closed_port_on_loopback_answers_at_once(closed: Pair) -> None:
    found = closed.run(ATTEMPTS, uid=SANDBOX, probes={"x": ("127.0.0.1", 9, "tcp")})
    assert "ECONNREFUSED" in found["x"][1]


def test_a23_from_outside_only_the_proxys_port_answers(closed: Pair, bare: Pair) -> None:
    shut = {f"v4 {port}": (POD_V4, port, "tcp") for port in (8000, 7070, 9901)}
    shut["v6 8000"] = (POD_V6, 8000, "tcp")
    found = closed.run(ATTEMPTS, uid=0, name=closed.peer, probes=shut)
    assert [name for name, (_, detail) in found.items() if detail == "reached"] == []
    door = {"v4": (POD_V4, 8443, "tcp"), "v6": (POD_V6, 8443, "tcp")}
    found = closed.run(ATTEMPTS, uid=0, name=closed.peer, probes=door, timeout_s=ARRIVES_S)
    assert found == {name: [False, "reached"] for name in door}
    open_port = {"8000": (POD_V4, 8000, "tcp")}
    control = bare.run(ATTEMPTS, uid=0, name=bare.peer, probes=open_port, timeout_s=ARRIVES_S)
    assert control["8000"] == [False, "reached"]


def test_a14_a15_a17_the_sandbox_cannot_change_the_rules_or_its_user(closed: Pair) -> None:
    source = """
def refused(what):
    try:
        what()
    except PermissionError:
        return True
    return False
found = {
    "raw": refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
    "packet": refused(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)),
    "setuid": refused(lambda: os.setuid(62017)),
    "mark": refused(lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1)),
    "flush": subprocess.run(["nft", "flush", "ruleset"], capture_output=True).returncode != 0,
}
out(found)
"""
    found = closed.run(source, uid=SANDBOX)
    assert all(found.values()), found


def test_the_check_under_the_sandboxes_uid_proves_it(closed: Pair) -> None:
    outcomes = closed.run(VERIFY, uid=SANDBOX, env=ENV)
    assert [o for o in outcomes if not o[1]] == []
    seen = " ".join(target for target, _, _ in outcomes)
    for what in (API, DNS, METADATA, INTERNET_V4, INTERNET_V6, f"{NODE_V4}:10250", "the broker"):
        assert what in seen


def test_a_name_of_the_broker_does_not_resolve_and_does_not_hang(closed: Pair) -> None:
    source = """
began = time.monotonic()
found = verify.broker_targets("https://cowhand-broker.cowhand-system.svc:8443")
out([found, time.monotonic() - began])
"""
    found, seconds = closed.run(source, uid=SANDBOX)
    assert found == []
    assert seconds < 3


def test_control_without_rules_the_check_reports_every_breach(bare: Pair) -> None:
    outcomes = bare.run(VERIFY, uid=SANDBOX, env=ENV)
    reached = [target for target, ok, _ in outcomes if not ok]
    assert len(reached) == len([o for o in outcomes if "loopback" not in o[0]])


def test_control_flushed_rules_turn_the_check_red(tmp_path: Path) -> None:
    run = "out(egress.run_verify(args['env'], termination_log=args['log']))"
    with Pair() as pair:
        log = tmp_path / "log"
        log.touch(mode=0o666)
        log.chmod(0o666)
        for parent in log.parents:
            if parent.stat().st_uid == 0 and str(parent).startswith(str(tmp_path.parents[2])):
                parent.chmod(0o755)
        assert pair.load(str(tmp_path / "rules")) == 0
        assert pair.run(run, uid=SANDBOX, env={}, log=str(log)) == 0, log.read_text()
        pair.flush()
        assert pair.run(run, uid=SANDBOX, env={}, log=str(log)) == 1
        line = json.loads(log.read_text())
        assert line["reason"] == "NotEnforced"
        assert any(INTERNET_V4 in failed for failed in line["failed"])


def test_control_rules_that_are_not_all_there_are_noticed(tmp_path: Path) -> None:
    source = """
import subprocess
def nft(arguments, stdin):
    if arguments == ["-f", "-"]:
        stdin = stdin.replace(args["cut"], args["put"])
    return egress._nft(arguments, stdin)
out(egress.run_rules(nft=nft, termination_log=args["log"]))
"""
    cuts = {
        "policy drop": "policy accept",
        "    meta skuid != 62017 counter reject with icmpx admin-prohibited\n": "",
        "chain input": "chain inputs",
    }
    for cut, put in cuts.items():
        with Pair() as pair:
            log = tmp_path / "log"
            assert pair.run(source, uid=0, cut=cut, put=put, log=str(log)) == 1
            assert json.loads(log.read_text())["reason"] == "RulesIncomplete"


def test_loading_twice_is_the_same_as_once(closed: Pair, tmp_path: Path) -> None:
    assert closed.load(str(tmp_path / "log")) == 0
    assert closed.load(str(tmp_path / "log")) == 0


def test_without_net_admin_the_reason_is_named(closed: Pair, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    source = "print(egress.run_rules(termination_log=args['log']))"
    code = closed.run(source, uid=SANDBOX, log="/nonexistent/log")
    assert code == 1
