"""`cowhand fork` as people use it: what it asks the API server for, and what it says."""

from __future__ import annotations

import json

import pytest

from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from support.gateway_rig import SID


def applied(cli):
    return json.loads((cli.kubectl.folder / "applied.json").read_text())


async def test_fork_makes_an_agentsession_and_says_where_it_begins(rig, cli):
    await rig.create()
    await rig.run_turn()
    said = await cli("fork", "fix", "--at", "13", "--name", "again", "--detach")
    assert said == ""
    assert applied(cli)["spec"] == {"fork": {"session": "fix", "at": 13}}
    assert applied(cli)["metadata"] == {"name": "again"}
    await cli("fork", SID, "-d", "-m", "go on")
    assert applied(cli)["spec"] == {"fork": {"session": SID}, "message": "go on"}
    assert applied(cli)["metadata"] == {"generateName": "fork-"}


async def test_fork_waits_until_it_is_accepted_and_follows_its_first_turn(rig, cli, monkeypatch):
    """Here the session "fork" is the same log, with the mark of a fork in it."""
    monkeypatch.setattr("cowhand.session.sessions.EMITTABLE", frozenset({ev.SESSION_FORKED}))
    await rig.create()
    forked = NewEvent(ev.SESSION_FORKED, {"session": SID, "position": 2, "actor": {}}, id="forked")
    await rig.logs["default"].emit_event(SID, forked)
    await rig.run_turn()
    cli.kubectl.put("agentsession", "again", {"status": {"sessionID": SID}})
    process = await cli.start("fork", "fix", "--name", "again", "-m", "Fix the tests")
    out, err = (text.decode() for text in await process.communicate())
    assert process.returncode == 0, err
    assert f"{SID} goes on from position 2 of fix" in err
    assert "Done." in out
    assert "Fix the tests" not in out, "what was copied is not shown again"


async def test_a_fork_that_is_refused_says_why_and_what_to_delete(rig, cli):
    stalled = {"type": "Stalled", "status": "True", "reason": "InvalidFork", "message": "fork at 3"}
    cli.kubectl.put("agentsession", "again", {"status": {"conditions": [stalled]}})
    said = await cli("fork", "fix", "--at", "5", "--name", "again", code=1)
    assert "InvalidFork: fork at 3" in said
    assert "kubectl delete agentsession again -n default" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fork", "nobody"], "there is no AgentSession nobody in namespace default"),
        (["fork", "other/fix"], "forked in its own namespace; name that one with -n"),
        (["fork", "fix", "--at", "0"], "counts from 1"),
        (["fork", "sesn_12"], "is not a session id"),
    ],
)
async def test_wrong_use(cli, arguments, says):
    assert says in await cli(*arguments, code=2)
