"""What is not in the official SDK: raw log, resume, limits, exec, health; with plain HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import ssl

import aiohttp
import pytest
from aiohttp import web

from cowhand.errors import Denied, QuotaExceeded, StoreMismatch, StoreUnavailable, Terminal
from cowhand.gateway import health, pump
from cowhand.gateway.auth import Authority, Caller
from cowhand.hands import transport
from cowhand.kube.errors import Forbidden, Unauthorized
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import HandRecord
from cowhand.session.remote import HttpArchive
from cowhand.wire.records import sign_record
from cowhand.wire.tls import ServerCertificate
from support import tls_rig
from support.archive_rig import archive_rig
from support.gateway_rig import SID

EXEC = "/v1/namespaces/default/sandboxes/box/exec"
BEARER = {"authorization": "Bearer jane-token"}


async def lines(rig, query, until=None):
    found = []
    url = f"{rig.url}/v1/sessions/{SID}/log{query}"
    async with rig.http.get(url, headers=BEARER) as response:
        assert response.status == 200
        async for raw in response.content:
            if raw.strip():
                found.append(json.loads(raw))
                if until and until(found[-1]):
                    break
    return found


async def test_the_raw_log(rig):
    await rig.create()
    await rig.run_turn()
    stored = await rig.logs["default"].get_events(SID)
    found = await lines(rig, "")
    assert [(line["seq"], line["type"], line["id"]) for line in found] == [
        (event.seq, event.type, event.id) for event in stored
    ]
    assert found[0]["payload"] == stored[0].body
    assert [line["seq"] for line in await lines(rig, "?start=4&end=6")] == [4, 5, 6]
    last = stored[-1].seq
    assert [line["seq"] for line in await lines(rig, "?start=-2")] == [last - 1, last]
    assert [line["seq"] for line in await lines(rig, "?start=1&end=-9999")] == []
    found = await lines(rig, "?types=tool.result,model.response")
    assert [line["type"] for line in found] == ["model.response", "tool.result", "model.response"]


async def test_following_the_raw_log_to_its_end(rig):
    await rig.create()
    task = asyncio.ensure_future(lines(rig, "?follow=true&start=2"))
    await rig.run_turn()
    await rig.finish()
    found = await asyncio.wait_for(task, 60)
    assert [line["seq"] for line in found] == list(range(2, found[-1]["seq"] + 1))
    assert found[-1]["type"] == "session.deleted"


@pytest.mark.parametrize(
    "query", ["start=0", "start=--1", "end=x", "follow=maybe", "follow=true&end=3"]
)
async def test_bad_log_parameters(rig, query):
    await rig.create()
    status, body, _ = await rig.call("GET", f"/v1/sessions/{SID}/log?{query}")
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


async def test_a_stream_resumes_after_the_last_frame(rig):
    await rig.create()
    await rig.run_turn()
    url = f"{rig.url}/v1/sessions/{SID}/events/stream"

    async def ids(headers, query="", count=3):
        found = []
        async with rig.http.get(url + query, headers={**BEARER, **headers}) as response:
            assert response.content_type == "text/event-stream"
            async for raw in response.content:
                if raw.startswith(b"id: "):
                    found.append(raw[4:].strip().decode())
                if len(found) == count:
                    break
        return found

    first = await ids({"Last-Event-ID": "0"}, count=7)
    assert await ids({"Last-Event-ID": first[2]}, count=4) == first[3:]
    assert await ids({}, f"?after={first[2]}", count=4) == first[3:]


async def test_silent_streams_are_kept_alive(rig, monkeypatch):
    monkeypatch.setattr(pump, "PING_S", 0.01)
    await rig.create()
    url = f"{rig.url}/v1/sessions/{SID}/events/stream"
    async with rig.http.get(url, headers=BEARER) as response:
        assert (await response.content.readline()) == b"event: ping\n"


async def test_a_slow_follower_does_not_make_the_gateway_read_ahead(rig, monkeypatch):
    await rig.create()
    text = {"content": [{"type": "text", "text": "x" * 60_000}], "actor": {"user": "jane"}}
    log = rig.logs["default"]
    for number in range(400):  # 24 MB
        await log.emit_event(SID, NewEvent(ev.USER_MESSAGE, text, id=f"m{number}"))
    taken = 0
    follow = log.follow

    async def counted(session_id, start=1):
        nonlocal taken
        async for event in follow(session_id, start):
            taken += 1
            yield event

    monkeypatch.setattr(log, "follow", counted)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1",
        int(rig.url.rsplit(":", 1)[1]),
        ssl=rig.tls,
        limit=1024,
        server_hostname="127.0.0.1",
    )
    writer.write(
        f"GET /v1/sessions/{SID}/log?follow=true HTTP/1.1\r\nHost: x\r\n"
        "Authorization: Bearer jane-token\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n")
    seen = -1
    while taken != seen:  # until it stands still
        seen = taken
        await asyncio.sleep(0.3)
    assert taken < 300
    writer.transport.abort()


async def test_limits_and_unknown_paths(rig):
    await rig.create()
    path = f"/v1/sessions/{SID}/events"
    status, body, _ = await rig.call("POST", path, data=io.BytesIO(b"x" * (4 * 1024 * 1024 + 1)))
    assert (status, body["error"]["type"]) == (413, "request_too_large")
    long = {"type": "user.message", "content": "x" * 1_100_000}
    raw = json.dumps({"events": [long]}).encode()
    status, body, _ = await rig.call("POST", path, data=io.BytesIO(raw))
    assert status == 413
    assert body["error"]["message"].startswith("events.0: ")
    for method, path in (("GET", "/v1/agents"), ("DELETE", f"/v1/sessions/{SID}")):
        status, body, headers = await rig.call(method, path)
        assert status in (404, 405)
        assert body["type"] == "error"
        assert headers["request-id"] == body["request_id"]


async def test_odd_session_ids_never_reach_the_store(rig, monkeypatch):
    async def reached(session_id):
        raise AssertionError(session_id)

    for log in rig.logs.values():
        monkeypatch.setattr(log, "get_session", reached)
    for bad in ("sesn_", "x", "sesn_" + "g" * 32, "%7Bp00%7D:s", SID + ":m"):
        status, body, _ = await rig.call("GET", f"/v1/sessions/{bad}")
        assert (status, body["error"]["type"]) == (404, "not_found_error")


async def test_strangers_are_refused_everywhere(rig):
    await rig.create()
    session = f"/v1/sessions/{SID}"
    for method, path in (
        ("GET", session),
        ("GET", f"{session}/events"),
        ("GET", f"{session}/events/stream"),
        ("GET", f"{session}/log"),
        ("POST", f"{session}/events"),
        ("POST", EXEC),
    ):
        message = {"events": [{"type": "user.message", "content": "x"}]}
        body = {"json": message} if method == "POST" else {}
        assert (await rig.call(method, path, token=None, **body))[0] == 401
        assert (await rig.call(method, path, token="joe-token", **body))[0] == 403


async def test_approvals_need_their_own_right(rig):
    await rig.create()
    rig.kube.rights.discard(("jane", "create", "approvals", "default"))
    confirm = {"type": "user.tool_confirmation", "tool_use_id": "toolu_1", "result": "allow"}
    message = {"type": "user.message", "content": "x"}
    status, body, _ = await rig.call(
        "POST", f"/v1/sessions/{SID}/events", json={"events": [message, confirm]}
    )
    assert status == 403
    assert "create agentsessions/approvals.cowhand.dev" in body["error"]["message"]
    assert len(await rig.logs["default"].get_events(SID)) == 2


@pytest.mark.parametrize(
    "error", [Forbidden("may not create tokenreviews"), Unauthorized("old token")]
)
async def test_the_gateways_own_missing_rights_are_not_the_callers_fault(rig, error):
    rig.kube.error = error
    status, body, headers = await rig.call("GET", f"/v1/sessions/{SID}")
    assert (status, headers["retry-after"]) == (503, "1")
    assert "the gateway itself is refused" in body["error"]["message"]


async def test_a_store_that_refuses_or_is_away_is_503(rig, monkeypatch):
    for error in (
        Denied("WRONGPASS"),
        StoreUnavailable("away", after=3),
        StoreMismatch("the store is another one"),
    ):

        async def refuse(session_id, error=error):
            raise error

        monkeypatch.setattr(rig.logs["default"], "get_session", refuse)
        status, body, headers = await rig.call("GET", f"/v1/sessions/{SID}")
        assert (status, body["error"]["type"]) == (503, "api_error")
        assert int(headers["retry-after"]) in (1, 3)


async def test_what_the_caller_is_not_shown_stands_in_the_log(rig, monkeypatch, caplog):
    await rig.create()

    async def refuse(*args, **kwargs):
        raise Terminal("the store refuses the command: ERR odd")
        yield

    monkeypatch.setattr(rig.logs["default"], "follow", refuse)
    path = f"/v1/sessions/{SID}/log?follow=true"
    async with rig.http.get(rig.url + path, headers={"x-api-key": "jane-token"}) as answered:
        last = json.loads((await answered.text()).splitlines()[-1])
    request_id = answered.headers["request-id"]
    assert request_id in last["error"]["message"]
    assert "ERR odd" not in last["error"]["message"]
    (record,) = [r for r in caplog.records if getattr(r, "request_id", "") == request_id]
    assert "ERR odd" in str(record.exc_info)


async def test_a_full_namespace_is_429_that_is_not_worth_a_retry(rig, monkeypatch):
    await rig.create()

    async def refuse(session_id, event):
        raise QuotaExceeded("default", used=2, limit=1)

    monkeypatch.setattr(rig.logs["default"], "emit_event", refuse)
    event = {"type": "user.message", "content": [{"type": "text", "text": "hi"}]}
    path = f"/v1/sessions/{SID}/events"
    status, body, headers = await rig.call("POST", path, json={"events": [event]})
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert "store.tenantQuota" in body["error"]["message"]
    assert headers["x-should-retry"] == "false"


async def test_health_needs_no_token_and_tells_of_store_and_broker(rig):
    rig.broker.up = False
    status, body, _ = await rig.call("GET", "/healthz", token=None)
    assert status == 200
    assert (body["store"], body["broker"], body["archive"]) == ("ok", "no answer", "none")


async def test_health_tells_of_the_archive(rig, tmp_path):
    async with archive_rig(tmp_path) as far:
        examined = [
            await health.examine({}, rig.broker, far.client("gateway")),
            await health.examine({}, rig.broker, HttpArchive("https://localhost:1")),
        ]
    assert examined[0]["archive"] == "ok"
    assert "does not answer" in examined[1]["archive"]


class Sandbox:
    """A sandbox's proxy: answers one call, notes what it got."""

    def __init__(self):
        self.calls = []
        self.connections = 0
        self.answer = (
            200,
            {"status": "done", "result": {"content": "hi\n", "is_error": False, "exit_code": 3}},
        )

    async def execute(self, request):
        self.calls.append((request.headers["authorization"], await request.json()))
        status, body = self.answer
        return web.json_response(body, status=status)


@pytest.fixture
async def sandbox(rig, tmp_path):
    """A Ready sandbox `box`, owned by the session, whose certificate is not signed by anybody known."""
    folder = tmp_path / "sandbox"
    folder.mkdir()
    certificates = tls_rig.make(folder)
    box = Sandbox()
    app = web.Application()
    app.router.add_post("/v1/execute", box.execute)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = ServerCertificate(str(certificates.cert), str(certificates.key)).context
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    box.address = f"127.0.0.1:{runner.addresses[0][1]}"
    box.sha256 = certificates.sha256
    await rig.create()
    rig.kube.objects["default", "box"] = {"metadata": {"name": "box", "uid": "box-uid"}}
    yield box
    await runner.cleanup()


async def register(rig, box, **changes):
    fields = {
        "session_id": SID,
        "hand": "sandbox",
        "instance": 1,
        "state": "Ready",
        "sandbox": "box",
        "sandbox_uid": "box-uid",
        "pod_uid": "pod-uid",
        "address": box.address,
        "cert_sha256": box.sha256,
        "owner": SID,
        "owner_epoch": 1,
    }
    signature = changes.pop("signature", None)
    record = HandRecord(**{**fields, **changes})
    signed = sign_record(record, rig.broker.key, namespace="default")
    record = HandRecord(
        **{**fields, **changes, "signature": signed if signature is None else signature}
    )
    await rig.store.control_log().put_hand("default", record)


async def test_exec_runs_and_is_on_record(rig, sandbox):
    await register(rig, sandbox)
    status, body, _ = await rig.call(
        "POST", EXEC, json={"command": "cd x; id -u", "timeout_ms": 5000}
    )
    assert status == 200
    assert (body["content"], body["exit_code"], body["is_error"]) == ("hi\n", 3, False)
    ((token, call),) = sandbox.calls
    assert token == "Bearer exec-token"
    assert (call["name"], call["input"]["command"]) == ("bash", "bash -c 'cd x; id -u'")
    assert rig.broker.asked == [("default", "box-uid", "jane")]
    audit = [e for e in await rig.logs["default"].get_events(SID) if e.type == ev.SESSION_EXEC]
    assert [event.data.get("exit_code") for event in audit] == [None, 3]
    assert audit[0].data["actor"]["user"] == "jane"
    assert audit[0].data["command"] == "cd x; id -u"
    assert audit[1].body["c"] == audit[0].id


async def test_exec_is_on_record_even_if_the_sandbox_never_answers(rig, sandbox):
    await register(rig, sandbox, address="127.0.0.1:1")
    status, body, headers = await rig.call("POST", EXEC, json={"command": "true"})
    assert (status, headers["retry-after"]) == (503, "1")
    assert "does not answer" in body["error"]["message"]
    audit = [e for e in await rig.logs["default"].get_events(SID) if e.type == ev.SESSION_EXEC]
    assert len(audit) == 1


async def test_nothing_is_sent_to_another_certificate(rig, sandbox):
    await register(rig, sandbox, cert_sha256="00" * 32)
    status, body, headers = await rig.call("POST", EXEC, json={"command": "true"})
    assert (status, headers["x-should-retry"]) == (409, "false")
    assert "another certificate" in body["error"]["message"]
    assert sandbox.calls == []


async def test_control_without_the_pin_the_token_would_arrive(rig, sandbox, monkeypatch):
    """Shows that the test above sees the pin: without it, the same request reaches the stranger."""
    monkeypatch.setattr(transport.PinnedTransport, "_pin", lambda self, cert_sha256: False)
    await register(rig, sandbox, cert_sha256="00" * 32)
    assert (await rig.call("POST", EXEC, json={"command": "true"}))[0] == 200
    assert len(sandbox.calls) == 1


async def test_control_without_the_signature_check_the_record_would_be_dialled(
    rig, sandbox, monkeypatch
):
    monkeypatch.setattr("cowhand.gateway.exec.verify_record", lambda *_, **__: None)
    await register(rig, sandbox, signature="")
    assert (await rig.call("POST", EXEC, json={"command": "true"}))[0] == 200


async def test_control_without_the_reviews_strangers_would_be_served(rig, monkeypatch):
    """TokenReview and SubjectAccessReview are what `test_strangers_are_refused_everywhere` sees."""
    await rig.create()

    async def anybody(self, *_):
        return Caller("anybody")

    async def allowed(self, *_):
        return None

    monkeypatch.setattr(Authority, "authorize", allowed)
    assert (await rig.call("GET", f"/v1/sessions/{SID}", token="joe-token"))[0] == 200
    monkeypatch.setattr(Authority, "authenticate", anybody)
    assert (await rig.call("GET", f"/v1/sessions/{SID}", token=None))[0] == 200


async def test_a_record_without_the_brokers_signature_is_not_dialled(rig, sandbox):
    for signature in ("", f"{rig.broker.key.kid}.AAAA", "other.AAAA"):
        await register(rig, sandbox, signature=signature)
        status, body, _ = await rig.call("POST", EXEC, json={"command": "true"})
        assert status == 409, body
        assert "not trusted" in body["error"]["message"]
    assert sandbox.calls == []
    assert rig.broker.asked == []


async def test_exec_where_there_is_nothing_to_run_in(rig, sandbox):
    missing = EXEC.replace("box", "none")
    assert (await rig.call("POST", missing, json={"command": "true"}))[0] == 404
    status, body, _ = await rig.call("POST", EXEC, json={"command": "true"})
    assert status == 409
    assert "not registered yet" in body["error"]["message"]
    await register(rig, sandbox, state="Failed", reason="ImagePullBackOff", message="no such image")
    status, body, _ = await rig.call("POST", EXEC, json={"command": "true"})
    assert status == 409
    assert "Failed (ImagePullBackOff): no such image" in body["error"]["message"]


async def test_what_a_sandbox_answers_is_not_trusted(rig, sandbox):
    await register(rig, sandbox)
    for answer, expected in (
        ((200, ["?"]), 503),
        ((200, {"status": "done"}), 503),
        ((200, {"result": {"content": 3}}), 503),
        ((409, {"error": {"type": "fenced", "message": "no"}}), 409),
        ((500, {}), 503),
    ):
        sandbox.answer = answer
        assert (await rig.call("POST", EXEC, json={"command": "true"}))[0] == expected


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "command"),
        ({"command": " "}, "command"),
        ({"command": "x", "timeout_ms": 0}, "timeout_ms"),
        ({"command": "x", "timeout_ms": True}, "timeout_ms"),
        ({"command": "x", "timeout_ms": 10**7}, "timeout_ms"),
    ],
)
async def test_bad_exec_bodies(rig, body, field):
    status, answer, _ = await rig.call("POST", EXEC, json=body)
    assert (status, answer["error"]["message"].split(":")[0]) == (400, field)


async def test_the_port_speaks_tls_only(rig):
    plain = rig.url.replace("https", "http")
    with pytest.raises(aiohttp.ClientError):
        await rig.http.get(f"{plain}/healthz")
    untrusting = ssl.create_default_context()
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await rig.http.get(f"{rig.url}/healthz", ssl=untrusting)


async def test_another_tenants_copy_of_a_session_catches_nothing(rig):
    """The harness of `team-a` was taken over and wrote our session's id into its own keys, first in line."""
    await rig.create()
    await rig.create("team-a")
    rig.gateway.logs = {name: rig.logs[name] for name in ("team-a", "default")}
    message = {"events": [{"type": "user.message", "content": "my secret plan"}]}
    status, _, _ = await rig.call("POST", f"/v1/sessions/{SID}/events", json=message)
    assert status == 200
    assert len(await rig.logs["default"].get_events(SID)) == 3
    assert len(await rig.logs["team-a"].get_events(SID)) == 2


async def test_a_forged_namespace_does_not_borrow_anothers_rights(rig):
    """Rights are asked for where the log stands, whatever the log says of itself."""
    await rig.create("team-a")
    key = rig.store.keys("team-a").session(SID).meta
    await rig.store.writes.call("HSET", key, "ns", "default")
    status, body, _ = await rig.call("GET", f"/v1/sessions/{SID}")
    assert status == 500
    assert body["type"] == "error"


async def test_a_session_that_stands_twice_must_be_named(rig):
    await rig.create()
    await rig.create("team-a")
    rig.kube.rights.add(("jane", "get", "events", "team-a"))
    status, body, _ = await rig.call("GET", f"/v1/sessions/{SID}")
    assert status == 409
    assert "anthropic-workspace-id" in body["error"]["message"]
    header = {"anthropic-workspace-id": "team-a"}
    status, body, _ = await rig.call("GET", f"/v1/sessions/{SID}", headers=header)
    assert (status, body["cowhand"]["namespace"]) == (200, "team-a")
