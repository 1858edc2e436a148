"""Scripts of sessions: their form, the choice of one, and the answer for a turn. Pure; called by `app`.

A script is `{"turns": [turn...]}`; turn N answers the request that holds N assistant messages. A built-in scenario is a
function of the request instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model_server.errors import ApiError, invalid

Json = dict[str, Any]
FAULTS = ("429", "529", "error_in_stream", "cut", "eof", "refusal")
_MARK = re.compile(r"\[\[script:([A-Za-z0-9._-]+)((?:\s+[a-z_]+=[^\s\]]+)*)\s*\]\]")
_RESULT = re.compile(r"\{\{result:(-?\d+)\}\}")
_TURN_FIELDS = {"content", "stop_reason", "gate", "gate_mid", "delay_ms", "delta_ms", "fault"}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the first `times` requests of a turn."""

    kind: str
    times: int = 1


@dataclass(frozen=True)
class Turn:
    """One answer."""

    content: list[Json]
    stop_reason: str = ""
    gate: str | None = None
    gate_mid: str | None = None
    delay_ms: int | None = None
    delta_ms: int | None = None
    fault: Fault | None = None


@dataclass(frozen=True)
class Conversation:
    """What a scenario may look at."""

    text: str
    """Text of the first user message."""
    last_text: str
    """Text of the newest user message that has one."""
    calls: list[Json]
    """Tool calls since that message: `{"name", "input", "result", "is_error"}`."""
    results: list[str]
    """All tool results, in order."""
    tools: list[str]
    """Names of the tools of the request."""
    turn: int
    """Number of assistant messages."""
    options: Mapping[str, str] = field(default_factory=dict)
    """`key=value` pairs in the script mark."""
    newest: str = ""
    """The newest tool call, its name and input."""
    whole: str = ""
    """All text, tool inputs and tool results, in order."""


Scenario = Callable[[Conversation], Turn]


def parse_script(value: Any) -> list[Turn]:
    """The turns of a script.

    Raises:
        ApiError: 400 with the path of the field.
    """
    if (
        not isinstance(value, dict)
        or set(value) != {"turns"}
        or not isinstance(value["turns"], list)
    ):
        raise invalid("", 'a script is {"turns": [...]}')
    return [_turn(turn, f"turns.{i}") for i, turn in enumerate(value["turns"])]


def _turn(value: Any, path: str) -> Turn:
    if not isinstance(value, dict) or not isinstance(value.get("content"), list):
        raise invalid(f"{path}.content", "a turn needs a list of content blocks")
    if unknown := set(value) - _TURN_FIELDS:
        raise invalid(
            f"{path}.{sorted(unknown)[0]}", f"unknown; a turn has {', '.join(sorted(_TURN_FIELDS))}"
        )
    needed = {
        "text": "text",
        "tool_use": "name",
        "thinking": "thinking",
        "redacted_thinking": "type",
    }
    for j, block in enumerate(value["content"]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in needed or needed[kind] not in block:
            raise invalid(
                f"{path}.content.{j}", f"a block is one of {', '.join(needed)}, with its fields"
            )
    for key in ("delay_ms", "delta_ms"):
        if not isinstance(value.get(key, 0), int) or value.get(key, 0) < 0:
            raise invalid(f"{path}.{key}", "must be a number of milliseconds")
    fault = value.get("fault")
    if fault is not None:
        if not isinstance(fault, dict) or fault.get("kind") not in FAULTS:
            raise invalid(f"{path}.fault.kind", f"must be one of {', '.join(FAULTS)}")
        fault = Fault(fault["kind"], int(fault.get("times", 1)))
    return Turn(**{**value, "fault": fault})


def conversation(body: Json) -> Conversation:
    """What the request tells a scenario; the request is a valid one."""
    texts: list[str] = []
    calls: dict[str, Json] = {}
    results: list[str] = []
    turn, newest = 0, ""
    whole: list[str] = []
    for message in body["messages"]:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turn += message["role"] == "assistant"
        for block in blocks:
            if block["type"] == "tool_use":
                calls[block["id"]] = {"name": block["name"], "input": block["input"]}
                newest = f"{block['name']} {json.dumps(block['input'])}"
                whole.append(newest)
            elif block["type"] == "tool_result":
                result = _text(block.get("content", ""))
                results.append(result)
                whole.append(result)
                call = calls.setdefault(block["tool_use_id"], {})
                call.update(result=result, is_error=bool(block.get("is_error")))
            elif block["type"] == "compaction":
                # A script goes on behind a summary, which begins with the first message.
                texts.append(block["content"])
        text = "\n".join(b["text"] for b in blocks if b["type"] == "text")
        whole.append(text)
        if message["role"] == "user" and text:
            texts.append(text)
            calls = {k: c for k, c in calls.items() if not c.get("result") and "result" not in c}
    first = texts[0] if texts else ""
    return Conversation(
        text=first,
        last_text=texts[-1] if texts else "",
        calls=[c for c in calls.values() if "result" in c],
        results=results,
        tools=[t["name"] for t in body.get("tools") or []],
        turn=turn,
        options=_options(first),
        newest=newest,
        whole="\n".join([*texts[:1], *whole]),
    )


def script_name(text: str) -> str | None:
    """NAME of `[[script:NAME]]` in the first user message."""
    match = _MARK.search(text)
    return match.group(1) if match else None


def _options(text: str) -> dict[str, str]:
    match = _MARK.search(text)
    return dict(pair.split("=", 1) for pair in match.group(2).split()) if match else {}


def plain(text: str) -> str:
    """A message without its script mark."""
    return _MARK.sub("", text).strip()


def scripted(turns: list[Turn], name: str, talk: Conversation) -> Turn:
    """The turn of a script, with results filled in."""
    if talk.turn >= len(turns):
        return Turn([{"type": "text", "text": f"The script {name} has no turn {talk.turn}."}])
    turn = turns[talk.turn]
    return Turn(**{**vars(turn), "content": _fill(turn.content, talk.results)})


def stop_reason(turn: Turn) -> str:
    """The stop reason of a turn: its own, or what its blocks mean."""
    if turn.stop_reason:
        return turn.stop_reason
    return "tool_use" if any(b["type"] == "tool_use" for b in turn.content) else "end_turn"


def _fill(value: Any, results: list[str]) -> Any:
    if isinstance(value, list):
        return [_fill(v, results) for v in value]
    if isinstance(value, dict):
        return {k: _fill(v, results) for k, v in value.items()}
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        try:
            return results[int(match.group(1))]
        except IndexError:
            raise ApiError(
                500,
                "api_error",
                f"the script asks for {match.group(0)}, and there are {len(results)} results",
            ) from None

    return _RESULT.sub(one, value)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)
