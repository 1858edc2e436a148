"""`cowhand export`, `verify` and `replay` as people use them."""

from __future__ import annotations

import json

import pytest

from cowhand.session.export import decode, encode
from support.exports import export_of, ran
from support.gateway_rig import SID


async def test_an_exported_session_is_the_log_byte_for_byte(rig, cli, tmp_path):
    await rig.create()
    await rig.run_turn()
    stored = await rig.logs["default"].get_events(SID)
    state = await rig.logs["default"].get_session(SID)
    path = tmp_path / "fix.ndjson"
    await cli("export", "fix", "-o", str(path))
    found = decode(path.open("rb"))
    assert list(found.events) == stored
    assert (found.header.meta, found.header.last_seq) == (state.meta, stored[-1].seq)
    lines = (await cli("export", SID)).encode().splitlines(keepends=True)
    assert list(decode(lines).events) == stored
    assert [item.name for item in tmp_path.iterdir() if item.suffix == ".part"] == []


async def test_an_export_that_breaks_off_leaves_no_file(rig, cli, tmp_path, monkeypatch):
    await rig.create()
    await rig.run_turn()

    async def short(*_args, **_more):
        return []

    monkeypatch.setattr(rig.logs["default"], "get_events", short)
    path = tmp_path / "fix.ndjson"
    said = await cli("export", "fix", "-o", str(path), code=2)
    assert "deleted at 0 of" in said
    assert not path.exists()


@pytest.fixture
async def file(tmp_path):
    world = await ran("one", "two")
    path = tmp_path / "run.ndjson"
    path.write_bytes(encode(export_of(world.events)))
    return world, path


async def test_verify_says_what_holds_and_what_is_broken(cli, file, tmp_path):
    world, path = file
    said = await cli("verify", str(path))
    assert "✓ I6" in said
    assert "- I3   not checked" in said
    assert said.endswith("nothing is broken\n")
    bad = tmp_path / "bad.ndjson"
    bad.write_bytes(encode(export_of(world.events[:-1], last_seq=99)))
    report = json.loads(await cli("verify", "--json", str(bad), code=1))
    assert report["violations"][0]["invariant"] == "I1"
    torn = tmp_path / "torn.ndjson"
    torn.write_bytes(path.read_bytes()[:-30])
    assert "export the session again" in await cli("verify", str(torn), code=2)


async def test_replay_prints_the_bytes_that_the_model_got(cli, file):
    world, path = file
    listed = (await cli("replay", str(path))).splitlines()
    assert len(listed) == 1 + len(world.requests)
    assert all(line.endswith("as logged") for line in listed[1:])
    process = await cli.start("replay", str(path), "--request", "4")
    out, err = await process.communicate()
    assert out == world.requests[3]
    assert "is the logged one" in err.decode()
    start = [event.seq for event in world.events if event.type == "span.model_request_start"][3]
    process = await cli.start("replay", str(path), "--at", str(start + 1), "--json")
    out, _ = await process.communicate()
    assert json.loads(out) == json.loads(world.requests[3])
    assert "── user\none" in await cli("replay", str(path), "--request", "1", "--messages")
    assert "requests 1 to 6" in await cli("replay", str(path), "--request", "99", code=2)
