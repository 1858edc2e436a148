"""The packet filter of a sandbox pod as nft text. Pure; `egress.py` loads it.

One table for IPv4 and IPv6, filter and conntrack only (no NAT), keyed by the UID of the sender:
everything that is not the proxy is sandbox. What a node must be able to do for it is in `FEATURES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

TABLE: Final = "cowhand"
PROXY_UID: Final = 62017
PROXY_PORT: Final = 8443

METADATA_V4: Final = ("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32")
"""Link-local with the metadata services of most clouds, Azure's wire server, Alibaba's metadata."""

METADATA_V6: Final = ("fe80::/10", "fd00:ec2::/32", "fd20:ce::/32")
"""Link-local, EC2's and Google's metadata services."""

_REJECT: Final = "counter reject with icmpx admin-prohibited"
_ND: Final = (
    "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit,"
    " nd-router-advert, mld-listener-query, mld2-listener-report } accept"
)


@dataclass(frozen=True)
class Chain:
    """One base chain: name, which is also its hook, and its rules; the policy is always drop."""

    name: str
    rules: tuple[str, ...]


def chains(*, proxy_uid: int = PROXY_UID, proxy_port: int = PROXY_PORT) -> tuple[Chain, ...]:
    """The chains of the table.

    Args:
        proxy_uid: UID of the proxy inside the pod's user namespace.
        proxy_port: the only port that answers to other pods.
    """
    v4, v6 = ", ".join(METADATA_V4), ", ".join(METADATA_V6)
    output = (
        "ct state invalid counter drop",
        # Neighbour discovery has no socket, so no UID: without this line the proxy has no IPv6.
        _ND,
        # Rejections travel back to the sender over loopback; a new connection is not `established`.
        'oifname "lo" ct state established,related accept',
        f"meta skuid != {proxy_uid} tcp dport {proxy_port} {_REJECT}",
        'oifname "lo" ip daddr 127.0.0.0/8 accept',
        'oifname "lo" ip6 daddr ::1 accept',
        f"meta skuid {proxy_uid} ip daddr {{ {v4} }} {_REJECT}",
        f"meta skuid {proxy_uid} ip6 daddr {{ {v6} }} {_REJECT}",
        f"meta skuid {proxy_uid} accept",
        # Answers of the proxy that have no socket any more (FIN, RST). A server in the sandbox gets
        # no connection to answer: the input chain closes every other port.
        f"ct direction reply ct state established tcp sport {proxy_port} accept",
        f"meta skuid != {proxy_uid} {_REJECT}",
        "counter drop",
    )
    incoming = (
        "ct state invalid counter drop",
        'iifname "lo" accept',
        "ct state established,related accept",
        _ND,
        f"tcp dport {proxy_port} accept",
        "counter drop",
    )
    return Chain("output", output), Chain("input", incoming), Chain("forward", ("counter drop",))


def render(*, proxy_uid: int = PROXY_UID, proxy_port: int = PROXY_PORT) -> str:
    """The whole ruleset for `nft -f -`; replaces an older table of the same name in one transaction."""
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for chain in chains(proxy_uid=proxy_uid, proxy_port=proxy_port):
        lines.append(f"  chain {chain.name} {{")
        lines.append(f"    type filter hook {chain.name} priority 0; policy drop;")
        lines.extend(f"    {rule}" for rule in chain.rules)
        lines.append("  }")
    return "\n".join([*lines, "}", ""])


def differences(listing: dict[str, Any], expected: tuple[Chain, ...]) -> list[str]:
    """What the answer of `nft -j list table inet cowhand` lacks, in words; empty if all is there."""
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for entry in listing.get("nftables", []):
        if "chain" in entry:
            found[str(entry["chain"].get("name"))] = entry["chain"]
        if "rule" in entry:
            name = str(entry["rule"].get("chain"))
            counts[name] = counts.get(name, 0) + 1
    wrong = []
    for chain in expected:
        there = found.get(chain.name)
        if there is None:
            wrong.append(f"chain {chain.name} is missing")
        elif there.get("hook") != chain.name or there.get("policy") != "drop":
            wrong.append(f"chain {chain.name} does not drop by default on its hook")
        elif counts.get(chain.name, 0) != len(chain.rules):
            have, want = counts.get(chain.name, 0), len(chain.rules)
            wrong.append(f"chain {chain.name} has {have} of {want} rules")
    return wrong


FEATURES: Final[tuple[tuple[str, str], ...]] = (
    ("nf_tables with the inet family (CONFIG_NF_TABLES_INET)", ""),
    ("filter chains (CONFIG_NF_TABLES)", "type filter hook output priority 0; policy accept;"),
    ("counters", "counter"),
    ("match by UID (nft meta skuid)", "meta skuid 0 accept"),
    ("connection tracking (CONFIG_NFT_CT)", "ct state established accept"),
    ("reject in inet tables (CONFIG_NFT_REJECT_INET)", "reject with icmpx admin-prohibited"),
    ("sets (nf_tables)", "tcp dport { 1, 2 } accept"),
)
"""What the rules need of the kernel, in order: name for people, and a probe that uses it alone."""


def feature_probe(body: str) -> str:
    """A ruleset that uses one feature, for `nft --check -f -`."""
    if body.startswith("type "):
        return f"table inet {TABLE}_probe {{ chain probe {{ {body} }} }}\n"
    hook = "type filter hook output priority 0; policy accept;"
    chain = f"chain probe {{ {hook} {body} }}" if body else ""
    return f"table inet {TABLE}_probe {{ {chain} }}\n"
