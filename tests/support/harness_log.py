"""A log written by hand, as workers would write it: for tests of what a harness decides."""

from __future__ import annotations

from typing import Any

from cowhand.harness import decide
from cowhand.harness.decide import Append, SendRequest, next_step
from cowhand.harness.fold import Conversation, fold
from cowhand.harness.request import prefix_sha
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from support.harness_rig import SID, created, message, user

ACTOR = {"actor": {"user": "u"}}


class Log:
    """Writes a log as workers would."""

    def __init__(self, **options: Any) -> None:
        self.events: list[Event] = []
        self.now = 0
        self.put(NewEvent(ev.SESSION_CREATED, created(**options)))

    def put(self, *events: NewEvent) -> Log:
        for event in events:
            seq = len(self.events) + 1
            self.events.append(Event(seq, event.type, event.id, self.now, "", event.payload()))
        return self

    def wake(self, times: int = 1) -> Log:
        for _ in range(times):
            self.events.append(Event(len(self.events) + 1, ev.SESSION_WAKE, "l", 0, "l", b""))
        return self

    def say(self, value: str = "go") -> Log:
        return self.put(user(value))

    def interrupt(self) -> Log:
        return self.put(NewEvent(ev.USER_INTERRUPT, ACTOR))

    def confirm(self, use_id: str, result: str, **more: Any) -> Log:
        data = {"tool_use_id": use_id, "result": result, **more, **ACTOR}
        return self.put(NewEvent(ev.USER_TOOL_CONFIRMATION, data))

    def start(self) -> Log:
        conversation = self.fold()
        step = next_step(conversation)
        assert isinstance(step, SendRequest), step
        prompt = conversation.prompt(step.horizon)
        sha = prefix_sha(conversation.base, SID, step.max_tokens, prompt)
        data = {
            "n": step.n, "attempt": step.attempt, "horizon": step.horizon,
            "prefix_sha": sha, "n_messages": len(prompt),
        }  # fmt: skip
        if step.max_tokens != conversation.wanted_tokens:
            data["max_tokens"] = step.max_tokens
        return self.put(NewEvent(ev.MODEL_REQUEST_START, data))

    def end(self, outcome: str, **more: Any) -> Log:
        return self.put(NewEvent(ev.MODEL_REQUEST_END, {"start": 1, "outcome": outcome, **more}))

    def fail(self, kind: str, **more: Any) -> Log:
        return self.start().end("error", error={"type": kind, "message": "why", **more})

    def answer(self, *content: dict[str, Any], stop_reason: str = "end_turn", **more: Any) -> Log:
        said = message(*content, stop_reason=stop_reason, **more)
        data = {"message": said, "request_id": "", "ttft_ms": 1, "duration_ms": 1}
        return self.start().put(NewEvent(ev.MODEL_RESPONSE, data)).end("ok")

    def tools(self, *uses: dict[str, Any]) -> Log:
        return self.answer(*uses, stop_reason="tool_use")

    def started(self, use_id: str, instance: int = 1) -> Log:
        data = {
            "tool_use_id": use_id, "call_id": use_id, "name": "bash", "attempt": 1, "hand": "main",
            "instance": instance, "class": "effect", "timeout_ms": 1,
        }  # fmt: skip
        return self.put(NewEvent(ev.TOOL_STARTED, data))

    def result(self, use_id: str, content: str = "ok") -> Log:
        data = {"tool_use_id": use_id, "content": content, "is_error": False, "synthesized": False}
        return self.put(NewEvent(ev.TOOL_RESULT, data))

    def do(self) -> Log:
        """Append what the next step wants appended."""
        step = next_step(self.fold())
        assert isinstance(step, Append), step
        return self.put(*step.events)

    def fold(self) -> Conversation:
        return fold(SID, self.events)

    def step(self) -> decide.Step:
        return next_step(self.fold())
