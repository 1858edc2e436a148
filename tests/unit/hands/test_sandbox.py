"""The sandbox hand: making, finding, delivering, losing; against scripted answers of its proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cowhand.errors import BrokerUnavailable, Denied, Fenced
from cowhand.hands.base import LOST_BEFORE, LOST_RUNNING, MAX_BYTES, Call, cut_output, next_instance
from cowhand.hands.sandbox import SandboxHand, SandboxSettings
from cowhand.hands.transport import Broken, Endpoint, NotSent, Untrusted
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import HandRecord
from cowhand.wire.keys import SigningKey
from cowhand.wire.records import sign_record

SID = "sesn_" + "1" * 32
KEY = SigningKey.generate()
LIMITS = SandboxSettings(wait_s=0.05, max_output=100, grace_s=0.05, broker_wait_s=0.05)


def record(
    instance: int = 1, *, key: SigningKey = KEY, namespace: str = "ns", **more: Any
) -> HandRecord:
    made = HandRecord(
        SID, "main", instance, "Ready", sandbox="sbx", sandbox_uid=f"uid-{instance}", pod_uid="p",
        address=f"10.0.0.{instance}:8443", cert_sha256="ab", owner=SID, owner_epoch=1,
    )  # fmt: skip
    made = replace(made, **more)
    return replace(made, signature=sign_record(made, key, namespace=namespace))


class Session:
    """A `Host`: log, fold of the hand's state, records."""

    session_id = SID
    namespace = "ns"
    lease = "7:w:n"

    def __init__(self, *records: HandRecord) -> None:
        self.records = {item.instance: item for item in records}
        self.events: list[NewEvent] = []
        self.state: tuple[int, str] | None = None
        self.on_wait: list[Any] = []

    def hand_state(self, hand: str) -> tuple[int, str] | None:
        return self.state

    async def append(self, events: Sequence[NewEvent]) -> None:
        states = {ev.HAND_REQUESTED: "Pending", ev.HAND_PROVISIONED: "Ready", ev.HAND_LOST: "Lost"}
        for event in events:
            self.events.append(event)
            self.state = (event.data["instance"], states[event.type])

    async def get_hand(self, hand: str, instance: int) -> HandRecord | None:
        return self.records.get(instance)

    async def changed(self, timeout: float) -> None:
        if self.on_wait:
            self.on_wait.pop(0)()
        await asyncio.sleep(min(timeout, 0.002))

    def types(self) -> list[str]:
        return [event.type for event in self.events]


def done(content: str = "out", **more: Any) -> tuple[int, Any]:
    result = {"content": content, "is_error": False, "exit_code": 0, "duration_ms": 3, **more}
    return 200, {"status": "done", "result": result}


RUNNING = (200, {"status": "running"})
UNKNOWN = (404, {"status": "unknown"})
FENCED = (409, {"error": {"type": "fenced", "message": "newer"}})


class Proxy:
    """Answers in order; the last one again and again. Also `Credentials`."""

    def __init__(self, *answers: Any, tokens: Sequence[Any] = ("t1", "t2", "t3")) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, str]] = []
        self.bodies: list[Any] = []
        self.endpoints: list[Endpoint] = []
        self.tokens = list(tokens)
        self.made = 0
        self.known: dict[str, Any] = {KEY.kid: KEY.public}
        self.newer: dict[str, Any] = {}

    async def request(
        self, endpoint: Endpoint, method: str, path: str, *, token: str,
        body: Mapping[str, Any] | None = None, timeout: float,
    ) -> tuple[int, Any]:  # fmt: skip
        self.endpoints.append(endpoint)
        self.asked.append((method, path.split("?")[0], token))
        self.bodies.append(body)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        found: tuple[int, Any] = answer
        return found

    async def close(self) -> None:
        return None

    async def token(
        self, session_id: str, lease: str, sandbox_uid: str, *, fresh: bool = False
    ) -> str:
        if fresh:
            self.made += 1
        token = self.tokens[min(self.made, len(self.tokens) - 1)]
        if isinstance(token, Exception):
            raise token
        return str(token)

    async def keys(self, *, fresh: bool = False) -> dict[str, Any]:
        return {**self.known, **self.newer} if fresh else self.known

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.asked]


def hand(session: Session, proxy: Proxy, limits: SandboxSettings = LIMITS) -> SandboxHand:
    return SandboxHand("main", session, proxy, proxy, limits)


def call(instance: int = 1, timeout_ms: int = 60_000) -> Call:
    return Call(f"{SID}/toolu_1", "bash", {"command": "true"}, instance, timeout_ms)


async def test_the_first_call_asks_for_the_sandbox_and_sends_exactly_the_call() -> None:
    session, proxy = Session(record()), Proxy(done("hello"))
    made = hand(session, proxy)
    outcome = await made.execute(call())
    assert (outcome.content, outcome.is_error, outcome.exit_code) == ("hello", False, 0)
    assert session.types() == [ev.HAND_REQUESTED, ev.HAND_PROVISIONED]
    assert session.events[0].data == {"hand": "main", "instance": 1, "reason": "first_call"}
    assert proxy.asked == [("POST", "/v1/execute", "t1")]
    assert proxy.bodies[0] == {
        "call_id": f"{SID}/toolu_1", "name": "bash", "input": {"command": "true"},
        "timeout_ms": 60_000,
    }  # fmt: skip
    await made.execute(call())
    assert session.types() == [ev.HAND_REQUESTED, ev.HAND_PROVISIONED], "made once"


async def test_attach_asks_before_it_runs_anything() -> None:
    proxy = Proxy(RUNNING, RUNNING, done("late"))
    assert (await hand(Session(record()), proxy).attach(call())).content == "late"
    assert proxy.methods() == ["GET", "GET", "GET"]
    assert proxy.asked[0][1] == f"/v1/calls/{SID}%2Ftoolu_1"
    proxy = Proxy(UNKNOWN, done("now"))
    assert (await hand(Session(record()), proxy).attach(call())).content == "now"
    assert proxy.methods() == ["GET", "POST"]


async def test_a_broken_connection_asks_before_it_sends_again() -> None:
    proxy = Proxy(Broken("reset"), done("journal"))
    assert (await hand(Session(record()), proxy).execute(call())).content == "journal"
    assert proxy.methods() == ["POST", "GET"]
    proxy = Proxy(Broken("reset"), UNKNOWN, done("second"))
    assert (await hand(Session(record()), proxy).execute(call())).content == "second"
    assert proxy.methods() == ["POST", "GET", "POST"]
    proxy = Proxy(NotSent("refused"), done("third"))
    assert (await hand(Session(record()), proxy).execute(call())).content == "third"
    assert proxy.methods() == ["POST", "POST"]
    proxy = Proxy((502, {"error": {"type": "x", "message": "y"}}), done("fourth"))
    assert (await hand(Session(record()), proxy).execute(call())).content == "fourth"
    assert proxy.methods() == ["POST", "GET"]


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (NotSent("refused"), LOST_BEFORE),
        (Broken("reset"), LOST_RUNNING),
        (Untrusted("pin"), LOST_BEFORE),
        ((503, None), LOST_RUNNING),
    ],
)
async def test_an_unreachable_sandbox_is_lost_after_a_while(trouble: Any, text: str) -> None:
    session = Session(record())
    outcome = await hand(session, Proxy(trouble)).execute(call())
    assert (outcome.content, outcome.is_error, outcome.synthesized) == (text, True, True)
    assert session.types()[-1] == ev.HAND_LOST
    assert session.events[-1].data["reason"] == "Unreachable"
    assert next_instance(session.state) == 2


async def test_a_record_that_says_lost_ends_the_call_without_waiting() -> None:
    session = Session(record())
    session.on_wait = [lambda: session.records.update({1: record(state="Lost", reason="PodGone")})]
    limits = replace(LIMITS, grace_s=1000.0)
    outcome = await hand(session, Proxy(Broken("reset")), limits).execute(call())
    assert outcome.content == LOST_RUNNING
    assert session.events[-1].data["reason"] == "PodGone"


async def test_after_a_loss_the_next_call_gets_the_next_instance() -> None:
    session = Session(record(state="Lost"), record(2))
    session.state = (1, "Ready")
    made = hand(session, Proxy(NotSent("x")))
    await made.execute(call())
    made._transport = Proxy(done("fresh"))  # type: ignore[assignment]
    assert (await made.execute(call(2))).content == "fresh"
    requested = [event.data for event in session.events if event.type == ev.HAND_REQUESTED]
    assert requested == [{"hand": "main", "instance": 2, "reason": "lost"}]


async def test_attach_to_an_instance_that_the_log_calls_lost_sends_nothing() -> None:
    session, proxy = Session(record()), Proxy(done())
    session.state = (1, "Lost")
    assert (await hand(session, proxy).attach(call())).content == LOST_RUNNING
    assert proxy.asked == []


async def test_a_sandbox_that_cannot_start_says_why_and_the_next_call_tries_another() -> None:
    failed = HandRecord(
        SID, "main", 1, "Failed", reason="ImagePullBackOff", message="no such image"
    )
    session = Session(failed)
    outcome = await hand(session, Proxy(done())).execute(call())
    assert "ImagePullBackOff: no such image" in outcome.content
    assert outcome.is_error
    assert next_instance(session.state) == 2


async def test_a_sandbox_that_does_not_come_says_what_it_waits_for_and_is_waited_for_again() -> (
    None
):
    session = Session(HandRecord(SID, "main", 1, "Pending", message="0/1 nodes have room"))
    made = hand(session, Proxy(done("there")))
    outcome = await made.execute(call())
    assert "within 0.05 s: 0/1 nodes have room" in outcome.content
    assert next_instance(session.state) == 1
    session.records[1] = record()
    assert (await made.execute(call())).content == "there"


@pytest.mark.parametrize(
    "forged",
    [
        record(key=SigningKey.generate()),
        record(namespace="other"),
        replace(record(), signature=""),
        replace(record(), address="10.6.6.6:1"),
        record(session_id="sesn_" + "2" * 32),
        record(owner="sesn_" + "2" * 32),
        replace(record(), instance=1, signature="x.y"),
    ],
    ids=["key", "namespace", "unsigned", "address", "session", "owner", "garbage"],
)
async def test_nothing_is_sent_to_a_sandbox_whose_record_is_not_good(forged: HandRecord) -> None:
    session, proxy = Session(forged), Proxy(done())
    outcome = await hand(session, proxy).execute(call())
    assert outcome.is_error
    assert proxy.asked == []


async def test_control_without_the_signature_check_a_forged_record_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cowhand.hands.sandbox.verify_record", lambda *a, **k: None)
    proxy = Proxy(done())
    await hand(Session(replace(record(), address="10.6.6.6:1")), proxy).execute(call())
    assert proxy.endpoints[0].address == "10.6.6.6:1"


async def test_a_rotated_key_is_fetched() -> None:
    key = SigningKey.generate()
    proxy = Proxy(done("ok"))
    proxy.newer = {key.kid: key.public}
    assert (await hand(Session(record(key=key)), proxy).execute(call())).content == "ok"


async def test_a_proxy_that_started_anew_is_found_by_its_new_record() -> None:
    session, proxy = Session(record()), Proxy(Untrusted("another certificate"), done("again"))
    made = hand(session, proxy)
    session.on_wait = [lambda: session.records.update({1: record(cert_sha256="cd")})]
    assert (await made.execute(call())).content == "again"


async def test_401_fetches_one_new_token_and_no_more() -> None:
    proxy = Proxy((401, {}), done("ok"))
    assert (await hand(Session(record()), proxy).execute(call())).content == "ok"
    assert [token for _, _, token in proxy.asked] == ["t1", "t2"]
    proxy = Proxy((401, {"error": {"type": "unauthenticated", "message": "no"}}))
    outcome = await hand(Session(record()), proxy).execute(call())
    assert outcome.is_error
    assert len(proxy.asked) == 2


async def test_a_newer_lease_ends_the_caller() -> None:
    with pytest.raises(Fenced):
        await hand(Session(record()), Proxy(FENCED)).execute(call())
    other = (409, {"error": {"type": "conflict", "message": "another input"}})
    assert (await hand(Session(record()), Proxy(other)).execute(call())).is_error


@pytest.mark.parametrize("why", [BrokerUnavailable("down"), Denied("not our lease")])
async def test_no_token_is_no_sign_of_the_sandbox(why: Exception) -> None:
    session, proxy = Session(record()), Proxy(done(), tokens=[why])
    outcome = await hand(session, proxy).execute(call())
    assert "did not run" in outcome.content
    assert session.types()[-1] == ev.HAND_PROVISIONED, "not lost"
    assert proxy.asked == []


async def test_a_call_without_a_result_in_time_is_stopped() -> None:
    session, proxy = Session(record()), Proxy(RUNNING)
    now = iter(range(0, 10_000, 5))
    made = SandboxHand("main", session, proxy, proxy, LIMITS, clock=lambda: float(next(now)))
    outcome = await made.execute(call(timeout_ms=1000))
    assert "no result within 1 s" in outcome.content
    assert proxy.methods()[-1] == "DELETE"


@pytest.mark.parametrize(
    "result", [None, 7, {}, {"content": 5}, {"content": None, "is_error": False}, ["x"]]
)
async def test_a_result_of_another_shape_is_an_error(result: Any) -> None:
    answer = (200, {"status": "done", "result": result})
    assert (await hand(Session(record()), Proxy(answer)).execute(call())).is_error


async def test_output_is_cut_and_made_printable() -> None:
    proxy = Proxy(done("a" * 1000 + "\ud800" + "z" * 1000))
    content = (await hand(Session(record()), proxy).execute(call())).content
    assert content.startswith("a" * 50)
    assert content.endswith("z" * 50)
    assert "1901 of 2001 characters left out" in content
    content.encode()


@pytest.mark.parametrize("letter", ["a", "é", "😀", "\x00", '"'])
@pytest.mark.parametrize("size", [0, 1, 29_999, 30_000, 30_001, 200_000])
def test_cut_output_always_fits_an_event(letter: str, size: int) -> None:
    payload = NewEvent(ev.TOOL_RESULT, {"content": cut_output(letter * size, 30_000)}).payload()
    assert len(payload) < MAX_BYTES
    # The limit in characters is the one that counts, however wide they are.
    assert (cut_output(letter * size, 30_000) == letter * size) == (size <= 30_000)


@pytest.mark.parametrize("letter", ["a", "é", "😀", "\x00"])
def test_cut_output_fits_an_event_whatever_the_limit_in_characters(letter: str) -> None:
    cut = cut_output(letter * 3_000_000, 2_000_000)
    assert "characters left out" in cut
    assert (
        MAX_BYTES // 2 < len(NewEvent(ev.TOOL_RESULT, {"content": cut}).payload()) < MAX_BYTES + 200
    )


async def test_parallel_calls_make_one_sandbox_and_lose_it_once() -> None:
    session, proxy = Session(record()), Proxy(NotSent("x"))
    made = hand(session, proxy)
    calls = [replace(call(), call_id=f"{SID}/toolu_{n}") for n in range(3)]
    outcomes = await asyncio.gather(*(made.execute(item) for item in calls))
    assert {outcome.content for outcome in outcomes} == {LOST_BEFORE}
    assert session.types() == [ev.HAND_REQUESTED, ev.HAND_PROVISIONED, ev.HAND_LOST]


async def test_interrupt_stops_the_call_and_never_fails() -> None:
    proxy = Proxy(done())
    made = hand(Session(record()), proxy)
    await made.interrupt("c")
    assert proxy.asked == [], "nothing to stop yet"
    await made.execute(call())
    proxy.answers = [Broken("x")]
    await made.interrupt(f"{SID}/toolu_1")
    assert proxy.asked[-1][:2] == ("DELETE", f"/v1/calls/{SID}%2Ftoolu_1")


async def test_provision_waits_and_says_why_not() -> None:
    session = Session(record())
    assert await hand(session, Proxy(done())).provision() is None
    assert session.events[0].data["reason"] == "eager"
    outcome = await hand(Session(), Proxy(done())).provision()
    assert outcome is not None
    assert "no sandbox became ready" in outcome.content


@pytest.mark.parametrize("status", [400, 403, 409, 500])
async def test_what_a_sandbox_says_in_an_error_fits_the_log(status: int) -> None:
    """Whatever runs in the sandbox can take sandboxd's place and answer anything."""
    text = "\ud800" + "x" * (4 * MAX_BYTES)
    answer = (status, {"error": {"type": "invalid", "message": text}})
    proxy, session = Proxy(answer), Session(record())
    outcome = await hand(session, proxy).execute(call())
    assert outcome.is_error
    events = [*session.events, NewEvent(ev.TOOL_RESULT, {"content": outcome.content})]
    assert all(len(event.payload()) < 8192 for event in events)
