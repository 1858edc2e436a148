"""Key names, ACL text, encodings and scripts: what needs no server."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cowhand.errors import LogIncompatible, UserError
from cowhand.session import acl, codec
from cowhand.session import scripts as lua
from cowhand.session.acl import COMMANDS, CONTROL_COMMANDS, acl_rule, users_acl
from cowhand.session.keys import Keys
from cowhand.session.log import HandRecord

SID = "sesn_" + "ab" * 16
HASH = "0f" * 32
KEYS = Keys("cowhand", "team-a", 16)


def test_partitions_are_those_of_the_cluster_hash():
    # The check value of CRC16/XMODEM, which Redis Cluster uses too.
    assert Keys("c", "n", 1 << 16).partition("123456789") == 0x31C3
    assert KEYS.partition("123456789") == 0x31C3 % 16


def test_key_names_are_those_of_the_interface():
    session = Keys("cowhand", "team-a", 1).session("sesn_1")
    assert [session.name(p) for p in ("meta", "log", "dedupe", "hands")] == [
        f"cowhand:team-a:{{p00}}:s:sesn_1:{x}" for x in "mldh"
    ]
    assert [session.name(p) for p in ("ready", "workers", "own", "proj")] == [
        f"cowhand:team-a:{{p00}}:{x}" for x in ("rdy", "w", "own", "proj")
    ]
    assert session.tail == "cowhand:team-a:{p00}:t:sesn_1"
    assert Keys("x", "n", 1).sandbox("u") == "x:n:{p00}:sbx:u"
    assert Keys("x", "n", 1).tombstone("d") == "x:n:{p00}:tomb:d"


def test_all_keys_of_a_script_lie_in_one_slot():
    for number in range(50):
        session = KEYS.session(f"sesn_{number:032x}")
        for parts in lua.PARTS.values():
            tags = {re.findall(r"{p\d\d}", session.name(part))[0] for part in parts}
            assert len(tags) <= 1


def test_scripts_are_complete_and_write_no_foreign_key():
    for script in lua.load().values():
        assert script.source.startswith("-- Put before every script")
        assert re.fullmatch(r"[0-9a-f]{40}", script.sha)
        for forbidden in ("'XDEL'", "'KEYS'", "'SCAN'", "'FLUSH", "cjson."):
            assert forbidden not in script.source, (script.name, forbidden)


def test_a_tenant_rule_names_only_its_own_keys():
    rule = acl_rule("t-team-a", HASH)
    assert f"user t-team-a on #{HASH} resetkeys resetchannels" in rule
    assert re.findall(r"[~&%]\S+", rule) == [
        "~cowhand:team-a:*",
        "%R~cowhand:gen",
        "%R~cowhand:{p??}:gen",
        "%R~cowhand:{p??}:quota.team-a",
        "&cowhand:team-a:*",
    ]
    assert "-@all" in rule
    assert "+scan" not in rule
    assert "+scan" in acl_rule("operator", HASH)


def test_no_dangerous_command_is_allowed():
    words = {command.split("|")[0] for command in (*COMMANDS, *CONTROL_COMMANDS)}
    dangerous = (
        "config flushall flushdb keys acl debug monitor shutdown replicaof sort eval function"
    )
    assert not words & set(dangerous.split())
    assert not {"info", "scan", "script|load"} & set(COMMANDS)


def test_users_acl_has_every_user_and_no_open_default():
    passwords = dict.fromkeys((*acl.CONTROL_USERS, "t-a", "t-b", "t-c"), HASH)
    lines = users_acl(passwords, ["a", "b"], "x").splitlines()
    assert lines[0].startswith("user default off ")
    assert [line.split()[1] for line in lines[1:]] == [
        "operator",
        "broker",
        "gateway",
        "archive",
        "t-a",
        "t-b",
    ]
    assert "~x:a:*" in lines[5]


@pytest.mark.parametrize(
    ("passwords", "tenants", "text"),
    [
        ({}, [], "no password for store user operator, broker, gateway"),
        (dict.fromkeys(acl.CONTROL_USERS, HASH), ["a"], "user t-a"),
        (dict.fromkeys(acl.CONTROL_USERS, "secret"), [], "SHA-256"),
        (dict.fromkeys((*acl.CONTROL_USERS, "t-a ~*"), HASH), ["a ~*"], "none of"),
    ],
)
def test_users_acl_refuses_what_would_open_the_store(passwords, tenants, text):
    with pytest.raises(UserError, match=text):
        users_acl(passwords, tenants)


RECORD = HandRecord("sesn_1", "sandbox", 2, "Ready", message='"state":"Lost"', owner_epoch=7)


def test_hand_records_begin_with_what_the_scripts_compare():
    text = codec.record_json(RECORD)
    assert text.startswith('{"state":"Ready","owner_epoch":7,"session_id"')
    assert codec.record(text.encode()) == RECORD
    assert codec.record(text.replace('"hand"', '"later_field":1,"hand"').encode()) == RECORD
    assert codec.record(None) is None
    assert codec.record(codec.record_json(replace(RECORD, message="ü\n")).encode()).message == "ü\n"


def test_an_entry_that_is_no_event_is_refused():
    with pytest.raises(LogIncompatible, match="7-0"):
        codec.event([b"7-0", [b"t", b"x"]])


STATE = {
    **{"ns": "team", "name": "fix", "uid": "u", "tomb": "", "model": "{}", "st": "{}"},
    **{"state": "idle", "mode": "running", "lease": "", "epoch": "0", "next": "2", "created": "1"},
}


def test_the_budget_of_a_meta_hash():
    sid = "sesn_" + "0" * 32
    assert codec.session_state(sid, "team", meta_hash()).budget == {}
    raw = meta_hash(bud='{"max_tokens":5}')
    assert codec.session_state(sid, "team", raw).budget == {"max_tokens": 5}
    with pytest.raises(LogIncompatible, match="bud"):
        codec.session_state(sid, "team", meta_hash(bud="5"))


def meta_hash(**changes: str) -> dict[bytes, bytes]:
    return {key.encode(): value.encode() for key, value in (STATE | changes).items()}


def test_a_meta_hash_is_a_state() -> None:
    state = codec.session_state(SID, "team", meta_hash())
    assert (state.meta.namespace, state.meta.name, state.next_seq) == ("team", "fix", 2)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {b"x": b"y"},
        {b"\xff": b"\xff"},
        meta_hash(ns="rivals"),
        meta_hash(epoch="many"),
        meta_hash(next=""),
        meta_hash(st="[]"),
        meta_hash(model="no json"),
        meta_hash(model="[" * 100_000),
    ],
    ids=lambda raw: str(raw)[:60],
)
def test_what_a_tenant_forges_in_a_meta_hash_is_one_known_error(raw: dict[bytes, bytes]) -> None:
    with pytest.raises(LogIncompatible):
        codec.session_state(SID, "team", raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"state":"Ready"}',
        b"[" * 100_000,
        codec.record_json(replace(RECORD, owner_epoch="1")).encode(),  # type: ignore[arg-type]
        codec.record_json(replace(RECORD, address=None)).encode(),  # type: ignore[arg-type]
    ],
    ids=lambda raw: str(raw)[:40],
)
def test_what_a_tenant_forges_in_a_hand_record_is_one_known_error(raw: bytes) -> None:
    with pytest.raises(LogIncompatible):
        codec.record(raw)
