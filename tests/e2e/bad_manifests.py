"""Wrong manifests and what their refusal must say: data for the unit tests and for a real API server."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

API = "cowhand.dev/v1alpha1"

_CUSTOM: Json = {
    "name": "search",
    "type": "Custom",
    "description": "Searches.",
    "inputSchema": {"type": "object"},
}

GOOD: dict[str, Json] = {
    "Agent": {
        "model": {"id": "claude-sonnet-5", "maxTokens": 4096, "secretRef": {"name": "my-key"}},
        "system": "You fix tests.",
        "tools": [
            {"name": "bash", "permission": "Ask"},
            {"name": "read"},
            {
                "name": "lookup",
                "type": "Custom",
                "description": "Looks up a ticket.",
                "inputSchema": {"type": "object", "properties": {"id": {"type": "string"}}},
            },
        ],
        "hands": [{"name": "sandbox", "sandbox": {"provisioning": "Eager"}}],
    },
    "Environment": {
        "image": "registry.example/sandbox:1",
        "resources": {"cpu": 1, "memory": "512Mi", "ephemeralStorage": "1.5Gi"},
        "runtimeClassName": "gvisor",
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "env": [{"name": "LANG", "value": "C.UTF-8"}],
        "networking": {"type": "None"},
        "idleTimeoutSeconds": 600,
    },
    "AgentSession": {
        "agent": {"model": {"id": "claude-sonnet-5", "baseURL": "https://gw.example:8443/claude"}},
        "environmentRef": {"name": "small"},
        "message": "Make the failing tests pass.",
        "resources": [
            {
                "configMap": {"name": "repo", "items": [{"key": "a", "path": "src/a.py"}]},
                "mountPath": "/workspace/repo",
            }
        ],
        "budget": {
            "maxTokens": 100000,
            "maxToolCalls": 20,
            "maxCost": "2.50",
            "maxDurationSeconds": 3600,
        },
        "runID": "2026-11",
    },
    "Sandbox": {
        "environment": {"resources": {"cpu": "500m"}},
        "holder": {"sessionID": "sesn_" + "0a" * 16, "hand": "sandbox", "instance": 1},
        "ttlSecondsAfterCreation": 3600,
    },
}
"""kind -> a spec that is right and uses most fields."""


def manifest(kind: str, spec: Json, name: str = "probe") -> Json:
    """A whole object."""
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec}


@dataclass(frozen=True)
class Bad:
    """One wrong manifest.

    Attributes:
        name: id of the test case.
        manifest: the whole object.
        field: path that the refusal must name.
        text: another part of the refusal, empty for none.
        rule: True if a CEL rule refuses it: a JSON schema alone cannot.
        unknown: True if it is refused only because the member does not exist (strict validation).
    """

    name: str
    manifest: Json
    field: str
    text: str = ""
    rule: bool = False
    unknown: bool = False


DROP = object()


def _edit(kind: str, path: str, value: object) -> Json:
    """The good object of a kind with one member replaced, added or dropped."""
    whole = manifest(kind, copy.deepcopy(GOOD[kind]))
    node: Any = whole["spec"]
    *way, last = path.split(".")
    for step in way:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if value is DROP:
        del node[last]
    elif isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return whole


def _case(
    name: str, kind: str, path: str, value: object, field: str, text: str = "", **kinds: bool
) -> Bad:
    return Bad(name, _edit(kind, path, value), field, text, **kinds)


_HAND = {"name": "sandbox", "sandbox": {}}
_FILE = {"configMap": {"name": "repo"}, "mountPath": "/workspace/repo"}
_TWICE = [{"id": "a", "content": "x"}, {"id": "a", "content": "y"}]

BAD: tuple[Bad, ...] = (
    # Agent
    _case("agent-without-model", "Agent", "model", DROP, "spec.model", "Required"),
    _case("model-without-id", "Agent", "model.id", DROP, "spec.model.id", "Required"),
    _case("empty-model-id", "Agent", "model.id", "", "spec.model.id"),
    _case("model-id-with-space", "Agent", "model.id", "claude sonnet", "spec.model.id"),
    _case("max-tokens-zero", "Agent", "model.maxTokens", 0, "spec.model.maxTokens", "greater than"),
    _case("max-tokens-huge", "Agent", "model.maxTokens", 128_001, "spec.model.maxTokens"),
    _case("max-tokens-text", "Agent", "model.maxTokens", "many", "spec.model.maxTokens", "integer"),
    _case("base-url-ftp", "Agent", "model.baseURL", "ftp://models.example", "spec.model.baseURL"),
    _case(
        "base-url-query", "Agent", "model.baseURL", "https://m.example/?a=1", "spec.model.baseURL"
    ),
    _case(
        "base-url-login", "Agent", "model.baseURL", "https://u:p@m.example", "spec.model.baseURL"
    ),
    _case("secret-name", "Agent", "model.secretRef.name", "My_Key", "spec.model.secretRef.name"),
    _case(
        "unknown-tool",
        "Agent",
        "tools.0.name",
        "browser",
        "spec.tools[0].name",
        "must be one of bash",
        rule=True,
    ),
    _case(
        "custom-tool-name-taken",
        "Agent",
        "tools.1",
        {**_CUSTOM, "name": "grep"},
        "spec.tools[1].name",
        "choose another name",
        rule=True,
    ),
    _case(
        "custom-tool-without-schema",
        "Agent",
        "tools.1",
        {"name": "search", "type": "Custom", "description": "Looks up."},
        "spec.tools[1]",
        "needs description and inputSchema",
        rule=True,
    ),
    _case(
        "custom-tool-permission",
        "Agent",
        "tools.1",
        {**_CUSTOM, "permission": "Ask"},
        "spec.tools[1].permission",
        "leave permission out",
        rule=True,
    ),
    _case(
        "built-in-tool-description",
        "Agent",
        "tools.0.description",
        "Mine.",
        "spec.tools[0]",
        "are for type Custom",
        rule=True,
    ),
    _case("tool-name", "Agent", "tools.1", {**_CUSTOM, "name": "look up"}, "spec.tools[1].name"),
    _case("unknown-permission", "Agent", "tools.0.permission", "Maybe", "spec.tools[0].permission"),
    _case("tool-twice", "Agent", "tools", [{"name": "bash"}] * 2, "spec.tools[1]", "Duplicate"),
    _case(
        "two-hands",
        "Agent",
        "hands",
        [_HAND, {**_HAND, "name": "second"}],
        "spec.hands",
        "one hand in this version",
        rule=True,
    ),
    _case("hand-name", "Agent", "hands.0.name", "Not A Label", "spec.hands[0].name"),
    _case("hand-name-long", "Agent", "hands.0.name", "h" * 21, "spec.hands[0].name", "Too long"),
    _case("hand-without-kind", "Agent", "hands.0.sandbox", DROP, "spec.hands[0].sandbox"),
    _case("system-too-long", "Agent", "system", "x" * 100_001, "spec.system", "Too long"),
    _case("agent-typo", "Agent", "sytem", "You fix tests.", "spec.sytem", unknown=True),
    # Environment
    _case("cpu-words", "Environment", "resources.cpu", "plenty", "spec.resources.cpu"),
    _case("memory-negative", "Environment", "resources.memory", "-1Gi", "spec.resources.memory"),
    _case("image-space", "Environment", "image", "my image", "spec.image"),
    _case("runtime-class", "Environment", "runtimeClassName", "g Visor", "spec.runtimeClassName"),
    _case(
        "env-cowhand",
        "Environment",
        "env.0.name",
        "COWHAND_TOKEN",
        "spec.env[0].name",
        "reserved",
        rule=True,
    ),
    _case(
        "env-sandboxd",
        "Environment",
        "env.0.name",
        "SANDBOXD_PORT",
        "spec.env[0].name",
        "reserved",
        rule=True,
    ),
    _case("env-name", "Environment", "env.0.name", "1ST", "spec.env[0].name"),
    _case("env-without-value", "Environment", "env.0.value", DROP, "spec.env[0].value", "Required"),
    _case(
        "networking-open",
        "Environment",
        "networking.type",
        "Unrestricted",
        "spec.networking.type",
        "no egress in this version",
        rule=True,
    ),
    _case(
        "networking-hosts",
        "Environment",
        "networking.allowedHosts",
        ["pypi.example"],
        "spec.networking.allowedHosts",
        "no egress in this version",
        rule=True,
    ),
    _case("idle-too-short", "Environment", "idleTimeoutSeconds", 1, "spec.idleTimeoutSeconds"),
    _case("startup-zero", "Environment", "startupTimeoutSeconds", 0, "spec.startupTimeoutSeconds"),
    # AgentSession
    _case(
        "session-without-agent",
        "AgentSession",
        "agent",
        DROP,
        "spec",
        "exactly one of agentRef, agent and fork",
        rule=True,
    ),
    _case(
        "session-with-two-agents",
        "AgentSession",
        "agentRef",
        {"name": "other"},
        "spec",
        "exactly one of agentRef, agent and fork",
        rule=True,
    ),
    _case(
        "session-with-two-environments",
        "AgentSession",
        "environment",
        {"image": "x"},
        "spec",
        "at most one of environmentRef and environment",
        rule=True,
    ),
    _case(
        "session-without-message",
        "AgentSession",
        "message",
        DROP,
        "spec",
        "one of message and messages must be set",
        rule=True,
    ),
    _case(
        "fork-with-an-agent",
        "AgentSession",
        "fork",
        {"session": "one", "at": 4},
        "spec",
        "exactly one of agentRef, agent and fork",
        rule=True,
    ),
    Bad(
        "fork-with-environment",
        manifest("AgentSession", {"fork": {"session": "one"}, "environmentRef": {"name": "a"}}),
        "spec",
        "a fork has the environment and resources of its source",
        rule=True,
    ),
    Bad(
        "fork-of-another-namespace",
        manifest("AgentSession", {"fork": {"session": "other/one"}}),
        "spec.fork.session",
        "should match",
    ),
    Bad(
        "fork-at-nothing",
        manifest("AgentSession", {"fork": {"session": "one", "at": 0}}),
        "spec.fork.at",
        "greater than or equal to 1",
    ),
    _case(
        "session-with-message-and-messages",
        "AgentSession",
        "messages",
        [{"id": "a", "content": "hello"}],
        "spec",
        "at most one of message and messages",
        rule=True,
    ),
    _case("empty-message", "AgentSession", "message", "", "spec.message"),
    _case("message-too-long", "AgentSession", "message", "x" * 100_001, "spec.message", "Too long"),
    Bad(
        "message-id-twice",
        manifest("AgentSession", {"agentRef": {"name": "a"}, "messages": _TWICE}),
        "spec.messages[1]",
        "Duplicate",
    ),
    Bad(
        "message-without-content",
        manifest("AgentSession", {"agentRef": {"name": "a"}, "messages": [{"id": "a"}]}),
        "spec.messages[0].content",
        "Required",
    ),
    Bad(
        "no-messages",
        manifest("AgentSession", {"agentRef": {"name": "a"}, "messages": []}),
        "spec.messages",
    ),
    _case(
        "mount-outside",
        "AgentSession",
        "resources.0.mountPath",
        "/etc",
        "spec.resources[0].mountPath",
    ),
    _case(
        "mount-beside",
        "AgentSession",
        "resources.0.mountPath",
        "/workspaces",
        "spec.resources[0].mountPath",
    ),
    _case(
        "mount-dot-dot",
        "AgentSession",
        "resources.0.mountPath",
        "/workspace/../etc",
        "spec.resources[0].mountPath",
        "must not contain ..",
        rule=True,
    ),
    _case(
        "item-dot-dot",
        "AgentSession",
        "resources.0.configMap.items.0.path",
        "../a.py",
        "spec.resources[0].configMap.items[0].path",
        "must not contain ..",
        rule=True,
    ),
    _case(
        "item-absolute",
        "AgentSession",
        "resources.0.configMap.items.0.path",
        "/a.py",
        "spec.resources[0].configMap.items[0].path",
    ),
    _case(
        "git-resource",
        "AgentSession",
        "resources.0",
        {"git": {"url": "https://git.example/x"}, "mountPath": "/workspace"},
        "spec.resources[0].git",
        "git resources come with",
        rule=True,
    ),
    _case(
        "github-resource",
        "AgentSession",
        "resources.0",
        {"githubRepository": {"url": "https://github.com/o/r"}, "mountPath": "/workspace"},
        "spec.resources[0].githubRepository",
        "git resources come with",
        rule=True,
    ),
    _case(
        "resource-of-nothing",
        "AgentSession",
        "resources.0.configMap",
        DROP,
        "spec.resources[0].configMap",
        "configMap must be set",
        rule=True,
    ),
    _case(
        "too-many-resources",
        "AgentSession",
        "resources",
        [_FILE] * 17,
        "spec.resources",
        "Too many",
    ),
    _case("operating-mode", "AgentSession", "operatingMode", "Paused", "spec.operatingMode"),
    _case("deletion-policy", "AgentSession", "deletionPolicy", "Keep", "spec.deletionPolicy"),
    _case("budget-cost", "AgentSession", "budget.maxCost", "2,50", "spec.budget.maxCost"),
    _case("budget-time", "AgentSession", "budget.maxDurationSeconds", 0, "maxDurationSeconds"),
    _case("budget-zero", "AgentSession", "budget.maxTokens", 0, "spec.budget.maxTokens"),
    _case(
        "ttl-negative",
        "AgentSession",
        "ttlSecondsAfterFinished",
        -1,
        "spec.ttlSecondsAfterFinished",
    ),
    _case(
        "inline-agent-tool",
        "AgentSession",
        "agent.tools",
        [{"name": "browser"}],
        "spec.agent.tools[0].name",
        "must be one of bash",
        rule=True,
    ),
    _case("run-id", "AgentSession", "runID", "no spaces please", "spec.runID"),
    _case("session-typo", "AgentSession", "mesage", "hello", "spec.mesage", unknown=True),
    # Sandbox
    _case(
        "sandbox-two-environments",
        "Sandbox",
        "environmentRef",
        {"name": "small"},
        "spec",
        "at most one of environmentRef and environment",
        rule=True,
    ),
    _case("holder-id", "Sandbox", "holder.sessionID", "sesn_1", "spec.holder.sessionID"),
    _case("holder-instance", "Sandbox", "holder.instance", 0, "spec.holder.instance"),
    _case("holder-half", "Sandbox", "holder.hand", DROP, "spec.holder.hand", "Required"),
    _case(
        "sandbox-networking",
        "Sandbox",
        "environment.networking",
        {"type": "Limited"},
        "spec.environment.networking.type",
        "no egress in this version",
        rule=True,
    ),
)


@dataclass(frozen=True)
class BadUpdate:
    """One wrong change of an object that exists.

    Attributes:
        name: id of the test case.
        kind: kind of the object.
        before: its spec.
        after: the spec that must be refused.
        field: path that the refusal must name.
        text: another part of the refusal.
    """

    name: str
    kind: str
    before: Json
    after: Json
    field: str
    text: str = "immutable"


def _update(name: str, kind: str, field: str, after: object) -> BadUpdate:
    """The good spec with one top-level member of the spec changed, added or dropped."""
    spec = copy.deepcopy(GOOD[kind])
    if after is DROP:
        del spec[field]
    else:
        spec[field] = after
    return BadUpdate(name, kind, GOOD[kind], spec, f"spec.{field}")


_LIST: Json = {
    "agentRef": {"name": "a"},
    "messages": [{"id": "1", "content": "one"}, {"id": "2", "content": "two"}],
}
_INLINE_TOOLS = {**GOOD["AgentSession"]["agent"], "tools": [{"name": "bash"}]}

BAD_UPDATES: tuple[BadUpdate, ...] = (
    _update("message-changed", "AgentSession", "message", "Something else."),
    _update("agent-changed", "AgentSession", "agent", _INLINE_TOOLS),
    _update("environment-ref-changed", "AgentSession", "environmentRef", {"name": "large"}),
    _update("environment-ref-dropped", "AgentSession", "environmentRef", DROP),
    _update("resources-changed", "AgentSession", "resources", [_FILE]),
    _update("resources-dropped", "AgentSession", "resources", DROP),
    _update("run-id-changed", "AgentSession", "runID", "2026-12"),
    BadUpdate(
        "agent-ref-changed",
        "AgentSession",
        _LIST,
        {**_LIST, "agentRef": {"name": "b"}},
        "spec.agentRef",
    ),
    BadUpdate(
        "environment-added",
        "AgentSession",
        _LIST,
        {**_LIST, "environment": {"image": "x"}},
        "spec.environment",
    ),
    BadUpdate(
        "message-of-the-list-dropped",
        "AgentSession",
        _LIST,
        {**_LIST, "messages": _LIST["messages"][1:]},
        "spec.messages",
        "append-only",
    ),
    BadUpdate(
        "message-of-the-list-changed",
        "AgentSession",
        _LIST,
        {**_LIST, "messages": [_LIST["messages"][0], {"id": "2", "content": "three"}]},
        "spec.messages[1].content",
        "append-only",
    ),
    BadUpdate(
        "list-replaced-by-message",
        "AgentSession",
        _LIST,
        {"agentRef": {"name": "a"}, "message": "one"},
        "spec.messages",
        "append-only",
    ),
    _update("holder-changed", "Sandbox", "holder", {**GOOD["Sandbox"]["holder"], "instance": 2}),
    _update("holder-dropped", "Sandbox", "holder", DROP),
)

GOOD_UPDATES: tuple[tuple[str, str, Json, Json], ...] = (
    (
        "suspend",
        "AgentSession",
        GOOD["AgentSession"],
        {**GOOD["AgentSession"], "operatingMode": "Suspended", "title": "x"},
    ),
    (
        "budget",
        "AgentSession",
        GOOD["AgentSession"],
        {**GOOD["AgentSession"], "budget": {"maxTokens": 5}, "ttlSecondsAfterFinished": 9},
    ),
    (
        "append",
        "AgentSession",
        _LIST,
        {**_LIST, "messages": [*_LIST["messages"], {"id": "3", "content": "three"}]},
    ),
    ("model", "Agent", GOOD["Agent"], {"model": {"id": "claude-opus-5"}}),
    (
        "sandbox-suspend",
        "Sandbox",
        GOOD["Sandbox"],
        {**GOOD["Sandbox"], "operatingMode": "Suspended"},
    ),
)
"""name, kind, spec before, spec after: changes that must be accepted."""
