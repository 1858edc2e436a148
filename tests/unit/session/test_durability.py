"""What a barrier asks, and what a store is worth: pure tables."""

from __future__ import annotations

import pytest

from cowhand import settings
from cowhand.errors import StoreTooWeak, UserError
from cowhand.session.durability import Server, barrier, confirmed, judge, read_server

VALKEY = """# Server
redis_version:7.2.4
server_name:valkey
valkey_version:8.0.1
# Replication
role:master
connected_slaves:2
slave0:ip=127.0.0.1,port=59159,state=online,offset=380,lag=0,type=replica
slave1:ip=127.0.0.1,port=59160,state=wait_bgsave,offset=0,lag=0,type=replica
slave_read_only:1
# Persistence
aof_enabled:1
"""
REDIS = """# Server
redis_version:8.2.3
role:slave
aof_enabled:0
"""


def test_info_is_read():
    assert read_server(VALKEY, "always") == Server("Valkey", (8, 0, 1), True, 1, True, "always")
    assert read_server(REDIS) == Server("Redis", (8, 2, 3), False, 0, False, "")
    assert str(read_server(VALKEY)) == "Valkey 8.0.1"


@pytest.mark.parametrize(
    ("profile", "replicas", "command"),
    [
        ("dev", 1, None),
        ("managed", 1, None),
        ("standard", 1, ("WAIT", 1, 900)),
        ("standard", 2, ("WAIT", 2, 900)),
        ("strict", 0, ("WAITAOF", 1, 0, 900)),
        ("strict", 1, ("WAITAOF", 1, 1, 900)),
    ],
)
def test_what_a_barrier_asks(profile, replicas, command):
    assert barrier(profile, replicas, 900) == command


@pytest.mark.parametrize(
    ("profile", "replicas", "reply", "enough"),
    [
        ("standard", 1, 0, False),
        ("standard", 1, 1, True),
        ("standard", 2, 1, False),
        ("strict", 0, [1, 0], True),
        ("strict", 1, [1, 0], False),
        ("strict", 1, [0, 1], False),
        ("strict", 1, [1, 1], True),
    ],
)
def test_what_confirms_it(profile, replicas, reply, enough):
    assert confirmed(profile, replicas, reply) is enough


def server(replicas: int = 1, *, aof: bool = True, fsync: str = "everysec") -> Server:
    return Server("Valkey", (8, 1, 0), True, replicas, aof, fsync)


@pytest.mark.parametrize(
    ("demanded", "replicas", "found", "effective", "passing"),
    [
        ("dev", 1, server(0), "dev", False),
        ("dev", 1, server(0, fsync="always"), "dev", False),
        ("dev", 1, server(2, aof=False), "none", False),
        ("dev", 1, server(2, fsync="no"), "none", False),
        ("standard", 1, server(1), "standard", False),
        ("standard", 1, server(0), "dev", True),
        ("standard", 2, server(1), "dev", True),
        ("standard", 1, server(1, aof=False), "none", False),
        ("strict", 1, server(1, fsync="always"), "strict", False),
        ("strict", 1, server(1, fsync=""), "strict", False),
        ("strict", 0, server(0), "strict", False),
        ("strict", 1, server(0), "dev", True),
        ("strict", 0, server(0, aof=False), "none", False),
        ("managed", 1, server(0, aof=False), "managed", False),
    ],
)
def test_what_a_store_is_worth(demanded, replicas, found, effective, passing):
    verdict = judge(demanded, replicas, found)
    assert (verdict.effective, verdict.passing) == (effective, passing)
    assert verdict.weaker == (effective != demanded)
    assert bool(verdict.faults) == verdict.weaker


def test_strict_with_a_slow_file_is_strict_and_says_that_it_is_slow():
    assert judge("strict", 1, server(fsync="always")).notes == ()
    assert "appendfsync always" in judge("strict", 1, server()).notes[0]


@pytest.mark.parametrize("profile", settings.PROFILES)
@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("Redis", (7, 0, 15), False),
        ("Redis", (7, 2, 0), True),
        ("Redis", (8, 2, 3), True),
        ("Valkey", (7, 2, 9), False),
        ("Valkey", (8, 0, 0), True),
        ("Redis", (), False),
    ],
)
def test_a_server_that_is_too_old_is_refused_under_every_profile(profile, name, version, fits):
    found = Server(name, version, True, 1, True, "always")
    if fits:
        judge(profile, 1, found)
    else:
        with pytest.raises(StoreTooWeak, match=r"needs (Redis 7.2|Valkey 8.0) or newer"):
            judge(profile, 1, found)


def env(**more: str) -> dict[str, str]:
    return {"COWHAND_STORE_URL": "redis://x", **{f"COWHAND_STORE_{k}": v for k, v in more.items()}}


def test_settings():
    found = settings.store(env(PROFILE="strict", REPLICAS="0", ALLOW_WEAKER="true"))
    assert (found.profile, found.replicas, found.allow_weaker) == ("strict", 0, True)
    plain = settings.store(env())
    assert (plain.profile, plain.replicas, plain.allow_weaker) == ("dev", 1, False)
    for wrong in (
        {"PROFILE": "none"},
        {"PROFILE": "standard", "REPLICAS": "0"},
        {"REPLICAS": "-1"},
    ):
        with pytest.raises(UserError, match="COWHAND_STORE_"):
            settings.store(env(**wrong))
