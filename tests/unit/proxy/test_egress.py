"""The packet filter's text, what its loader says when it cannot, and what the probes accept as proof."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cowhand.proxy import egress, rules, verify


def listing() -> dict[str, Any]:
    """What nft lists after the rules were loaded."""
    entries: list[dict[str, Any]] = []
    for chain in rules.chains():
        entries.append({"chain": {"name": chain.name, "hook": chain.name, "policy": "drop"}})
        entries += [{"rule": {"chain": chain.name}} for _ in chain.rules]
    return {"nftables": entries}


def test_the_rules_use_nothing_that_is_not_everywhere() -> None:
    text = rules.render()
    for word in (" nat ", "redirect", "masquerade", "mark", "ct count", "log", "destroy"):
        assert word not in text
    assert text.count("policy drop;") == 3
    assert text.startswith("table inet cowhand\ndelete table inet cowhand\n")
    assert "skuid" not in "".join(
        rule for c in rules.chains() if c.name == "input" for rule in c.rules
    )
    other = rules.render(proxy_uid=5, proxy_port=6)
    assert "62017" not in other
    assert "8443" not in other


def test_the_sandbox_is_everybody_who_is_not_the_proxy() -> None:
    (output,) = [chain for chain in rules.chains() if chain.name == "output"]
    *_, last_but_one, last = output.rules
    assert last_but_one == "meta skuid != 62017 counter reject with icmpx admin-prohibited"
    assert last == "counter drop"
    accepts = [rule for rule in output.rules if rule.endswith("accept")]
    for rule in accepts:
        narrowed = ("icmpv6 type", 'oifname "lo"', "meta skuid 62017", "ct direction reply")
        assert rule.startswith(narrowed), rule


def test_a_complete_listing_has_no_difference() -> None:
    assert rules.differences(listing(), rules.chains()) == []


@pytest.mark.parametrize("what", ["empty", "chain", "policy", "hook", "rule"])
def test_listings_that_lack_something(what: str) -> None:
    found = listing()
    entries = found["nftables"]
    if what == "empty":
        found = {}
    elif what == "chain":
        del entries[0]
    elif what == "policy":
        entries[0]["chain"]["policy"] = "accept"
    elif what == "hook":
        entries[0]["chain"]["hook"] = "input"
    else:
        del entries[1]
    assert len(rules.differences(found, rules.chains())) == (3 if what == "empty" else 1)


class FakeNft:
    """nft on a node that lacks one feature."""

    def __init__(self, lacks: str = "", listed: str = "") -> None:
        self.lacks, self.listed = lacks, listed

    def __call__(self, arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        if "list" in arguments:
            return subprocess.CompletedProcess(arguments, 0, self.listed, "")
        bad = bool(self.lacks) and self.lacks in stdin
        error = "\nError: Could not process rule: No such file\n" if bad else ""
        return subprocess.CompletedProcess(arguments, int(bad), "", error)


def run_rules(tmp_path: Path, nft: Any) -> tuple[int, dict[str, Any]]:
    log = tmp_path / "log"
    code = egress.run_rules(nft=nft, termination_log=str(log))
    return code, json.loads(log.read_text()) if log.exists() else {}


def test_loaded_and_listed_is_zero(tmp_path: Path) -> None:
    assert run_rules(tmp_path, FakeNft(listed=json.dumps(listing()))) == (0, {})


@pytest.mark.parametrize(
    ("lacks", "reason", "feature"),
    [
        ("skuid", "FeatureMissing", "UID"),
        ("icmpx", "FeatureMissing", "CONFIG_NFT_REJECT_INET"),
        ("ct state", "FeatureMissing", "CONFIG_NFT_CT"),
        ("table inet", "FeatureMissing", "inet family"),
        ("icmpv6 type", "RulesRefused", ""),
    ],
)
def test_a_node_that_lacks_a_feature_is_told_by_name(
    tmp_path: Path, lacks: str, reason: str, feature: str
) -> None:
    code, line = run_rules(tmp_path, FakeNft(lacks))
    assert (code, line["reason"]) == (1, reason)
    assert feature in line.get("feature", "")
    assert "Could not process rule" in line["message"]


def test_no_nft_and_nonsense_from_nft(tmp_path: Path) -> None:
    def none(arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError("nft")

    def hangs(arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired("nft", 20)

    assert run_rules(tmp_path, none)[1]["reason"] == "NftMissing"
    for nft in (hangs, FakeNft(listed="not json"), FakeNft(listed="{}")):
        code, line = run_rules(tmp_path, nft)
        assert (code, line["reason"]) == (1, "RulesIncomplete")


def test_the_termination_message_is_short_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [verify.Outcome(f"target {i}", False, "reached " * 20) for i in range(100)]
    monkeypatch.setattr(verify, "run_probes", lambda *_, **__: many)
    log = tmp_path / "log"
    assert egress.run_verify({}, termination_log=str(log)) == 1
    text = log.read_text()
    assert len(text) <= 4096
    assert json.loads(text)["reason"] == "NotEnforced"
    assert egress.run_verify({}, termination_log="/nonexistent/log") == 1


class Sock:
    """A socket that fails as told."""

    error = 0

    def __init__(self, *_: Any) -> None:
        return None

    def __enter__(self) -> Sock:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def setblocking(self, _: bool) -> None:
        return None

    def connect_ex(self, _: Any) -> int:
        return self.error


@pytest.mark.parametrize(
    ("code", "ok"),
    [
        (errno.EPERM, True),
        (errno.EACCES, True),
        (errno.EHOSTUNREACH, True),
        (errno.ENETUNREACH, True),
        (errno.ECONNREFUSED, False),
        (errno.ETIMEDOUT, False),
        (errno.ECONNRESET, False),
        (0, False),
    ],
)
def test_what_counts_as_proof(monkeypatch: pytest.MonkeyPatch, code: int, ok: bool) -> None:
    monkeypatch.setattr(Sock, "error", code)
    monkeypatch.setattr(socket, "socket", Sock)
    assert verify.probe(verify.Target("x", "192.0.2.1", 443)).ok is ok


def test_the_same_error_late_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sock, "error", errno.EHOSTUNREACH)
    monkeypatch.setattr(socket, "socket", Sock)
    clock = iter([0.0, 0.0, 3.0, 3.0])
    monkeypatch.setattr("cowhand.proxy.verify.time.monotonic", lambda: next(clock))
    assert not verify.probe(verify.Target("x", "192.0.2.1", 443)).ok


def test_a_real_open_port_is_reached_and_a_closed_one_no_proof() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert verify.probe(verify.Target("x", "127.0.0.1", port)).detail == "reached"
    assert "ECONNREFUSED" in verify.probe(verify.Target("x", "127.0.0.1", port)).detail
    assert verify.loopback_works().ok


def test_targets_from_what_the_pod_knows() -> None:
    route = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth0\t0000F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
        "eth0\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\n"
    )
    resolv = "search a b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\nnameserver fd00::a\n"
    env = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    found = {
        (t.host, t.port, t.proto)
        for t in verify.targets(env, resolv_conf=resolv, route_table=route, has_v6=True)
    }
    assert found == {
        ("169.254.169.254", 80, "tcp"),
        ("192.0.2.1", 443, "tcp"),
        ("192.0.2.1", 443, "udp"),
        ("10.96.0.1", 6443, "tcp"),
        ("10.96.0.10", 53, "udp"),
        ("10.96.0.10", 53, "tcp"),
        ("fd00::a", 53, "udp"),
        ("fd00::a", 53, "tcp"),
        ("10.244.0.1", 10250, "tcp"),
        ("2001:db8::1", 443, "tcp"),
        ("2001:db8::1", 443, "udp"),
    }
    few = verify.targets({}, resolv_conf="", route_table="", has_v6=False)
    assert len(few) == 3
