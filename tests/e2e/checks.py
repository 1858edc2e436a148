"""What every log and every request sequence of an e2e test must fulfil."""

from __future__ import annotations

import itertools
import json
from typing import Any

from lab import Json

COUNT = "n=$(cat /workspace/counter 2>/dev/null || echo 0); echo $((n+1)) > /workspace/counter; cat /workspace/counter"
"""Grows a counter in /workspace by one: shows how often an effect really ran."""


def check_log(log: list[Json]) -> None:
    """The invariants of every log: dense, unique, fenced, one result for each tool_use."""
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1)), "positions are not dense"
    ids = [e["id"] for e in log]
    assert len(ids) == len(set(ids)), "an event id stands twice"
    lease = ""
    for event in log:
        if event["type"] == "session.wake":
            lease = event["lease"] or event["id"]
        elif event["lease"]:
            assert event["lease"] == lease, f"event {event['seq']} by a lease that had ended"
    uses = [
        block["id"]
        for event in log
        if event["type"] == "model.response"
        for block in event["data"]["message"]["content"]
        if block["type"] == "tool_use"
    ]
    results = [e["data"]["tool_use_id"] for e in log if e["type"] == "tool.result"]
    assert sorted(results) == sorted(uses), "a tool_use has not exactly one result"


def check_requests(requests: list[Json]) -> None:
    """Each request repeats the one before it byte for byte, or extends it."""

    def canonical(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: canonical(v) for k, v in value.items() if k != "cache_control"}
        return [canonical(v) for v in value] if isinstance(value, list) else value

    assert requests, "the model server saw no request"
    for before, after in itertools.pairwise(requests):
        old, new = before["json"]["messages"], after["json"]["messages"]
        if len(old) == len(new) and canonical(old) == canonical(new):
            assert before["body"] == after["body"], "a repeated request differs in its bytes"
        assert json.dumps(canonical(new[: len(old) - 1])) == json.dumps(
            canonical(old[: len(old) - 1])
        ), "a request does not begin with the one before"
        last_old, last_new = canonical(old[-1]), canonical(new[len(old) - 1])
        assert last_new["content"][: len(last_old["content"])] == last_old["content"]
        for part in ("system", "tools", "model"):
            assert canonical(before["json"].get(part)) == canonical(after["json"].get(part))


def final_text(log: list[Json]) -> str:
    """Text of the last response."""
    message = [e for e in log if e["type"] == "model.response"][-1]["data"]["message"]
    return "".join(b["text"] for b in message["content"] if b["type"] == "text")
