"""`cowhand backup` and `restore` as people use them: whole or nothing, nothing overwritten, a right of its own."""

from __future__ import annotations

import json

import pytest

from cowhand.errors import LogIncompatible
from cowhand.session import events as ev
from cowhand.session.backup import Indexer
from cowhand.session.events import NewEvent
from cowhand.session.export import ExportDamaged
from cowhand.session.log import SessionMeta
from support.gateway_rig import SID, created, user_message

OTHER = "sesn_" + "cd" * 16


@pytest.fixture
async def two(rig):
    """Two sessions; may be restored by jane."""
    await rig.create()
    await rig.run_turn()
    rig.kube.rights.add(("jane", "create", "restore", "default"))
    meta = SessionMeta(OTHER, "default", "other", "u2", {})
    first = NewEvent(ev.SESSION_CREATED, created(), id="created")
    said = NewEvent(ev.USER_MESSAGE, user_message("x" * 300_000), id="msg:0")
    await rig.logs["default"].create_session(meta, [first, said])
    return rig


async def everything(rig):
    log = rig.logs["default"]
    return {sid: await log.get_events(sid) for sid in (SID, OTHER)}


async def forget(rig, *sids):
    for sid in sids:
        keys = rig.store.keys("default").session(sid)
        names = (keys.meta, keys.log, keys.name("dedupe"), keys.hands)
        await rig.store.reads.call("DEL", *names)


def index(path):
    indexer = Indexer()
    for line in path.open("rb"):
        indexer.feed(line)
    return indexer.finish()


async def test_sessions_that_were_lost_come_back_byte_for_byte(two, cli, tmp_path):
    path = tmp_path / "all.ndjson"
    before = await everything(two)
    await cli("backup", str(path))
    found = index(path)
    assert {part.header.session_id for part in found.parts} == {SID, OTHER}
    await forget(two, SID, OTHER)
    said = await cli("restore", str(path), "--dry-run")
    assert said.count("restored ") == 2
    assert [sid async for sid in two.logs["default"].session_ids()] == []
    said = await cli("restore", str(path))
    assert f"{SID}  restored   {len(before[SID])} events" in said
    assert await everything(two) == before
    said = await cli("restore", str(path))
    assert said.count("unchanged") == 2
    assert await everything(two) == before


async def test_one_that_differs_is_refused_and_the_others_come_back(two, cli, tmp_path):
    path = tmp_path / "all.ndjson"
    before = await everything(two)
    await cli("backup", str(path))
    await forget(two, SID, OTHER)
    meta = SessionMeta(OTHER, "default", "other", "u2", {})
    first = NewEvent(ev.SESSION_CREATED, created(), id="created")
    said = NewEvent(ev.USER_MESSAGE, user_message("something else"), id="msg:0")
    await two.logs["default"].create_session(meta, [first, said])
    now = await two.logs["default"].get_events(OTHER)
    out = await cli("restore", str(path), code=1)
    assert f"{OTHER}  REFUSED" in out
    assert "another event 1 than the backup" in out
    assert f"{SID}  restored" in out
    assert await two.logs["default"].get_events(OTHER) == now
    assert await two.logs["default"].get_events(SID) == before[SID]


async def test_a_single_export_can_be_restored(two, cli, tmp_path):
    path = tmp_path / "one.ndjson"
    before = await everything(two)
    await cli("export", "fix", "-o", str(path))
    await forget(two, SID)
    assert "restored" in await cli("restore", str(path))
    assert await everything(two) == before


async def test_the_right_to_restore_is_one_of_its_own(two, cli, tmp_path):
    path = tmp_path / "all.ndjson"
    await cli("backup", str(path))
    await forget(two, SID)
    two.kube.rights.remove(("jane", "create", "restore", "default"))
    out = await cli("restore", str(path), code=1)
    assert "ClusterRole cowhand-restore" in out
    assert [sid async for sid in two.logs["default"].session_ids()] == [OTHER]


async def test_a_backup_needs_the_right_to_read_the_whole_namespace(two, cli, tmp_path):
    two.kube.rights.remove(("jane", "get", "events", "default"))
    await cli("backup", str(tmp_path / "no.ndjson"), code=1)
    assert not (tmp_path / "no.ndjson").exists()


async def test_a_torn_or_changed_backup_is_not_used(two, cli, tmp_path):
    path = tmp_path / "all.ndjson"
    await cli("backup", str(path))
    await forget(two, SID, OTHER)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    wrong = {
        "torn": whole[:-30],
        "without its end": b"".join(lines[:-1]),
        "edited": whole.replace(b"Fix the tests", b"Fix the texts", 1),
        "an export too few": b"".join([lines[0], *lines[-1:]]),
        "something behind": whole + lines[0],
        "empty": b"",
    }
    for name, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ExportDamaged):
            index(path)
        assert await cli("restore", str(path), code=2), name
    assert [sid async for sid in two.logs["default"].session_ids()] == []


async def test_a_session_that_cannot_be_read_does_not_cost_the_others(
    two, cli, tmp_path, monkeypatch
):
    log = two.logs["default"]
    real = log.get_events

    async def broken(session_id, *args, **more):
        if session_id == OTHER:
            raise LogIncompatible("a blob is missing")
        return await real(session_id, *args, **more)

    monkeypatch.setattr(log, "get_events", broken)
    path = tmp_path / "all.ndjson"
    out = await cli("backup", str(path), code=1)
    assert f"not in the backup: {OTHER}: a blob is missing" in out
    found = index(path)
    assert [part.header.session_id for part in found.parts] == [SID]
    assert found.skipped == {OTHER: "a blob is missing"}


@pytest.mark.parametrize(
    ("path", "headers", "status", "says"),
    [
        (f"/v1/sessions/{SID}/restore", {}, 400, "anthropic-workspace-id"),
        (f"/v1/sessions/{SID}/restore", {"anthropic-workspace-id": "nobody"}, 404, "not served"),
        (
            f"/v1/sessions/{OTHER}/restore",
            {"anthropic-workspace-id": "default"},
            400,
            "the path says",
        ),
        (f"/v1/sessions/{SID}/restore", {"anthropic-workspace-id": "team-a"}, 403, "restore"),
        (
            f"/v1/sessions/{SID}/restore?dry_run=yes",
            {"anthropic-workspace-id": "default"},
            400,
            "dry_run",
        ),
    ],
)
async def test_restore_refuses_what_is_wrong(two, path, headers, status, says):
    got = await two.http.get(
        f"{two.url}/v1/sessions/{SID}/export", headers={"authorization": "Bearer jane-token"}
    )
    body = await got.read()
    found, answer, _ = await two.call("POST", path, headers=headers, data=body)
    assert found == status
    assert says in json.dumps(answer)
