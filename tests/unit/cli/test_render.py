"""How events look on a terminal."""

from __future__ import annotations

import json

import pytest

from cowhand.cli.render import Style, calls_of, relative, render, safe
from cowhand.session import events as ev
from support.gateway_rig import T0, at, created, response, tool_use, turn, user_message

PLAIN = Style(width=90)


def raw(seq, kind, data, lease=""):
    event = at(seq, kind, data)
    payload = json.loads(event.payload)
    return {"seq": seq, "type": kind, "id": "e", "ts": event.ts, "lease": lease, "payload": payload}


def drawn(rows, style=PLAIN):
    lines, calls = [], {}
    for seq, (kind, data) in enumerate(rows, start=1):
        event = raw(seq, kind, data)
        calls |= calls_of(event)
        lines += render(event, T0 + 1000, style, calls)
    return lines


def test_a_turn():
    rows = turn()
    rows[2] = (ev.SESSION_WAKE, {})
    assert drawn(rows) == [
        "   0.00s  ◆ session   default/fix · coder · claude-opus-5-5",
        "   1.00s  ▶ user      jane: Fix the tests",
        "   2.00s  · wake      harness  holds the session, epoch",
        "   5.00s  ✻ thinking  hm",
        "          ● claude    Let me look.",
        "          ⚒ bash      pytest",
        "   8.00s  ✗ result    bash · exit 1",
        "                      │ 1 failed",
        "   10.0s  ● claude    Done.",
        "   12.0s  ■ idle      turn complete",
    ]


def test_verbose_shows_internal_events():
    lines = drawn(turn(), Style(verbose=True, width=90))
    assert "   4.00s  → model     request 1 with 1 messages" in lines
    assert "          · tokens    10 in, 5 out, 3 cached · first token 40 ms" in lines
    assert "   7.00s  · started   bash in sandbox 1" in lines


def result(content, **extra):
    return [(ev.TOOL_RESULT, {"tool_use_id": "t", "content": content, "is_error": False, **extra})]


def test_long_output_is_folded():
    output = "".join(f"line {number}\n" for number in range(41))
    assert drawn(result(output, exit_code=0, duration_ms=420)) == [
        "   0.00s  ✓ result    exit 0 · 0.42s",
        "                      │ line 0",
        "                      │ line 1",
        "                      │ line 2",
        "                      │ line 3",
        "                      │ … 37 more lines (--full)",
    ]
    assert len(drawn(result(output), Style(full=True))) == 42


def test_five_lines_are_not_folded_to_save_one():
    assert len(drawn(result("a\nb\nc\nd\ne"))) == 6


def test_a_changed_budget_names_its_limits():
    rows = [
        (ev.SESSION_UPDATED, {"budget": {"max_tokens": 9}, "actor": {"user": "jane"}}),
        (ev.SESSION_UPDATED, {"budget": None}),
    ]
    first, second = drawn(rows)
    assert "budget: max_tokens 9 by jane" in first
    assert "budget: no limits" in second


def test_what_became_of_the_context_window():
    rows = [
        (ev.CONTEXT_SELECTED, {"profile": "reset", "warning": "not made for it"}),
        (ev.CONTEXT_COMPACTED, {"block": {"type": "compaction", "content": "so far"}}),
        (ev.CONTEXT_RESET, {"notes": "my\x1b[2J notes", "continue": "c"}),
        (ev.CONTEXT_CLEARED, {"tool_use_ids": ["a", "b"]}),
    ]
    assert [line[10:] for line in drawn(rows)] == [
        "◔ context   profile reset: not made for it",
        "◔ context   summarized by the model",
        "            │ so far",
        "◔ context   new window, with the model's notes",
        "            │ my\\x1b[2J notes",
        "◔ context   2 old tool results removed",
    ]
    assert drawn([(ev.CONTEXT_SELECTED, {"profile": "plain"})]) == [], "nothing to say"


def test_long_lines_are_cut_to_the_terminal():
    (_, line) = drawn(result("x" * 500))
    assert len(line) == 90
    assert line.endswith("…")
    (_, whole) = drawn(result("x" * 500), Style(full=True, width=90))
    assert whole.endswith("x" * 500)


@pytest.mark.parametrize(
    "nasty",
    ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\x08b", "\u202egnp.exe", "\x00", "\x1b(0"],
)
def test_untrusted_text_cannot_reach_the_terminal_controls(nasty):
    rows = [
        (ev.SESSION_CREATED, {**created(), "name": nasty}),
        (ev.USER_MESSAGE, user_message(nasty)),
        (ev.MODEL_RESPONSE, response({"type": "text", "text": nasty + "x"})),
        (ev.MODEL_RESPONSE, response({"type": "thinking", "thinking": nasty})),
        (ev.MODEL_RESPONSE, response(tool_use("t", nasty, command=nasty))),
        (ev.MODEL_RESPONSE, response(tool_use("t", "bash", other={nasty: nasty}))),
        (ev.HAND_LOST, {"hand": nasty, "instance": 1, "reason": nasty, "message": nasty}),
        (ev.SESSION_ERROR, {"error": {"type": nasty, "message": nasty}}),
        (ev.SESSION_EXEC, {"actor": {"user": nasty}, "sandbox": nasty, "command": nasty}),
        (ev.TOOL_PENDING, {"tool_use_id": nasty, "name": nasty, "permission": "Ask"}),
        (ev.MODEL_REQUEST_END, {"outcome": "error", "error": {"type": nasty, "message": nasty}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": nasty}}),
        (ev.SESSION_UPDATED, {"budget": {nasty: nasty}, "actor": {"user": nasty}}),
        (nasty, {}),
        *result(nasty),
    ]
    text = "\n".join(drawn(rows, Style(full=True, verbose=True)))
    bad = {c for c in text if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c == "\u202e")}
    assert not bad
    assert len(text) > 100


def test_colours_end_where_they_begin():
    lines = drawn(turn(), Style(color=True))
    assert any("\x1b[" in line for line in lines)
    for line in lines:
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")


def test_takeover_and_loss_are_shown():
    wake = render(raw(1, ev.SESSION_WAKE, {}, "7:0123456789ab.cafe:n"), T0, PLAIN)
    assert wake == ["   1.00s  · wake      harness 01234567 holds the session, epoch 7"]
    rows = [
        (
            ev.HAND_PROVISIONED,
            {"hand": "sandbox", "instance": 2, "sandbox": "ab-sandbox-2", "waited_ms": 40},
        ),
        (
            ev.HAND_LOST,
            {"hand": "sandbox", "instance": 2, "reason": "PodGone", "message": "evicted"},
        ),
        (ev.TOOL_STARTED, {"name": "bash", "hand": "sandbox", "instance": 3, "attempt": 2}),
        (ev.TOOL_PENDING, {"tool_use_id": "toolu_9", "name": "bash", "permission": "Ask"}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "requires_action"}}),
    ]
    assert [line[10:] for line in drawn(rows)] == [
        "● hand      sandbox 2 is sandbox ab-sandbox-2, after 40 ms",
        "✗ hand      sandbox 2 lost: PodGone: evicted",
        "↻ again     bash in sandbox 3, attempt 2",
        "? approve?  bash waits for approval: toolu_9",
        "? idle      waits for an answer (`cowhand approve`, `deny` or `answer`)",
    ]


def test_events_of_a_newer_release_do_not_break_the_view():
    assert drawn([("future.event", {"x": 1})]) == []
    assert drawn([("future.event", {})], Style(verbose=True)) == [
        "   0.00s  · event     future.event"
    ]
    for kind in sorted(vars(ev)):
        value = getattr(ev, kind)
        if kind.isupper() and isinstance(value, str):
            drawn([(value, {})], Style(verbose=True))


def test_durations():
    spans = [0, 520, 12_340, 247_000, 7_500_000]
    assert [relative(ms) for ms in spans] == ["0.00s", "0.52s", "12.3s", "4m07s", "2h05m"]


def test_safe_keeps_ordinary_text():
    assert safe("äöü 日本 ✓\tx\r\ny\rz") == "äöü 日本 ✓    x\ny\nz"
