"""From an AgentSession and what it refers to, the events that make its session: a frozen copy.

Later edits of the Agent, the Environment or the chart do not touch a session that runs. Pure; called by
`controller.sessions` when a session is not in the log yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cowhand.api.v1alpha1 import (
    AgentSession,
    AgentSessionSpec,
    AgentSpec,
    EnvironmentSpec,
    Hand,
    PinnedAgent,
)
from cowhand.controller import prices
from cowhand.desired import environment as environments
from cowhand.errors import UserError
from cowhand.hands import toolset
from cowhand.reconcile.session_status import wanted_budget
from cowhand.session import events
from cowhand.session.events import NewEvent
from cowhand.session.forking import lineage
from cowhand.session.log import SessionMeta

ASSEMBLER: Final = 2
"""Version of the request builder that a new session is made for."""

_NOT_THE_RUN: Final = frozenset(
    {
        "operatingMode",
        "budget",
        "ttlSecondsAfterFinished",
        "deletionPolicy",
        "title",
        "messages",
        "acceptLogPosition",
    }
)


class TooLarge(UserError):
    """An event of the session would be larger than the log takes."""


@dataclass(frozen=True)
class FreezeDefaults:
    """The chart's part of a session.

    Attributes:
        environment: of sessions that name none.
        sandbox_image: of environments that name none.
        model_base_url: of agents that name none.
        model_secret: Secret of the model key, of agents that name none.
        event_limit: most bytes of one event.
        inline_limit: most bytes of an event that stands in the store itself.
    """

    environment: EnvironmentSpec
    sandbox_image: str
    model_base_url: str
    model_secret: str
    event_limit: int = events.INLINE_LIMIT
    inline_limit: int = events.INLINE_LIMIT


@dataclass(frozen=True)
class AgentSource:
    """The agent that is pinned: its spec, and where it comes from (empty for an inline one)."""

    spec: AgentSpec
    name: str = ""
    uid: str = ""
    generation: int = 0


@dataclass(frozen=True)
class Frozen:
    """A session that can be created; a fork from `source`: session id and last position to copy."""

    meta: SessionMeta
    events: tuple[NewEvent, ...]
    pinned: PinnedAgent
    source: tuple[str, int] | None = None


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tombstone(namespace: str, name: str, spec: AgentSessionSpec) -> str:
    """Key of "this run was already made": hex SHA-256.

    What counts: namespace, name, agent, environment, resources, runID and the first message. What does not:
    mode, budget, time to live, deletion policy, title, and messages after the first, because they may
    change while a session lives and do not make it another run. The contents of a referenced Agent do not
    count either: the name of the reference does.
    """
    body = {key: value for key, value in spec.to_json().items() if key not in _NOT_THE_RUN}
    if spec.messages:
        body["messages"] = [spec.messages[0].to_json()]
    return _digest({"namespace": namespace, "name": name, "spec": body})


def actor(session: AgentSession) -> dict[str, Any]:
    """Who did it, for events that follow from the resource."""
    meta = session.metadata
    return {"user": f"agentsession:{meta.namespace}/{meta.name}", "via": "kubernetes"}


def user_message(session: AgentSession, identity: str, content: str) -> NewEvent:
    """A message of the spec as an event; `identity` is `0` for spec.message, else its id."""
    data = {"content": [{"type": "text", "text": content}], "actor": actor(session)}
    return NewEvent(events.USER_MESSAGE, data, id=f"msg:{identity}")


def mode_event(session: AgentSession, suspended: bool, last_seq: int = 0) -> NewEvent:
    """The event of a change of operatingMode, deduplicated by generation and the position it was decided at.

    Not by generation alone: a restored cluster counts generations again that the log has seen.
    """
    kind = events.SESSION_SUSPENDED if suspended else events.SESSION_RESUMED
    identity = f"mode:{session.metadata.generation}:{last_seq}"
    return NewEvent(kind, {"actor": actor(session)}, id=identity)


def regressed_event(seen: int, position: int, by: str) -> NewEvent:
    """The note of a log that lost its end: `by` (`status` or `operator`) has seen `seen`."""
    data = {"seen": seen, "position": position, "by": by}
    return NewEvent(events.LOG_REGRESSED, data, id=f"regressed:{seen}:{position}")


def forked_event(session: AgentSession, source: tuple[str, int]) -> NewEvent:
    """The end of what a fork has from its source: session id, position."""
    data: dict[str, Any] = {"session": source[0], "position": source[1], "actor": actor(session)}
    budget = wanted_budget(session.spec)
    return NewEvent(
        events.SESSION_FORKED, data | ({"budget": budget} if budget else {}), id="forked"
    )


def budget_event(session: AgentSession, budget: Mapping[str, int], last_seq: int) -> NewEvent:
    """The event of a change of spec.budget, deduplicated as `mode_event`."""
    data = {"budget": dict(budget) or None, "actor": actor(session)}
    return NewEvent(
        events.SESSION_UPDATED, data, id=f"budget:{session.metadata.generation}:{last_seq}"
    )


def freeze(
    session: AgentSession,
    session_id: str,
    agent: AgentSource,
    found: Mapping[str, EnvironmentSpec],
    defaults: FreezeDefaults,
) -> Frozen:
    """The meta and the first events of a session.

    Args:
        session: the resource.
        session_id: its id.
        agent: the agent to pin.
        found: name -> spec of each Environment that is referred to.
        defaults: the chart's part.

    Raises:
        TooLarge: an event is larger than the log takes.
        UserError: the spec cannot be run; `field` names the member.
    """
    pinned = PinnedAgent(
        name=agent.name,
        uid=agent.uid,
        generation=agent.generation,
        hash=_digest(agent.spec.to_json()),
    )
    created = NewEvent(
        events.SESSION_CREATED, _created(session, agent.spec, pinned, found, defaults), id="created"
    )
    first = [created, *_asked(session)]
    _check_sizes(first, defaults)
    secret = agent.spec.model.secret_ref
    model = {
        "base_url": agent.spec.model.base_url or defaults.model_base_url,
        "secret": {
            "name": secret.name if secret else defaults.model_secret,
            "key": secret.key if secret else "api-key",
        },
    }
    return Frozen(_meta(session, session_id, model), tuple(first), pinned)


def fork(
    session: AgentSession,
    session_id: str,
    source: tuple[str, int],
    created: Mapping[str, Any],
    model: Mapping[str, Any],
    defaults: FreezeDefaults,
) -> Frozen:
    """The meta and the own events of a session that is a fork.

    Args:
        session: the resource.
        session_id: its id.
        source: session id and position to branch off at.
        created: payload of the source's `session.created`.
        model: of the source's meta.
        defaults: the chart's part.

    Raises:
        TooLarge: an event is larger than the log takes.
        UserError: the spec cannot be run; `field` names the member.
    """
    meta, spec = session.metadata, session.spec
    own = {
        "namespace": meta.namespace,
        "name": meta.name,
        "uid": meta.uid,
        "budget": wanted_budget(spec),
        "lineage": lineage(dict(created), *source),
    }
    if spec.title:
        own["title"] = spec.title
    kept = {name: value for name, value in created.items() if name != "title"}
    if not kept.get("prices"):
        _needs_price(spec, str(kept["request"]["model"]))
    first = [NewEvent(events.SESSION_CREATED, {**kept, **own}, id="created")]
    first += [forked_event(session, source), *_asked(session)]
    _check_sizes(first, defaults)
    pinned = PinnedAgent.model_validate(created["agent"])
    return Frozen(_meta(session, session_id, model), tuple(first), pinned, source)


def _meta(session: AgentSession, session_id: str, model: Mapping[str, Any]) -> SessionMeta:
    meta = session.metadata
    return SessionMeta(
        session_id=session_id,
        namespace=meta.namespace,
        name=meta.name,
        uid=meta.uid,
        model=dict(model),
        tombstone=tombstone(meta.namespace, meta.name, session.spec),
    )


def _asked(session: AgentSession) -> list[NewEvent]:
    """What the spec wants to be done first: its messages and its mode."""
    spec = session.spec
    first: list[NewEvent] = []
    if spec.message is not None:
        first.append(user_message(session, "0", spec.message))
    first += [user_message(session, one.id, one.content) for one in spec.messages or ()]
    if spec.operating_mode == "Suspended":
        first.append(mode_event(session, suspended=True))
    return first


def _needs_price(spec: AgentSessionSpec, model: str) -> None:
    """Raise UserError if the budget is in money, which a model without a price cannot keep to."""
    if spec.budget is not None and spec.budget.max_cost is not None:
        raise UserError(
            f"budget.maxCost needs the price of model {model!r}, which is in no list here: set "
            "model.prices of the agent (input and output, US dollars a million tokens) or leave "
            "maxCost out",
            field="budget.maxCost",
        )


def _check_sizes(first: Sequence[NewEvent], defaults: FreezeDefaults) -> None:
    """Raise TooLarge unless each event fits the log, and all that stand in the store fit one script."""
    sizes = [len(event.payload()) for event in first]
    for event, size in zip(first, sizes, strict=True):
        if size > defaults.event_limit:
            raise TooLarge(
                f"{event.type} ({event.id}) has {size} bytes, at most {defaults.event_limit} fit: "
                "shorten the system prompt or the message, or put text into a ConfigMap under "
                "spec.resources"
            )
    inline = sum(size for size in sizes if size <= defaults.inline_limit)
    if inline > events.CREATE_LIMIT:
        raise TooLarge(
            f"agent, environment and messages have {inline} bytes together, a session may begin "
            f"with {events.CREATE_LIMIT}: begin with fewer messages and add the others to "
            "spec.messages later, or put text into a ConfigMap under spec.resources"
        )


def _created(
    session: AgentSession,
    agent: AgentSpec,
    pinned: PinnedAgent,
    found: Mapping[str, EnvironmentSpec],
    defaults: FreezeDefaults,
) -> dict[str, Any]:
    """The payload of session.created (docs/interfaces.md section 3)."""
    meta, spec = session.metadata, session.spec
    permissions = agent.permissions()
    custom = [
        toolset.custom_tool(tool.name, tool.description or "", tool.input_schema or {})
        for tool in agent.tools
        if tool.type == "Custom"
    ]
    body: dict[str, Any] = {
        "namespace": meta.namespace,
        "name": meta.name,
        "uid": meta.uid,
        "agent": pinned.to_json(),
        "request": toolset.request_base(
            model=agent.model.id,
            max_tokens=agent.model.max_tokens,
            system=agent.system,
            tools=permissions,
            custom=custom,
        ),
        "permissions": dict(permissions),
        "context": agent.context.model_dump(exclude_none=True, by_alias=False),
        "hands": [_hand(session, hand, found, defaults) for hand in agent.hands],
        "resources": [resource.to_json() for resource in spec.resources],
        "budget": wanted_budget(spec),
        "assembler": ASSEMBLER,
    }
    known = prices.prices(agent.model.id, agent.model.prices)
    if known is not None:
        body["prices"] = known
    else:
        _needs_price(spec, agent.model.id)
    if custom:
        body["custom_tools"] = [tool["name"] for tool in custom]
    if spec.title:
        body["title"] = spec.title
    return body


def _hand(
    session: AgentSession,
    hand: Hand,
    found: Mapping[str, EnvironmentSpec],
    defaults: FreezeDefaults,
) -> dict[str, Any]:
    spec = session.spec
    ref = hand.sandbox.environment_ref or spec.environment_ref
    wanted = found[ref.name] if ref is not None else spec.environment
    resolved = environments.resolve(wanted, defaults.environment, defaults.sandbox_image)
    return {
        "name": hand.name,
        "kind": "sandbox",
        "provisioning": hand.sandbox.provisioning,
        "environment": resolved.to_json(),
        "environment_ref": ref.name if ref is not None else "",
    }
