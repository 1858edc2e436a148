"""`cowhand` as people use it: a process, kubectl (a fake one) for identity and tunnel, the real gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from support.gateway_rig import HEX, SID, response, tool_use, turn


async def test_events_as_text_raw_and_public(rig, cli):
    await rig.create()
    await rig.run_turn()
    text = await cli("events", "fix")
    assert "● claude    Let me look." in text
    assert text.splitlines()[-1].endswith("■ idle      turn complete")
    raw = [json.loads(line) for line in (await cli("events", "--raw", SID)).splitlines()]
    stored = await rig.logs["default"].get_events(SID)
    assert [line["seq"] for line in raw] == [event.seq for event in stored]
    assert raw[0]["payload"] == stored[0].body
    later = await cli("events", "--raw", "--start", "5", "fix")
    assert json.loads(later.splitlines()[0])["seq"] == 5
    tail = (await cli("events", "--raw", "--from", "-4", "--to", "-2", "fix")).splitlines()
    assert [json.loads(line)["seq"] for line in tail] == [event.seq for event in stored[-4:-1]]
    idle = await cli("events", "--raw", "--type", "tool.result", "--until-idle", "fix")
    assert [json.loads(line)["type"] for line in idle.splitlines()] == ["tool.result"]
    refused = await cli("events", "--json", "--type", "tool.result", "fix", code=2)
    assert "--raw only" in refused
    public = [json.loads(line) for line in (await cli("events", "--json", "fix")).splitlines()]
    assert public[-1]["stop_reason"] == {"type": "end_turn"}


async def test_identity_tunnel_and_namespace(rig, cli):
    await rig.create()
    cli.kubectl.write("namespace", "default")
    await cli("events", "--raw", "fix", "--context=work", "--kubeconfig=/k")
    calls = cli.kubectl.calls()
    assert all(call[:2] == ["--kubeconfig=/k", "--context=work"] for call in calls)
    ours = [
        [word for word in call if not word.startswith(("--kube", "--context"))] for call in calls
    ]
    assert [
        "--namespace=default",
        "create",
        "token",
        "cowhand-cli",
        "--audience=cowhand-gateway",
    ] in ours
    assert [
        "--namespace=cowhand-system",
        "port-forward",
        "--address=127.0.0.1",
        "svc/cowhand-gateway",
        ":8443",
    ] in ours


async def test_following_ends_with_the_turn(rig, cli):
    await rig.create()
    process = await cli.start("events", "--until-idle", "fix")
    first = await asyncio.wait_for(process.stdout.readline(), 30)
    assert "session" in first.decode()
    await rig.run_turn()
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err
    assert out.decode().splitlines()[-1].endswith("turn complete")


async def test_until_idle_does_not_stop_at_the_end_of_an_older_turn(rig, cli):
    await rig.create()
    await rig.run_turn()
    await cli("send", "fix", "And again, please.")
    for form in ([], ["--json"]):
        process = await cli.start("events", "--until-idle", *form, "fix")
        seen = []
        while not seen or "again, please" not in seen[-1]:
            seen.append((await asyncio.wait_for(process.stdout.readline(), 30)).decode())
        await rig.work(
            (ev.STATUS_RUNNING, {}), (ev.STATUS_IDLE, {"stop_reason": {"type": "interrupted"}})
        )
        await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0


async def test_until_idle_says_that_somebody_must_approve(rig, cli):
    await rig.create()
    pending = {"tool_use_id": "toolu_1", "name": "bash"}
    await rig.work(
        (ev.MODEL_RESPONSE, response(tool_use("toolu_1", command="rm x"))),
        (ev.TOOL_PENDING, {**pending, "permission": "Ask"}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "requires_action", "event_ids": ["toolu_1"]}}),
        status={"pending": [pending]},
    )
    assert "waits for approval: toolu_1" in await cli("events", "--until-idle", "fix", code=3)
    await cli("approve", "fix")
    newest = (await rig.logs["default"].get_events(SID))[-1]
    assert (newest.type, newest.data["result"]) == ("user.tool_confirmation", "allow")
    await cli("deny", "fix", "--reason=no")  # any deny wins, until the call runs
    assert "already answered with deny" in await cli("deny", "fix", "--reason=never", code=1)


async def test_answer_gives_the_result_of_a_custom_tool(rig, cli):
    await rig.create(custom_tools=["lookup"])
    assert "waits for the result of a custom tool" in await cli("answer", "fix", "x", code=2)
    pending = {"tool_use_id": "toolu_1", "name": "lookup", "kind": "custom_tool"}
    await rig.work(
        (ev.MODEL_RESPONSE, response(tool_use("toolu_1", "lookup"))),
        (ev.TOOL_PENDING, pending),
        status={"pending": [pending]},
    )
    assert "waits for its client (`cowhand answer`): toolu_1" in await cli("events", "fix")
    assert "no tool call of this session waits for the approval" in await cli(
        "approve", "fix", code=2
    )
    await cli("answer", "fix", "no such ticket", "--error")
    newest = (await rig.logs["default"].get_events(SID))[-1]
    assert (newest.type, newest.data["is_error"]) == ("user.custom_tool_result", True)
    assert newest.data["content"] == [{"type": "text", "text": "no such ticket"}]


async def test_approve_when_nothing_or_too_much_waits(rig, cli):
    await rig.create()
    assert "no tool call of this session waits" in await cli("approve", "fix", code=2)
    calls = [{"tool_use_id": f"toolu_{n}", "name": "bash"} for n in (1, 2)]
    await rig.work(
        *[(ev.TOOL_PENDING, {**c, "permission": "Ask"}) for c in calls], status={"pending": calls}
    )
    text = await cli("deny", "fix", code=2)
    assert f"sevt_{HEX}_toolu_2  bash" in text
    await cli("deny", "fix", "--all", "--reason", "not today")
    newest = (await rig.logs["default"].get_events(SID))[-1]
    assert newest.data["deny_message"] == "not today"


async def test_send_and_interrupt_say_who(rig, cli):
    await rig.create()
    await cli("send", "fix", "hello -- world")
    await cli("send", "fix", "-", stdin=b"from a pipe")
    await cli("interrupt", "fix")
    found = (await rig.logs["default"].get_events(SID))[2:]
    assert [event.type for event in found] == ["user.message", "user.message", "user.interrupt"]
    assert found[1].data["content"][0]["text"] == "from a pipe"
    assert {event.data["actor"]["user"] for event in found} == {"jane"}


async def test_a_broken_tunnel_is_mended_without_a_gap(rig, cli):
    await rig.create()
    process = await cli.start("events", "--raw", "-f", "fix")
    seen = [
        json.loads(await asyncio.wait_for(process.stdout.readline(), 30))["seq"] for _ in range(2)
    ]
    rig.gateway.stopping.set()  # the gateway goes down: its streams end
    await asyncio.sleep(0)
    rig.gateway.stopping.clear()
    await rig.run_turn()
    await rig.finish()
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    seen += [json.loads(line)["seq"] for line in out.splitlines()]
    assert seen == list(range(1, seen[-1] + 1))
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_whatever_ends_a_command_ends_its_port_forward(rig, cli, number):
    await rig.create()
    process = await cli.start("events", "-f", "fix")
    await asyncio.wait_for(process.stdout.readline(), 30)
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), 30) == 128 + number
    for pid in (cli.kubectl.folder / "forwards").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_run_applies_and_follows(rig, cli, tmp_path):
    await rig.create()
    await rig.run_turn()
    manifest = {"apiVersion": "v1", "kind": "AgentSession", "metadata": {"name": "fix"}, "spec": {}}
    path = tmp_path / "session.yaml"
    path.write_text(
        json.dumps(
            {"kind": "List", "items": [manifest, {"kind": "Agent", "metadata": {"name": "a"}}]}
        )
    )
    assert "Done." in await cli("run", "-f", str(path))
    assert await cli("run", "-f", str(path), "--wait") == "Done.\n"
    await cli("run", "--message", "Do it", "--model", "claude-opus-5-5", "--detach")
    applied = json.loads((cli.kubectl.folder / "applied.json").read_text())
    assert applied["metadata"] == {"generateName": "run-"}
    assert applied["spec"] == {"message": "Do it", "agent": {"model": {"id": "claude-opus-5-5"}}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "give -f FILE or --message TEXT"),
        (["run", "-m", "x"], "one of --agent NAME"),
        (["run", "-m", "x", "--agent", "a", "--model", "b"], "one of --agent NAME"),
        (["run", "-f", "x", "-m", "y"], "leave out --message"),
        (["events", "nobody"], "there is no AgentSession nobody in namespace default"),
        (["events", "sesn_12"], "is not a session id"),
        (["events", "--start", "0", "fix"], "positions count from 1"),
        (["exec", "fix"], "give the command after --"),
        (["send", "fix", " "], "events.0.content.0.text"),
        (["--gateway", "http://x", "events", SID], "must be https://"),
        (["--token-file", "/none", "events", SID], "--token-file /none: No such file"),
    ],
)
async def test_wrong_use_is_exit_2_and_says_what_to_do(rig, cli, arguments, says):
    await rig.create()
    assert says in await cli(*arguments, code=2)


async def test_refusals_and_troubles_are_exit_1(rig, cli):
    await rig.create()
    cli.kubectl.write("token", "joe-token")
    assert "joe may not get agentsessions/events.cowhand.dev" in await cli("events", "fix", code=1)
    cli.kubectl.write("token", "nobody")
    assert "does not accept this token" in await cli("events", "fix", code=1)
    cli.kubectl.write("fail.json", {"port-forward": 'error: services "cowhand-gateway" not found'})
    text = await cli("events", "fix", code=1)
    assert 'services "cowhand-gateway" not found' in text
    assert "cowhand doctor" in text
    cli.kubectl.write(
        "fail.json", {"create token": 'serviceaccounts "cowhand-cli" not found (NotFound)'}
    )
    assert "one of the chart's `tenants`" in await cli("events", "fix", code=2)


async def test_a_session_that_is_stalled_says_why(rig, cli):
    stalled = {
        "type": "Stalled",
        "status": "True",
        "reason": "AgentNotFound",
        "message": "no Agent x",
    }
    cli.kubectl.put("agentsession", "bad", {"status": {"conditions": [stalled]}})
    assert "bad is stalled: AgentNotFound: no Agent x" in await cli("events", "bad", code=1)


async def test_a_gateway_under_another_name_gets_no_token(rig, cli):
    ca = cli.kubectl.objects["cowhand-system/configmap/cowhand-ca"]
    cli.kubectl.put("configmap", "cowhand-ca", dict(ca), "elsewhere")
    await rig.create()
    before = rig.kube.count("TokenReview")
    text = await cli("--system-namespace", "elsewhere", "events", "fix", code=1)
    assert "not valid for cowhand-gateway.elsewhere.svc" in text
    assert rig.kube.count("TokenReview") == before


async def test_get(rig, cli):
    await rig.create()
    table = (await cli("get")).splitlines()
    assert table[0].split() == [
        "NAME",
        "STATE",
        "TURN",
        "TURNS",
        "TOOLS",
        "TOKENS",
        "AGE",
        "SESSION",
    ]
    assert table[1].split() == ["fix", "idle", "1", "0", "0", SID]
    assert f"Session:     {SID}" in await cli("get", "fix")
    assert "Agent:       coder, model claude-opus-5-5" in await cli("get", SID)
    assert "there is no AgentSession nobody" in await cli("get", "nobody", code=2)


async def test_exec_passes_words_and_exit_code_on(rig, cli, monkeypatch):
    await rig.create()
    await rig.work(
        (ev.STATUS_RUNNING, {}),
        status={"hands": [{"name": "sandbox", "state": "Ready", "sandbox": "box"}]},
    )
    ran = []

    async def run(self, caller, namespace, name, command):
        ran.append((caller.user, namespace, name, command.command, command.timeout_ms))
        return {"content": "out\n", "exit_code": 7, "is_error": True, "truncated": False}

    monkeypatch.setattr("cowhand.gateway.exec.Executor.run", run)
    assert await cli("exec", "fix", "--", "ls", "-l", "my file", code=7) == "out\n"
    assert await cli("exec", "--timeout=5", "box", "--", "echo a | wc", code=7) == "out\n"
    assert ran == [
        ("jane", "default", "box", "ls -l 'my file'", 120_000),
        ("jane", "default", "box", "echo a | wc", 5000),
    ]


async def test_exec_before_there_is_a_sandbox(rig, cli):
    await rig.create()
    assert "has no sandbox now" in await cli("exec", "fix", "--", "true", code=2)


async def test_logs_of_the_harness_that_works_on_it(rig, cli):
    await rig.create()
    assert "no harness has worked" in await cli("logs", "fix", code=1)
    await rig.work((ev.STATUS_RUNNING, {}))
    assert "is gone" in await cli("logs", "fix", code=1)
    cli.kubectl.put("pod", "harness-1", {"metadata": {"uid": "pod"}})
    cli.kubectl.write("logs", f'{{"session":"{SID}","msg":"mine"}}\n{{"msg":"other"}}\n')
    assert await cli("logs", "fix") == f'{{"session":"{SID}","msg":"mine"}}\n'
    assert "other" in await cli("logs", "fix", "--every-session")


async def test_doctor_on_a_whole_installation(rig, cli):
    ready = {"spec": {"replicas": 1}, "status": {"readyReplicas": 1}}
    env = [
        {"name": "COWHAND_MODEL_BASE_URL", "value": "https://api.anthropic.com"},
        {"name": "COWHAND_SANDBOX_IMAGE", "value": "cowhand-sandbox:1"},
    ]
    operator = {"replicas": 1, "template": {"spec": {"containers": [{"env": env}]}}}
    cli.kubectl.put("deployment", "cowhand-operator", {**ready, "spec": operator}, "cowhand-system")
    for name in ("cowhand-broker", "cowhand-gateway"):
        cli.kubectl.put("deployment", name, dict(ready), "cowhand-system")
    cli.kubectl.put("deployment", "cowhand-harness", dict(ready))
    annotations = {"cowhand.dev/allowed-hosts": "api.anthropic.com"}
    secret = {"metadata": {"annotations": annotations}, "data": {"api-key": "c2VjcmV0"}}
    cli.kubectl.put("secret", "cowhand-model", secret)
    images = [{"names": ["docker.io/library/cowhand-sandbox:1"]}]
    cli.kubectl.put("node", "n", {"status": {"images": images}})
    kinds = ("agents", "agentsessions", "environments", "sandboxes")
    cli.kubectl.write("crds.json", [f"{kind}.cowhand.dev" for kind in kinds])
    assert "! store profile" in await cli("doctor")
    await rig.store.require_durability()
    rig.gateway.durability = rig.store.durability.as_dict
    rig.gateway.health._entries.clear()
    text = await cli("doctor")
    assert {line[0] for line in text.splitlines()} == {"✓"}, text
    assert "c2VjcmV0" not in text
    rig.broker.up = False
    rig.gateway.health._entries.clear()
    assert "✗ broker answers" in await cli("doctor", code=1)
    assert turn()


async def test_the_log_is_followed_by_anybody_who_may_read(rig, cli):
    await rig.create("team-a")
    rig.kube.rights.add(("jane", "get", "events", "team-a"))
    await rig.logs["team-a"].emit_event(
        SID, NewEvent(ev.USER_INTERRUPT, {"actor": {"user": "x"}}, id="i")
    )
    lines = (await cli("-n", "team-a", "events", "--raw", SID)).splitlines()
    assert len(lines) == 3
