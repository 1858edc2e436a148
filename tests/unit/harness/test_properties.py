"""Whatever happens to a session: its log folds, its requests are well formed and prefixes of each other."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cowhand.harness import decide
from cowhand.harness.decide import Append, Park, RunTools, SendRequest, next_step
from cowhand.harness.fold import Conversation, fold
from cowhand.harness.request import body, prefix_sha
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from support.harness_rig import SID, check_request, created, message, text, tool_use

ACTIONS = st.lists(
    st.sampled_from(
        [
            "message", "interrupt", "allow", "deny", "suspend", "resume", "wake", "exec", "unknown",
            "answer", "tools", "pure", "ask", "mixed", "error", "fatal", "lost", "interrupted",
            "max_tokens", "cut", "cut", "refusal", "pause_turn", "window", "empty", "step", "step",
        ]
    ),
    max_size=60,
)  # fmt: skip


class Driver:
    """Carries steps out on a log of its own; an action decides how a request or a tool ends."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.conversation = Conversation(SID)
        self.requests: list[tuple[int, dict[str, Any]]] = []
        self.count = 0
        self.refused_at: list[int] = []
        self.put(NewEvent(ev.SESSION_CREATED, created(permissions={"write": "Ask"})))

    def put(self, *events: NewEvent) -> None:
        for event in events:
            made = Event(len(self.events) + 1, event.type, "", 0, "", event.payload())
            self.events.append(made)
            self.conversation.apply(made)

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def input(self, action: str) -> bool:
        actor = {"actor": {"user": "u"}}
        match action:
            case "message":
                content = [{"type": "text", "text": self.name()}]
                self.put(NewEvent(ev.USER_MESSAGE, {"content": content, **actor}))
            case "interrupt":
                self.put(NewEvent(ev.USER_INTERRUPT, actor))
            case "suspend":
                self.put(NewEvent(ev.SESSION_SUSPENDED, actor))
            case "resume":
                self.put(NewEvent(ev.SESSION_RESUMED, actor))
            case "exec":
                self.put(NewEvent(ev.SESSION_EXEC, {"command": "ls", **actor}))
            case "unknown":
                self.put(NewEvent("from.the.future", {"x": 1}))
            case "wake":
                seq = len(self.events) + 1
                self.events.append(Event(seq, ev.SESSION_WAKE, "l", 0, "l", b""))
                self.conversation.apply(self.events[-1])
            case "allow" | "deny":
                for use in self.conversation.uses:
                    data = {"tool_use_id": use.id, "result": action, **actor}
                    self.put(NewEvent(ev.USER_TOOL_CONFIRMATION, data))
            case _:
                return False
        return True

    def step(self, action: str) -> None:
        match next_step(self.conversation):
            case Append() as step:
                self.put(*step.events)
            case SendRequest() as step:
                self.request(step, action)
            case RunTools() as step:
                self.tools(step, action)

    def request(self, step: SendRequest, action: str) -> None:
        conversation = self.conversation
        prompt = conversation.prompt(step.horizon)
        base = conversation.base
        sent = json.loads(body(base, SID, step.max_tokens, prompt))
        check_request(sent) if conversation.stop_reason != "pause_turn" else None
        self.requests.append((step.max_tokens, sent))
        data = {
            "n": step.n, "attempt": step.attempt, "horizon": step.horizon,
            "prefix_sha": prefix_sha(base, SID, step.max_tokens, prompt), "n_messages": len(prompt),
        }  # fmt: skip
        self.put(NewEvent(ev.MODEL_REQUEST_START, data))
        start = len(self.events)
        if action == "lost":
            return
        outcomes = {"error": "overloaded_error", "fatal": "invalid_request_error"}
        if action in outcomes:
            error = {"type": outcomes[action], "message": "x"}
            self.end(start, "error", error=error)
        elif action == "interrupted":
            self.end(start, "interrupted")
        elif action == "cut" and not step.accept_cut:
            self.end(start, "truncated")
        else:
            data = {
                "message": self.response(action),
                "request_id": "",
                "ttft_ms": 1,
                "duration_ms": 1,
            }
            self.put(NewEvent(ev.MODEL_RESPONSE, data))
            if action == "refusal":  # also when an interrupt ends that turn
                self.refused_at.append(len(self.requests))
            self.end(start, "ok")

    def end(self, start: int, outcome: str, **more: Any) -> None:
        self.put(NewEvent(ev.MODEL_REQUEST_END, {"start": start, "outcome": outcome, **more}))

    def response(self, action: str) -> dict[str, Any]:
        match action:
            case "tools":
                return message(tool_use(self.name()), tool_use(self.name()), stop_reason="tool_use")
            case "pure":
                uses = [tool_use(self.name(), "read") for _ in range(3)]
                return message(*uses, stop_reason="tool_use")
            case "ask":
                return message(tool_use(self.name(), "write"), stop_reason="tool_use")
            case "mixed":
                uses = [
                    tool_use(self.name(), name) for name in ("read", "write", "nonsense", "bash")
                ]
                return message(text("x"), *uses, stop_reason="tool_use")
            case "cut":
                return message(tool_use(self.name()), stop_reason="max_tokens")
            case "max_tokens" | "refusal" | "pause_turn":
                return message(text("part"), stop_reason=action)
            case "window":
                return message(tool_use(self.name()), stop_reason="model_context_window_exceeded")
            case "empty":
                return message()
        return message(text("done"))

    def tools(self, step: RunTools, action: str) -> None:
        for call in step.calls:
            if call.use.id not in self.conversation.started:
                started = {
                    "tool_use_id": call.use.id, "call_id": call.use.id, "name": call.use.name,
                    "attempt": 1, "hand": call.hand, "instance": 1, "class": call.klass,
                    "timeout_ms": 1,
                }  # fmt: skip
                self.put(NewEvent(ev.TOOL_STARTED, started))
        if action == "lost":
            return
        for call in reversed(step.calls):  # parallel calls may end in any order
            result = {
                "tool_use_id": call.use.id, "content": "x", "is_error": False, "synthesized": False,
            }  # fmt: skip
            self.put(NewEvent(ev.TOOL_RESULT, result))


def drive(actions: list[str]) -> Driver:
    driver = Driver()
    for action in actions:
        if not driver.input(action):
            driver.step(action)
    return driver


@settings(max_examples=400, deadline=None)
@given(ACTIONS)
@example(["message", "refusal", "interrupt", "answer", "message", "answer"])
def test_requests_are_prefixes_of_each_other(actions: list[str]) -> None:
    driver = drive(actions)
    for number in range(1, len(driver.requests)):
        if number in driver.refused_at:
            continue  # a refused turn leaves the prompt: the only cut there is
        (_, earlier), (_, later) = driver.requests[number - 1 : number + 1]
        strip = _without_marks
        count = len(earlier["messages"])
        assert strip(later["messages"][:count]) == strip(earlier["messages"])
        for key in ("model", "system", "tools", "metadata"):
            assert earlier[key] == later[key]


def _without_marks(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_marks(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_marks(v) for key, v in value.items() if key != "cache_control"}
    return value


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_two_workers_that_fold_the_same_log_hold_the_same_state(actions: list[str]) -> None:
    driver = drive(actions)
    again = fold(SID, driver.events)
    assert again == driver.conversation
    assert next_step(again) == next_step(driver.conversation)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_a_rebuilt_request_has_the_hash_that_was_logged(actions: list[str]) -> None:
    driver = drive(actions)
    conversation = Conversation(SID)
    for event in driver.events:
        conversation.apply(event)
        if event.type == ev.MODEL_REQUEST_START:
            assert conversation.prefix_matches()


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_every_session_comes_to_rest(actions: list[str]) -> None:
    """With a model that answers and tools that run, a few steps end in a park."""
    driver = drive(actions)
    for _ in range(200):
        if isinstance(next_step(driver.conversation), Park):
            break
        driver.step("answer")
    else:
        raise AssertionError(f"no rest: {next_step(driver.conversation)}")
    conversation = driver.conversation
    if conversation.suspended or (conversation.idle or {}).get("type") == "requires_action":
        return
    assert conversation.ended
    assert not conversation.unresolved
    assert not conversation.triggered or decide.over_budget(conversation)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_each_tool_call_gets_one_result(actions: list[str]) -> None:
    driver = drive(actions)
    ids = [e.data["tool_use_id"] for e in driver.events if e.type == ev.TOOL_RESULT]
    assert len(ids) == len(set(ids))


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
def test_a_denied_or_undecided_call_never_runs(actions: list[str]) -> None:
    driver = drive(actions)
    allowed: set[str] = set()
    decided: set[str] = set()
    for event in driver.events:
        if event.type == ev.USER_TOOL_CONFIRMATION:
            use_id = event.data["tool_use_id"]
            if use_id not in decided and event.data["result"] == "allow":
                allowed.add(use_id)
            decided.add(use_id)
        if event.type == ev.TOOL_STARTED and event.data["name"] == "write":
            assert event.data["tool_use_id"] in allowed
