"""The harness process against a real store, real proxies, real sandboxd and the model server."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cowhand.hands import registry
from cowhand.hands.base import Outcome
from cowhand.harness.fold import Conversation
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from support.harness_rig import NAMESPACE, user
from support.harness_stack import Stack, stack
from support.store import Store

pytestmark = pytest.mark.timeout(240)  # process starts, on a busy machine

ACTOR = {"actor": {"user": "u"}}
COUNT = "echo x >> counter; wc -l < counter"
SLOW = "echo begun >> begun; while [ ! -e go ]; do sleep 0.02; done; " + COUNT


@pytest.fixture
async def here(store_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(store_url, tmp_path) as made:
        yield made


def bash(command: str, **more: Any) -> dict[str, Any]:
    """A turn that runs one command."""
    use = {"type": "tool_use", "name": "bash", "input": {"command": command}}
    return {"content": [{"type": "thinking", "thinking": "hm"}, use], **more}


def say(text: str, **more: Any) -> dict[str, Any]:
    """A turn that ends with text."""
    return {"content": [{"type": "text", "text": text}], **more}


def strip(value: Any) -> Any:
    if isinstance(value, list):
        return [strip(item) for item in value]
    if isinstance(value, dict):
        return {key: strip(item) for key, item in value.items() if key != "cache_control"}
    return value


async def audit(here: Stack, session_id: str) -> Conversation:
    """What holds for every finished session."""
    events = await here.events(session_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    conversation = Conversation(session_id)
    for event in events:
        conversation.apply(event)
        if event.type == ev.MODEL_REQUEST_START:
            assert conversation.prefix_matches()
    uses = [
        block["id"]
        for event in events
        if event.type == ev.MODEL_RESPONSE
        for block in event.data["message"]["content"]
        if block["type"] == "tool_use"
    ]
    results = [event.data["tool_use_id"] for event in events if event.type == ev.TOOL_RESULT]
    assert sorted(results) == sorted(uses)
    requests = [strip(body) for body in await here.requests(session_id)]
    for earlier, later in itertools.pairwise(requests):
        head = later["messages"][: len(earlier["messages"])]
        assert json.dumps(head) == json.dumps(earlier["messages"])
    assert (await here.state(session_id)).status == conversation.status
    return conversation


def answer(events: list[Event]) -> str:
    last = [event for event in events if event.type == ev.MODEL_RESPONSE][-1]
    return str(last.data["message"]["content"][-1]["text"])


def workers(events: list[Event]) -> list[str]:
    """Pod uids of the workers that claimed the session, in order."""
    return [
        event.id.split(":")[1].split(".")[0] for event in events if event.type == ev.SESSION_WAKE
    ]


async def counted(here: Stack, session_id: str, instance: int = 1) -> str:
    return (here.pods[session_id, "main", instance].workdir / "counter").read_text()


async def test_a_session_runs_commands_in_its_sandbox_and_answers(here: Stack) -> None:
    await here.script("s", bash("cd /; pwd; echo $((6*7)); exit_status=3; (exit 3)"),
                      bash("pwd; echo $exit_status"), say("it says {{result:0}} {{result:-1}}"))  # fmt: skip
    await here.worker()
    session_id = await here.create("[[script:s]]")
    events = await here.settled(session_id)
    first, second = (event.data for event in events if event.type == ev.TOOL_RESULT)
    assert "42" in first["content"]
    assert (first["exit_code"], first["is_error"]) == (3, True)
    assert second["content"].split() == ["/", "3"], "the shell persists"
    assert "42" in answer(events)
    kinds = [event.type for event in events]
    assert kinds.count(ev.HAND_REQUESTED) == kinds.count(ev.HAND_PROVISIONED) == 1
    assert kinds.index(ev.MODEL_RESPONSE) < kinds.index(ev.HAND_REQUESTED), "lazy"
    assert (await audit(here, session_id)).idle == {"type": "end_turn"}
    await here.emit(session_id, user("and again", "m2"))
    await here.settled(session_id, turns=2)
    await audit(here, session_id)


async def test_a_response_of_300_kib_is_logged_executed_and_sent_back(here: Stack) -> None:
    content = "".join(f"{n:07d}\n" for n in range(300 * 128))
    use = {"type": "tool_use", "name": "write"}
    write = {"content": [{**use, "input": {"file_path": "big.txt", "content": content}}]}
    await here.script("s", write, bash("wc -c < big.txt"), say(content + "{{result:-1}}"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    events = await here.settled(session_id)
    sizes = [len(event.payload) for event in events if event.type == ev.MODEL_RESPONSE]
    assert sizes[0] > 300 * 1024
    assert sizes[2] > 300 * 1024
    assert (here.pods[session_id, "main", 1].workdir / "big.txt").read_text() == content
    assert answer(events).split()[-1] == str(len(content))
    assert (await audit(here, session_id)).idle == {"type": "end_turn"}


async def test_a_raised_budget_lets_the_next_message_go_on(here: Stack) -> None:
    await here.script("s", bash(COUNT), bash(COUNT), say("done"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]", budget={"max_tool_calls": 1})
    await here.settled(session_id)
    reached = {"type": "budget_reached", "budget": "max_tool_calls"}
    assert (await here.state(session_id)).status["stop_reason"] == reached
    raised = NewEvent(ev.SESSION_UPDATED, {"budget": {"max_tool_calls": 5}, **ACTOR}, id="budget:2")
    await here.store.control_log().set_budget(NAMESPACE, session_id, raised)
    await here.emit(session_id, user("go on", "m2"))
    events = await here.settled(session_id, turns=2)
    assert answer(events) == "done"
    assert await counted(here, session_id) == "x\nx\n"
    assert (await audit(here, session_id)).budget == {"max_tool_calls": 5}


async def test_an_eager_sandbox_comes_before_the_first_request(here: Stack) -> None:
    await here.script("s", say("hi"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]", provisioning="Eager")
    kinds = [event.type for event in await here.settled(session_id)]
    assert kinds.index(ev.HAND_PROVISIONED) < kinds.index(ev.MODEL_REQUEST_START)


@pytest.mark.parametrize("place", ["gate", "gate_mid"])
async def test_killed_while_streaming(here: Stack, place: str) -> None:
    await here.script("s", bash(COUNT), say("n={{result:-1}} and so on", **{place: "g"}))
    one = await here.worker()
    session_id = await here.create("[[script:s]]")
    await here.at_gate("g")
    await here.kill_worker(one)
    two = await here.worker()
    await here.release("g")
    events = await here.settled(session_id)
    assert workers(events) == [one, two]
    assert [event.data["outcome"] for event in events if event.type == ev.MODEL_REQUEST_END] == [
        "ok", "lost", "ok",
    ]  # fmt: skip
    assert (await counted(here, session_id)) == "x\n"
    sent = await here.requests(session_id)
    assert json.dumps(sent[1]) == json.dumps(sent[2]), "the same bytes, breakpoints included"
    await audit(here, session_id)


async def test_killed_while_a_tool_runs_the_next_worker_attaches(here: Stack) -> None:
    await here.script("s", bash(SLOW), say("n={{result:-1}}"))
    one = await here.worker()
    session_id = await here.create("[[script:s]]")
    await here.reaches(session_id, ev.HAND_PROVISIONED)
    workdir = here.pods[session_id, "main", 1].workdir
    await _exists(workdir / "begun")
    await here.kill_worker(one)
    two = await here.worker()
    await here.reaches(session_id, ev.SESSION_WAKE, 2)
    (workdir / "go").touch()
    events = await here.settled(session_id)
    assert workers(events) == [one, two]
    assert (workdir / "begun").read_text() == "begun\n"
    assert (await counted(here, session_id)) == "x\n"
    assert answer(events).strip() == "n=1"
    await audit(here, session_id)


async def _exists(path: Path) -> None:
    from support.harness_stack import until

    await until(str(path), path.exists)


async def test_drained_while_a_tool_runs(here: Stack) -> None:
    await here.script("s", bash(SLOW), say("n={{result:-1}}"))
    one = await here.worker()
    two = None
    session_id = await here.create("[[script:s]]")
    await here.reaches(session_id, ev.HAND_PROVISIONED)
    workdir = here.pods[session_id, "main", 1].workdir
    await _exists(workdir / "begun")
    two = await here.worker()
    assert await here.stop_worker(one) == 0
    await here.reaches(session_id, ev.SESSION_WAKE, 2)
    (workdir / "go").touch()
    events = await here.settled(session_id)
    assert workers(events) == [one, two]
    assert (await counted(here, session_id)) == "x\n"
    await audit(here, session_id)


async def test_drained_while_streaming_the_stream_ends_first(here: Stack) -> None:
    await here.script("s", bash(COUNT, gate_mid="g"), say("n={{result:-1}}"))
    one = await here.worker()
    session_id = await here.create("[[script:s]]")
    await here.at_gate("g")
    two = await here.worker()
    stopping = here.workers[one]
    stopping.terminate()
    await here.release("g")
    assert await stopping.wait() == 0
    events = await here.settled(session_id)
    assert workers(events) == [one, two]
    ends = [event.data for event in events if event.type == ev.MODEL_REQUEST_END]
    assert [end["outcome"] for end in ends] == ["ok", "ok"], "no request was repeated"
    assert (await counted(here, session_id)) == "x\n"
    await audit(here, session_id)


async def test_faults_of_the_model_are_tried_again_with_the_same_bytes(here: Stack) -> None:
    faults = {
        "429": "rate_limit_error",
        "529": "overloaded_error",
        "error_in_stream": "overloaded_error",
        "cut": "stream_cut",
        "eof": "stream_cut",
    }
    turns = [bash("true", fault={"kind": kind, "times": 1}) for kind in faults]
    await here.script("s", *turns, say("hello there"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    events = await here.settled(session_id)
    ends = [event.data for event in events if event.type == ev.MODEL_REQUEST_END]
    assert [end["outcome"] for end in ends] == ["error", "ok"] * 5 + ["ok"]
    assert [end["error"]["type"] for end in ends[::2][:5]] == list(faults.values())
    assert ends[0]["error"]["retry_after_s"] == 1
    errors = [event.data["error"] for event in events if event.type == ev.SESSION_ERROR]
    assert [error["retry_status"]["type"] for error in errors] == ["retrying"] * 5
    sent = await here.requests(session_id)
    for first, second in zip(sent[:10:2], sent[1:10:2], strict=True):
        assert json.dumps(first) == json.dumps(second)
    assert answer(events) == "hello there"
    await audit(here, session_id)


async def test_a_refusal_ends_the_turn_and_leaves_the_prompt(here: Stack) -> None:
    await here.script("s", say("hello", fault={"kind": "refusal", "times": 1}))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    events = await here.settled(session_id)
    assert events[-1].data["stop_reason"] == {"type": "refusal"}
    await here.emit(session_id, user("[[script:s]] politely", "m2"))
    assert answer(await here.settled(session_id, turns=2)) == "hello"
    (message,) = (await here.requests(session_id))[-1]["messages"]
    assert [block["text"] for block in message["content"]] == ["[[script:s]] politely"]


@pytest.mark.parametrize("where", ["stream", "tool"])
async def test_an_interrupt_stops_at_once(here: Stack, where: str) -> None:
    gate = {"gate_mid": "g"} if where == "stream" else {}
    await here.script("s", bash(SLOW, **gate), say("instead"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    if where == "stream":
        await here.at_gate("g")
    else:
        await here.reaches(session_id, ev.HAND_PROVISIONED)
        await _exists(here.pods[session_id, "main", 1].workdir / "begun")
    await here.emit(session_id, NewEvent(ev.USER_INTERRUPT, ACTOR, id="i"))
    events = await here.settled(session_id)
    assert events[-1].data["stop_reason"] == {"type": "interrupted"}
    await here.release("g")
    if where == "stream":
        await here.script("s", say("instead"))
    await here.emit(session_id, user("do something else", "m2"))
    assert answer(await here.settled(session_id, turns=2)) == "instead"
    await audit(here, session_id)


async def test_a_lost_sandbox_is_a_tool_error_and_the_next_call_gets_a_new_one(here: Stack) -> None:
    await here.script("s", bash(SLOW), bash(COUNT), say("{{result:0}} then {{result:-1}}"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    await here.reaches(session_id, ev.HAND_PROVISIONED)
    await _exists(here.pods[session_id, "main", 1].workdir / "begun")
    await here.lose(session_id)
    events = await here.settled(session_id)
    first, second = (event.data for event in events if event.type == ev.TOOL_RESULT)
    assert first["is_error"]
    assert "the sandbox was lost while the call ran" in first["content"]
    assert (second["instance"], second["content"].strip()) == (2, "1")
    requested = [event.data for event in events if event.type == ev.HAND_REQUESTED]
    assert [item["reason"] for item in requested] == ["first_call", "lost"]
    await audit(here, session_id)


async def test_a_call_that_asks_waits_for_a_person_without_a_worker(here: Stack) -> None:
    await here.script("s", bash(COUNT), say("{{result:-1}}"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]", permissions={"bash": "Ask"})
    await here.reaches(session_id, ev.STATUS_IDLE)
    (pending,) = await here.of(session_id, ev.TOOL_PENDING)
    assert (session_id, "main", 1) not in here.pods
    data = {"tool_use_id": pending["tool_use_id"], "result": "allow", **ACTOR}
    await here.emit(session_id, NewEvent(ev.USER_TOOL_CONFIRMATION, data, id="c"))
    assert answer(await here.settled(session_id)).strip() == "1"
    await audit(here, session_id)


async def test_suspended_and_resumed(here: Stack) -> None:
    await here.script("s", bash(COUNT, gate_mid="g"), say("{{result:-1}}"))
    await here.local_worker()
    session_id = await here.create("[[script:s]]")
    await here.at_gate("g")
    control = here.store.control_log()
    from support.harness_rig import NAMESPACE

    suspend = NewEvent(ev.SESSION_SUSPENDED, ACTOR, id="mode:2")
    await control.set_mode(NAMESPACE, session_id, "suspended", suspend)
    await here.release("g")
    await here.reaches(session_id, ev.STATUS_IDLE)
    assert (await here.of(session_id, ev.TOOL_STARTED)) == []
    resume = NewEvent(ev.SESSION_RESUMED, ACTOR, id="mode:3")
    await control.set_mode(NAMESPACE, session_id, "running", resume)
    assert answer(await here.settled(session_id)).strip() == "1"
    await audit(here, session_id)


async def test_control_execute_replaced_by_a_constant_is_found_out(
    here: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the first test, with a harness in this process whose execute() lies."""

    async def constant(*_args: Any, **_more: Any) -> Outcome:
        return Outcome("1", False)

    monkeypatch.setattr(registry.Hands, "execute", constant)
    await here.script("s", bash("echo $((6*7))"), say("it says {{result:-1}}"))
    session_id = await here.create("[[script:s]]")
    await in_process(here, session_id)
    assert "42" not in answer(await here.events(session_id))
    monkeypatch.undo()
    session_id = await here.create("[[script:s]]")
    await in_process(here, session_id)
    assert "42" in answer(await here.events(session_id))


async def in_process(here: Stack, session_id: str) -> None:
    """Wake one session in this process."""
    from cowhand.hands.sandbox import SandboxSettings
    from cowhand.hands.transport import PinnedTransport, ProxyCredentials
    from cowhand.harness.model import AnthropicModel
    from cowhand.harness.run import surroundings
    from cowhand.harness.worker import Worker, WorkerSettings
    from support.harness_rig import NAMESPACE

    model = AnthropicModel(here.proxy_url)
    transport, credentials = PinnedTransport(), ProxyCredentials(here.proxy_url)
    log = here.store.worker_log("in-process")
    await log.beat()
    around = surroundings(model, transport, credentials, SandboxSettings(wait_s=20))
    worker = Worker(
        log, here.store.session_log(), around, WorkerSettings(NAMESPACE), clock=lambda: 0.0
    )
    worker._beaten_at = 0.0
    try:
        await worker.wake(session_id)
    finally:
        await log.retire()
        await model.close()
        await transport.close()
        await credentials.close()


async def test_the_store_restarts_in_mid_tool(tmp_path: Path) -> None:
    server = Store().start()
    try:
        async with stack(server.url, tmp_path) as here:
            await here.script("s", bash(SLOW), bash(COUNT), say("{{result:-1}}"))
            await here.local_worker()
            session_id = await here.create("[[script:s]]")
            await here.reaches(session_id, ev.HAND_PROVISIONED)
            workdir = here.pods[session_id, "main", 1].workdir
            await _exists(workdir / "begun")
            server.kill()
            (workdir / "go").touch()
            await _exists(workdir / "counter")
            server.start()
            events = await here.settled(session_id)
            assert (workdir / "begun").read_text() == "begun\n"
            assert await counted(here, session_id) == "x\nx\n"
            assert answer(events).strip() == "2"
            await audit(here, session_id)
    finally:
        server.stop()
