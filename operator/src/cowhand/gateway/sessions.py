"""The session object of `GET /v1/sessions/{id}`, from the state of the log and its first event."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from cowhand.gateway.projection import rfc3339, stop_reason, tool_use_event_id
from cowhand.session.events import CONFIRMATION, Event
from cowhand.session.log import SessionState

_STATUS: Final = {"closed": "terminated"}
_POLICY: Final = {"Allow": "always_allow", "Ask": "always_ask"}


def session_object(state: SessionState, created: Event, newest: Event) -> dict[str, Any]:
    """The official session object; the extension `cowhand` holds what it has no field for.

    Args:
        state: answer of `get_session`.
        created: event at position 1.
        newest: last event of the log.
    """
    data = created.data
    status = state.status
    usage = status.get("usage") or {}
    hands = data.get("hands") or ()
    environment = next((hand.get("environment_ref") for hand in hands), None)
    return {
        "id": state.meta.session_id,
        "type": "session",
        "status": _STATUS.get(state.state, state.state),
        "title": data.get("title"),
        "agent": _agent(data),
        "environment_id": environment or "default",
        "metadata": {},
        "resources": [],
        "vault_ids": [],
        "outcome_evaluations": [],
        "stats": {"duration_seconds": max(0, newest.ts - state.created_ms) / 1000},
        "usage": {
            "input_tokens": int(usage.get("input_tokens") or 0),
            "output_tokens": int(usage.get("output_tokens") or 0),
            "cache_read_input_tokens": int(usage.get("cache_read_input_tokens") or 0),
            "cache_creation": {
                "ephemeral_5m_input_tokens": int(usage.get("cache_creation_input_tokens") or 0),
                "ephemeral_1h_input_tokens": 0,
            },
        },
        "budget": _budget(state.budget),
        "deployment_id": None,
        "created_at": rfc3339(state.created_ms),
        "updated_at": rfc3339(newest.ts),
        "archived_at": None,
        "cowhand": _extension(state),
    }


def _budget(limits: Mapping[str, int]) -> dict[str, Any] | None:
    """The official budget is an amount of money in cents; the other limits stand in `session.updated`."""
    cost = limits.get("max_cost_microusd")
    if cost is None:
        return None
    amount = {"amount": str(cost // 10_000), "currency": "USD"}
    return {"type": "limit", "max_list_cost": amount}


def _agent(data: Mapping[str, Any]) -> dict[str, Any]:
    agent = data.get("agent") or {}
    request = data.get("request") or {}
    custom = frozenset(data.get("custom_tools") or ())
    system = "\n\n".join(block.get("text", "") for block in request.get("system") or ())
    return {
        "id": str(agent.get("uid") or agent.get("name") or "inline"),
        "type": "agent",
        "version": max(1, int(agent.get("generation") or 1)),
        "name": str(agent.get("name") or "inline"),
        "description": None,
        "system": system or None,
        "model": {"id": str(request.get("model") or "")},
        "tools": [
            _toolset(request, data.get("permissions") or {}, custom),
            *(
                {"type": "custom", **tool}
                for tool in request.get("tools") or ()
                if tool["name"] in custom
            ),
        ],
        "mcp_servers": [],
        "skills": [],
        "execution_identity": {"type": "service_account"},
        "multiagent": None,
    }


def _toolset(
    request: Mapping[str, Any], permissions: Mapping[str, str], custom: Collection[str]
) -> dict[str, Any]:
    names = [tool["name"] for tool in request.get("tools") or () if tool["name"] not in custom]
    return {
        "type": "agent_toolset_20260401",
        "default_config": {"enabled": False, "permission_policy": {"type": "always_allow"}},
        "configs": [
            {
                "type": name,
                "name": name,
                "enabled": True,
                "permission_policy": {
                    "type": _POLICY.get(permissions.get(name, ""), "always_allow")
                },
            }
            for name in names
        ],
    }


def _extension(state: SessionState) -> dict[str, Any]:
    session_id = state.meta.session_id
    status = state.status
    stop = status.get("stop_reason")
    return {
        "namespace": state.meta.namespace,
        "name": state.meta.name,
        "state": state.state,
        "mode": state.mode,
        "last_seq": state.next_seq - 1,
        "stop_reason": stop_reason(session_id, stop) if stop else None,
        "pending": [
            {
                "tool_use_id": tool_use_event_id(session_id, call["tool_use_id"]),
                "name": call["name"],
                "kind": call.get("kind", CONFIRMATION),
                "input_sha256": call.get("input_sha256", ""),
            }
            for call in status.get("pending") or ()
        ],
        "turns": int(status.get("turns") or 0),
        "tool_calls": int(status.get("tool_calls") or 0),
        "ttft_ms": status.get("ttft_ms"),
        "hands": list(status.get("hands") or ()),
        "error": status.get("error"),
    }
