"""Refuses what the real Messages API refuses, naming the path of the field. Called by `app` for each request.

Source of the rules: the Messages API reference and its documented 400s. The order is that of the real API: the shape of
the body first, then the conversation.
"""

from __future__ import annotations

import re
from typing import Any

from model_server.errors import invalid
from model_server.signatures import sign, sign_summary

Json = dict[str, Any]
MAX_BREAKPOINTS = 4

_TOP = {
    *(
        "model",
        "max_tokens",
        "messages",
        "cache_control",
        "container",
        "diagnostics",
        "inference_geo",
    ),
    *("metadata", "output_config", "service_tier", "speed", "stop_sequences", "system", "thinking"),
    *("tool_choice", "tools", "stream", "user_profile_id", "workspace_id"),
}
_GONE = frozenset({"temperature", "top_p", "top_k"})
_BLOCKS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # type: required fields, optional fields
    "text": (frozenset({"text"}), frozenset({"cache_control", "citations"})),
    "image": (frozenset({"source"}), frozenset({"cache_control"})),
    "document": (
        frozenset({"source"}),
        frozenset({"cache_control", "citations", "context", "title"}),
    ),
    "tool_use": (
        frozenset({"id", "name", "input"}),
        frozenset({"cache_control", "caller", "toolset_name"}),
    ),
    "tool_result": (
        frozenset({"tool_use_id"}),
        frozenset({"content", "is_error", "cache_control", "toolset_name"}),
    ),
    "thinking": (frozenset({"thinking", "signature"}), frozenset()),
    "redacted_thinking": (frozenset({"data"}), frozenset()),
    "compaction": (frozenset({"content", "signature"}), frozenset({"cache_control"})),
}
_ROLE_BLOCKS = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "tool_use", "thinking", "redacted_thinking", "compaction"},
    "system": {"text"},
}
_STRINGS = ("text", "thinking", "signature", "data", "id", "name", "tool_use_id")
_TOOL = frozenset(
    {
        *(
            "name",
            "input_schema",
            "description",
            "type",
            "cache_control",
            "strict",
            "defer_loading",
        ),
        *("eager_input_streaming", "input_examples", "allowed_callers"),
    }
)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


COMPACTION_BETA = "compact-2026-09-04"
MANAGEMENT_BETA = "context-management-2025-06-27"
_BETA_FIELDS = {"compaction": COMPACTION_BETA, "context_management": MANAGEMENT_BETA}
_EDIT = "clear_tool_uses_20250919"


def validate(body: Any, betas: frozenset[str] = frozenset()) -> Json:
    """The request if the API would take it.

    Args:
        body: the decoded body.
        betas: values of the header `anthropic-beta`.

    Raises:
        ApiError: 400 with the path of the field.
    """
    if not isinstance(body, dict):
        raise invalid("", "the request body must be a JSON object")
    for key in body:
        if key in _GONE:
            raise invalid(
                key, f"`{key}` is no longer supported; remove it. Extra inputs are not permitted"
            )
        if key not in _TOP and _BETA_FIELDS.get(key) not in betas:
            raise invalid(key, "Extra inputs are not permitted")
    for key in ("model", "max_tokens", "messages"):
        if key not in body:
            raise invalid(key, "Field required")
    _scalars(body)
    _beta_fields(body)
    _system(body.get("system"))
    _tools(body.get("tools"))
    _messages(body["messages"])
    _breakpoints(body)
    _compactions(body, betas)
    _conversation(body)
    return body


def _beta_fields(body: Json) -> None:
    compaction, management = body.get("compaction"), body.get("context_management")
    if compaction is not None:
        if not isinstance(compaction, dict) or compaction.get("type") != "summarize":
            raise invalid("compaction.type", "Input should be 'summarize'")
        _fields(compaction, "compaction", frozenset({"type"}), frozenset({"instructions"}))
        if management is not None:
            raise invalid("compaction", "cannot be combined with `context_management`")
    if management is None:
        return
    if not isinstance(management, dict) or not isinstance(management.get("edits"), list):
        raise invalid("context_management.edits", "Input should be a list")
    for i, edit in enumerate(management["edits"]):
        _clear_edit(edit, f"context_management.edits.{i}")


def _clear_edit(edit: Any, path: str) -> None:
    if not isinstance(edit, dict) or edit.get("type") != _EDIT:
        raise invalid(f"{path}.type", f"this server knows {_EDIT} only")
    limits = {
        "trigger": ("input_tokens", "tool_uses"),
        "keep": ("tool_uses",),
        "clear_at_least": ("input_tokens",),
    }
    _fields(edit, path, frozenset({"type"}), frozenset(limits))
    for key, kinds in limits.items():
        value = edit.get(key)
        if value is None:
            continue
        if not isinstance(value, dict) or value.get("type") not in kinds:
            raise invalid(f"{path}.{key}.type", f"Input should be one of {', '.join(kinds)}")
        _positive(value.get("value"), f"{path}.{key}.value", at_least=0)


def _compactions(body: Json, betas: frozenset[str]) -> None:
    """At most one compaction block, the first block of all, made for this system prompt and these tools."""
    for i, message in enumerate(body["messages"]):
        blocks = [] if isinstance(message["content"], str) else message["content"]
        for j, block in enumerate(blocks):
            if block["type"] != "compaction":
                continue
            path = f"messages.{i}.content.{j}"
            if COMPACTION_BETA not in betas:
                raise invalid(path, f"compaction blocks need the beta {COMPACTION_BETA}")
            if (i, j) != (0, 0):
                raise invalid(path, "a compaction block must be the first block of the messages")
            if block["signature"] != sign_summary(body, block["content"]):
                raise invalid(
                    f"{path}.compaction.signature",
                    "Invalid `signature` in `compaction` block: the block, the system prompt or the tools were altered",
                )


def merged(messages: list[Json]) -> list[Json]:
    """Messages with string content made blocks, and neighbours of one role made one turn, as the API reads them."""
    turns: list[Json] = []
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": message["role"], "content": blocks})
    return turns


def _scalars(body: Json) -> None:
    if not isinstance(body["model"], str) or not body["model"]:
        raise invalid("model", "Input should be a valid string")
    _positive(body["max_tokens"], "max_tokens")
    if not isinstance(body.get("stream", False), bool):
        raise invalid("stream", "Input should be a valid boolean")
    metadata = body.get("metadata", {})
    if not isinstance(metadata, dict):
        raise invalid("metadata", "Input should be an object")
    for key, value in metadata.items():
        if key != "user_id":
            raise invalid(f"metadata.{key}", "Extra inputs are not permitted")
        if value is not None and not isinstance(value, str):
            raise invalid("metadata.user_id", "Input should be a valid string")
    thinking = body.get("thinking")
    if thinking is None:
        return
    kinds = ("enabled", "disabled", "adaptive", "between_tools")
    if not isinstance(thinking, dict) or thinking.get("type") not in kinds:
        raise invalid("thinking.type", f"Input should be one of {', '.join(kinds)}")
    if thinking["type"] == "enabled":
        _positive(thinking.get("budget_tokens"), "thinking.enabled.budget_tokens", at_least=1024)
        if thinking["budget_tokens"] >= body["max_tokens"]:
            raise invalid("max_tokens", "must be greater than `thinking.budget_tokens`")


def _positive(value: object, path: str, at_least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(path, "Input should be a valid integer")
    if value < at_least:
        raise invalid(path, f"Input should be greater than or equal to {at_least}")


def _system(system: Any) -> None:
    if system is None or isinstance(system, str):
        return
    if not isinstance(system, list):
        raise invalid("system", "Input should be a string or a list of text blocks")
    for i, block in enumerate(system):
        _block(block, f"system.{i}", {"text"})


def _tools(tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise invalid("tools", "Input should be a list")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise invalid(f"tools.{i}", "Input should be an object")
        if tool.get("type") not in (None, "custom"):
            raise invalid(
                f"tools.{i}.type", f"{tool['type']!r}: this server knows custom tools only"
            )
        _tool(tool, f"tools.{i}.custom")
        if tool["name"] in names:
            raise invalid("tools", f"Tool names must be unique; {tool['name']!r} is given twice")
        names.add(tool["name"])


def _tool(tool: Json, path: str) -> None:
    _fields(tool, path, frozenset({"name", "input_schema"}), _TOOL)
    if not isinstance(tool["name"], str) or not _NAME.fullmatch(tool["name"]):
        raise invalid(f"{path}.name", "String should match pattern '^[a-zA-Z0-9_-]{1,128}$'")
    schema = tool["input_schema"]
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise invalid(f"{path}.input_schema.type", "Input should be 'object'")
    if not isinstance(tool.get("description", ""), str):
        raise invalid(f"{path}.description", "Input should be a valid string")
    _cache_control(tool, path)


def _fields(value: Json, path: str, required: frozenset[str], optional: frozenset[str]) -> None:
    for key in sorted(required):
        if key not in value:
            raise invalid(f"{path}.{key}", "Field required")
    for key in value:
        if key not in required and key not in optional:
            raise invalid(f"{path}.{key}", "Extra inputs are not permitted")


def _messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise invalid("messages", "Input should be a list")
    if not messages:
        raise invalid("messages", "at least one message is required")
    for i, message in enumerate(messages):
        _message(message, f"messages.{i}")


def _message(message: Any, path: str) -> None:
    if not isinstance(message, dict):
        raise invalid(path, "Input should be an object")
    _fields(message, path, frozenset({"role", "content"}), frozenset())
    role, content = message["role"], message["content"]
    if role not in _ROLE_BLOCKS:
        raise invalid(f"{path}.role", "Input should be 'user', 'assistant' or 'system'")
    if isinstance(content, str):
        if not content.strip():
            raise invalid(f"{path}.content", "text content must be non-empty")
        return
    if not isinstance(content, list):
        raise invalid(f"{path}.content", "Input should be a string or a list of content blocks")
    if not content:
        raise invalid(f"{path}.content", "all messages must have non-empty content")
    for j, block in enumerate(content):
        _block(block, f"{path}.content.{j}", _ROLE_BLOCKS[role])


def _block(block: Any, path: str, allowed: set[str]) -> None:
    if not isinstance(block, dict):
        raise invalid(path, "Input should be an object")
    kind = block.get("type")
    if kind not in _BLOCKS or kind not in allowed:
        raise invalid(
            f"{path}.type", f"{kind!r}: Input should be one of {', '.join(sorted(allowed))}"
        )
    required, optional = _BLOCKS[kind]
    path = f"{path}.{kind}"
    _fields(block, path, required, optional | {"type"})
    for key in _STRINGS:
        if key in block and not isinstance(block[key], str):
            raise invalid(f"{path}.{key}", "Input should be a valid string")
    _cache_control(block, path)
    if kind == "text" and not block["text"].strip():
        if block.get("cache_control"):
            raise invalid(f"{path}.cache_control", "cannot be set for empty text blocks")
        raise invalid(f"{path}.text", "text content blocks must be non-empty")
    if kind == "tool_use":
        _tool_use(block, path)
    if kind == "tool_result":
        _tool_result(block, path)


def _cache_control(owner: Json, path: str) -> None:
    control = owner.get("cache_control")
    if control is None:
        return
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise invalid(f"{path}.cache_control.type", "Input should be 'ephemeral'")
    if control.get("ttl", "5m") not in ("5m", "1h"):
        raise invalid(f"{path}.cache_control.ephemeral.ttl", "Input should be '5m' or '1h'")


def _tool_use(block: Json, path: str) -> None:
    if not isinstance(block["input"], dict):
        raise invalid(f"{path}.input", "Input should be a valid dictionary")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", block["id"]):
        raise invalid(f"{path}.id", "String should match pattern '^[a-zA-Z0-9_-]+$'")
    if "caller" in block and not isinstance(block["caller"], dict):
        raise invalid(f"{path}.caller", "Input should be an object")


def _tool_result(block: Json, path: str) -> None:
    if not isinstance(block.get("is_error", False), bool):
        raise invalid(f"{path}.is_error", "Input should be a valid boolean")
    content = block.get("content", "")
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise invalid(f"{path}.content", "Input should be a string or a list of content blocks")
    for i, part in enumerate(content):
        _block(part, f"{path}.content.{i}", {"text", "image", "document"})


def _breakpoints(body: Json) -> None:
    """Count of all `cache_control` marks, wherever they are."""

    def marks(value: Any) -> int:
        if isinstance(value, list):
            return sum(marks(v) for v in value)
        if not isinstance(value, dict):
            return 0
        inner = sum(marks(v) for k, v in value.items() if k not in ("input", "input_schema"))
        return inner + bool(value.get("cache_control"))

    _cache_control(body, "")
    count = bool(body.get("cache_control")) + sum(
        marks(body.get(k)) for k in ("tools", "system", "messages")
    )
    if count > MAX_BREAKPOINTS:
        raise invalid(
            "",
            f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {count}.",
        )


def _conversation(body: Json) -> None:
    messages = body["messages"]
    first = messages[0]["content"]
    compacted = not isinstance(first, str) and first[0]["type"] == "compaction"
    if messages[0]["role"] != "user" and not compacted:
        raise invalid("messages.0.role", 'the first message must use the "user" role')
    _system_places(messages)
    if messages[-1]["role"] == "assistant" and "compaction" not in body:
        raise invalid(
            f"messages.{len(messages) - 1}",
            "This model does not support assistant message prefill. The conversation must end with a user message.",
        )
    without_system = [m for m in messages if m["role"] != "system"]
    turns = merged(without_system)
    _pairs(turns)
    _signatures(body, merged(messages))


def _system_places(messages: list[Json]) -> None:
    for i, message in enumerate(messages):
        if message["role"] != "system":
            continue
        if messages[i - 1]["role"] == "assistant":
            raise invalid(
                f"messages.{i}", "a system message must not directly follow an assistant message"
            )
        if i + 1 < len(messages) and messages[i + 1]["role"] == "user":
            raise invalid(
                f"messages.{i}", "a system message must not directly precede a user message"
            )


def _pairs(turns: list[Json]) -> None:
    """Every tool_use has exactly one tool_result at the beginning of the next turn, and the other way round."""
    seen: set[str] = set()
    waiting: list[str] = []
    for i, turn in enumerate(turns):
        path = f"messages.{i}"
        if turn["role"] == "user":
            _answered(turn["content"], waiting, path, turns_before=i)
            waiting = []
            continue
        for block in turn["content"]:
            if block["type"] == "tool_use":
                if block["id"] in seen:
                    raise invalid(
                        "messages", f"`tool_use` ids must be unique; {block['id']} is used twice"
                    )
                seen.add(block["id"])
                waiting.append(block["id"])


def _answered(content: list[Json], waiting: list[str], path: str, turns_before: int) -> None:
    answered: list[str] = []
    leading = True
    for j, block in enumerate(content):
        if block["type"] != "tool_result":
            leading = False
            continue
        result_id = block["tool_use_id"]
        if result_id not in waiting:
            raise invalid(
                f"{path}.content.{j}",
                f"unexpected `tool_use_id` found in `tool_result` blocks: {result_id}. Each `tool_result` block must"
                " have a corresponding `tool_use` block in the previous message.",
            )
        if result_id in answered:
            raise invalid(
                f"{path}.content.{j}",
                "each tool_use must have a single result. Found multiple `tool_result` blocks with id:"
                f" {result_id}",
            )
        if leading:
            answered.append(result_id)
    if missing := [w for w in waiting if w not in answered]:
        raise invalid(
            f"messages.{turns_before - 1}",
            "`tool_use` ids were found without `tool_result` blocks immediately after:"
            f" {', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block in the next"
            " message.",
        )


def _signatures(body: Json, turns: list[Json]) -> None:
    for i, turn in enumerate(turns):
        for j, block in enumerate(turn["content"]):
            if block["type"] not in ("thinking", "redacted_thinking"):
                continue
            field = "signature" if block["type"] == "thinking" else "data"
            expected = sign(body, turns[:i], turn["content"][:j], block.get("thinking", ""))
            if block[field] != expected:
                raise invalid(
                    f"messages.{i}.content.{j}.{block['type']}.{field}",
                    f"Invalid `{field}` in `{block['type']}` block: the block, or something before it, was altered,"
                    " moved or left out",
                )
