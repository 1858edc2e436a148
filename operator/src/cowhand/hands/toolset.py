"""The built-in tools: names, definitions that Claude sees, which hand answers, how safe a repeat is.

The operator calls `request_base` once, when it freezes the agent of a session; the harness asks for
`tool_class` before each call. Names and input schemas are those of Claude's agent toolset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, Literal

from cowhand.errors import UserError

ToolClass = Literal["pure", "idempotent", "effect"]
"""`pure`: changes nothing, may run beside others; `idempotent`: may be repeated; `effect`: neither."""

Permission = Literal["Allow", "Ask", "Deny"]

PERMISSIONS: Final = ("Allow", "Ask", "Deny")

_CLASSES: Final[Mapping[str, ToolClass]] = {
    "bash": "effect",
    "edit": "effect",
    "glob": "pure",
    "grep": "pure",
    "read": "pure",
    "read_log": "pure",
    "search_log": "pure",
    "write": "effect",
}


def _tool(
    name: str, description: str, properties: dict[str, Any], required: list[str]
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {"name": name, "description": description, "input_schema": schema}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _position(description: str) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "description": description}


_TYPES: Final = {
    "type": "array",
    "items": {"type": "string"},
    "description": "Event types, for example user.message, model.response, tool.result; default what "
    "was said, done and decided.",
}

_DEFINITIONS: Final = (
    _tool(
        "bash",
        "Run a command in the sandbox's bash. The shell persists between calls: working directory, "
        "variables and functions stay. Standard output and standard error come back together; an "
        "exit status other than 0 is an error. There is no terminal: commands must not wait for input.",
        {
            "command": _text("The command to run. Needed unless restart is true."),
            "restart": {
                "type": "boolean",
                "description": "Start a new shell, for example after a command hung.",
            },
            "timeout_ms": {
                "type": "integer",
                "minimum": 1,
                "description": "Time limit in milliseconds; when it passes, the command is killed.",
            },
        },
        [],
    ),
    _tool(
        "edit",
        "Replace text in a file. The old text must occur exactly once, unless replace_all is true.",
        {
            "file_path": _text("Path of the file, absolute or relative to /workspace."),
            "old_string": _text("The text to replace, exactly as it stands in the file."),
            "new_string": _text("The text to put in its place."),
            "replace_all": {
                "type": "boolean",
                "description": "Replace every occurrence; default false.",
            },
        },
        ["file_path", "old_string", "new_string"],
    ),
    _tool(
        "glob",
        "Find files by a pattern such as **/*.py, newest first.",
        {
            "pattern": _text("The pattern; ** matches any number of directories."),
            "path": _text("Directory to look in; default /workspace."),
        },
        ["pattern"],
    ),
    _tool(
        "grep",
        "Search the contents of files for a regular expression. Answers path:line:text.",
        {
            "pattern": _text("The regular expression."),
            "path": _text("File or directory to search; default /workspace."),
        },
        ["pattern"],
    ),
    _tool(
        "read",
        "Read a file.",
        {
            "file_path": _text("Path of the file, absolute or relative to /workspace."),
            "view_range": {
                "type": "array",
                "items": {"type": "integer"},
                "minItems": 2,
                "maxItems": 2,
                "description": "First and last line, from 1; a last line of 0 or less is the end.",
            },
        },
        ["file_path"],
    ),
    _tool(
        "read_log",
        "Read events of this session's log by position: messages, your own answers, tool calls and "
        "their results, also those that are no longer in your context. Each line begins with "
        "#position and type.",
        {
            "start": _position("First position, from 1; default 1."),
            "end": _position("Last position; default the end of the log."),
            "types": _TYPES,
        },
        [],
    ),
    _tool(
        "search_log",
        "Search this session's log for a text, newest match first; upper and lower case are the same. "
        "Answers #position, type and the text around the match; read_log shows the whole event.",
        {
            "query": _text("The text to look for."),
            "before": _position("Look only before this position; default everywhere."),
            "types": _TYPES,
        },
        ["query"],
    ),
    _tool(
        "write",
        "Write a file; missing directories are made, an existing file is replaced.",
        {
            "file_path": _text("Path of the file, absolute or relative to /workspace."),
            "content": _text("The whole content of the file."),
        },
        ["file_path", "content"],
    ),
)

ALL_TOOLS: Final[tuple[str, ...]] = tuple(str(tool["name"]) for tool in _DEFINITIONS)
"""Names of the built-in tools, sorted."""


def tool_class(name: str) -> ToolClass:
    """How safe it is to run this tool beside others or twice; unknown tools are `effect`."""
    return _CLASSES.get(name, "effect")


def custom_tool(name: str, description: str, input_schema: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of a custom tool, as Claude sees it.

    Raises:
        UserError: the schema is not one of an object.
    """
    if input_schema.get("type") != "object":
        raise UserError(
            f'inputSchema of custom tool {name} must have type "object": the Messages API takes no '
            "other input",
            field=f"tools.{name}",
        )
    return {"name": name, "description": description, "input_schema": dict(input_schema)}


def request_base(
    *,
    model: str,
    max_tokens: int,
    system: str | None,
    tools: Mapping[str, str],
    custom: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The frozen part of each Messages request of a session (`session.created`, field `request`).

    Args:
        model: model id, for example `claude-opus-5-5`.
        max_tokens: limit of output tokens of one request, at least 1.
        system: system prompt; None or empty leaves `system` out.
        tools: tool name -> `Allow`, `Ask` or `Deny`. Denied tools are left out, so Claude does not
            know them.
        custom: definitions of custom tools (`custom_tool`).

    Returns:
        `{"model","max_tokens","system"?:[text block],"tools"?:[definitions, sorted by name]}`; equal
        arguments give equal JSON bytes.

    Raises:
        UserError: unknown tool or permission, empty model, or max_tokens below 1.
    """
    if not model:
        raise UserError("model must not be empty", field="model")
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}", field="max_tokens")
    for name, permission in tools.items():
        if name not in ALL_TOOLS:
            raise UserError(
                f"unknown tool {name!r}; known are {', '.join(ALL_TOOLS)}", field=f"tools.{name}"
            )
        if permission not in PERMISSIONS:
            raise UserError(
                f"permission {permission!r} of tool {name} is not one of {', '.join(PERMISSIONS)}",
                field=f"tools.{name}",
            )
    base: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    if system:
        base["system"] = [{"type": "text", "text": system}]
    offered = [tool for tool in _DEFINITIONS if tools.get(tool["name"], "Deny") != "Deny"]
    every = sorted([*offered, *custom], key=lambda tool: str(tool["name"]))
    if every:
        base["tools"] = deepcopy(every)
    return base
