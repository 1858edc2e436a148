"""AgentSession: one run of an agent. The session itself lives in the log; this is its handle."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from cowhand.api.labels import API_VERSION
from cowhand.api.markers import (
    at_most_one,
    atomic,
    cel,
    exactly_one,
    immutable_member,
    list_map,
    list_set,
    merge,
)
from cowhand.api.meta import (
    Condition,
    Int32,
    Int64,
    LocalRef,
    Model,
    ObjectMeta,
    StatusModel,
    Text,
    Word,
)
from cowhand.api.v1alpha1.agent import USD, AgentSpec
from cowhand.api.v1alpha1.environment import EnvironmentSpec
from cowhand.api.v1alpha1.files import FileResource

OperatingMode: TypeAlias = Literal["Running", "Suspended"]

NEW_SESSION = "make a new AgentSession instead"
OF_THE_SOURCE = (
    "a fork has the environment and resources of its source: leave environment, environmentRef and "
    "resources out"
)
APPEND_ONLY = "messages is append-only: keep every message that was there, with the same content"
MessageText = Annotated[str, Field(min_length=1, max_length=100_000)]


class Message(Model):
    """One user message."""

    id: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$")]
    """id of the message, chosen by the user; a message is sent once per id."""
    content: Annotated[
        MessageText,
        Field(json_schema_extra=cel("self == oldSelf", f"content is immutable: {APPEND_ONLY}")),
    ]
    """content of the message."""


class Budget(Model):
    """Limits of the whole session; a turn that would pass one ends with BudgetReached before it does."""

    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    """maxTokens is the most input and output tokens together."""
    max_tool_calls: Annotated[Int32, Field(ge=1)] | None = None
    """maxToolCalls is the most tool calls."""
    max_cost: Annotated[str, Field(max_length=16, pattern=USD)] | None = None
    """maxCost is the most that model requests may cost at list price, in US dollars, for example
    "2.50"."""
    max_duration_seconds: Annotated[Int32, Field(ge=1)] | None = None
    """maxDurationSeconds is the longest that the session may run; time in which it is idle does not
    count. Tools that run then are stopped."""


class Fork(Model):
    """Where a session branches off from another one of the same namespace."""

    session: Annotated[
        str,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?|sesn_[0-9a-f]{32})$",
        ),
    ]
    """session is the name of the AgentSession to branch off from, or a session id (sesn_...) where
    that object is gone. It is only read."""
    at: Annotated[Int64, Field(ge=1)] | None = None
    """at is the last position of its log that is copied; it must not lie inside a turn. Absent: the
    newest position that does not."""


class AgentSessionSpec(Model):
    """What the user wants to run."""

    model_config = ConfigDict(
        json_schema_extra=merge(
            exactly_one("agentRef", "agent", "fork"),
            at_most_one("environmentRef", "environment"),
            at_most_one("message", "messages"),
            cel(
                "has(self.fork) || has(self.message) || has(self.messages)",
                "one of message and messages must be set; only a fork may begin without",
            ),
            cel(
                "!has(self.fork) || !(has(self.environment) || has(self.environmentRef) || "
                "(has(self.resources) && size(self.resources) > 0))",
                OF_THE_SOURCE,
            ),
            immutable_member("agentRef", f"{NEW_SESSION}"),
            immutable_member("agent", f"{NEW_SESSION}"),
            immutable_member("environmentRef", f"{NEW_SESSION}"),
            immutable_member("environment", f"{NEW_SESSION}"),
            immutable_member("resources", f"{NEW_SESSION}"),
            immutable_member("fork", f"{NEW_SESSION}"),
            immutable_member(
                "message",
                "to send another message add it with `cowhand send`, or start with the list messages",
            ),
            immutable_member("runID", f"{NEW_SESSION}"),
            cel(
                "!has(oldSelf.messages) || has(self.messages)",
                APPEND_ONLY,
                field=".messages",
            ),
        )
    )

    agent_ref: LocalRef | None = None
    """agentRef names the Agent; its state at the start is pinned. Exactly one of agentRef, agent,
    fork."""
    agent: AgentSpec | None = None
    """agent is an Agent written inline. Exactly one of agentRef, agent, fork."""
    fork: Fork | None = None
    """fork makes this session a copy of another one up to a position of its log, with its agent,
    environment and resources. Exactly one of agentRef, agent, fork."""
    environment_ref: LocalRef | None = None
    """environmentRef names the Environment of the sandboxes. At most one of environmentRef,
    environment; absent: the chart's default environment."""
    environment: EnvironmentSpec | None = None
    """environment is an Environment written inline."""
    message: MessageText | None = None
    """message is the first user message. Exactly one of message, messages; a fork may have
    neither."""
    messages: (
        Annotated[
            tuple[Message, ...],
            Field(
                min_length=1,
                max_length=64,
                json_schema_extra=merge(
                    list_map("id"),
                    cel("oldSelf.all(old, self.exists(new, new.id == old.id))", APPEND_ONLY),
                ),
            ),
        ]
        | None
    ) = None
    """messages is an append-only list: one that is added is sent, in order, once."""
    title: Annotated[str, Field(max_length=256)] | None = None
    """title of the session, for people."""
    resources: Annotated[
        tuple[FileResource, ...], Field(max_length=16, json_schema_extra=atomic())
    ] = ()
    """resources are files that are copied into /workspace before the first tool call."""
    operating_mode: OperatingMode = "Running"
    """operatingMode is Running, or Suspended: then no model request and no tool call starts."""
    budget: Budget | None = None
    """budget limits the whole session. A change takes effect before the next model request; a session
    that stopped with BudgetReached goes on when the next message comes."""
    accept_log_position: Annotated[Int64, Field(ge=1)] | None = None
    """acceptLogPosition says that the session may go on although the store lost the end of its log
    (Ready reason LogRolledBack): the position that the condition names as the last one that is left."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """deletionPolicy says what becomes of the log when this object is deleted: Retain keeps it for
    the chart's retention time, Delete removes it at once."""
    ttl_seconds_after_finished: Annotated[Int32, Field(ge=0, le=31_536_000)] | None = None
    """ttlSecondsAfterFinished deletes this object so long after its last turn ended. Absent:
    never."""
    run_id: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=63,
                pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$",
            ),
        ]
        | None
    ) = None
    """runID tells runs of the same name and spec apart: without a new one, an object that is made
    again adopts the run that is already in the log."""

    @model_validator(mode="after")
    def _check(self) -> AgentSessionSpec:
        if [self.agent_ref, self.agent, self.fork].count(None) != 2:
            raise ValueError("exactly one of agentRef, agent and fork must be set")
        if self.fork is not None and (self.environment or self.environment_ref or self.resources):
            raise ValueError(OF_THE_SOURCE)
        if self.environment_ref is not None and self.environment is not None:
            raise ValueError("at most one of environmentRef and environment may be set")
        if self.message is not None and self.messages is not None:
            raise ValueError("at most one of message and messages may be set")
        if self.fork is None and self.message is None and self.messages is None:
            raise ValueError(
                "one of message and messages must be set; only a fork may begin without"
            )
        ids = [message.id for message in self.messages or ()]
        if len(set(ids)) != len(ids):
            raise ValueError("messages: each id may occur once")
        return self


class Usage(StatusModel):
    """Tokens over the whole session."""

    input_tokens: Annotated[Int64, Field(ge=0)] = 0
    """inputTokens that were neither read from nor written to the prompt cache."""
    output_tokens: Annotated[Int64, Field(ge=0)] = 0
    """outputTokens that the model wrote."""
    cache_read_input_tokens: Annotated[Int64, Field(ge=0)] = 0
    """cacheReadInputTokens were read from the prompt cache."""
    cache_creation_input_tokens: Annotated[Int64, Field(ge=0)] = 0
    """cacheCreationInputTokens were written to the prompt cache."""
    cost: Annotated[str, Field(max_length=32)] = ""
    """cost of the model requests at list price, in US dollars; empty where the price is not known."""


class PinnedAgent(StatusModel):
    """The agent as it was when the session started."""

    name: Annotated[str, Field(max_length=253)] = ""
    """name of the Agent, empty for an inline one."""
    uid: Word = ""
    """uid of the Agent, empty for an inline one."""
    generation: Annotated[Int64, Field(ge=0)] = 0
    """generation of the Agent."""
    hash: Word = ""
    """hash of its content, hex SHA-256."""


class HandStatus(StatusModel):
    """One hand of the session."""

    name: Annotated[str, Field(max_length=20)]
    """name of the hand in the agent."""
    instance: Annotated[Int32, Field(ge=0)] = 0
    """instance counts from 1; a lost hand's successor has the next number."""
    sandbox_name: Annotated[str, Field(max_length=253)] = ""
    """sandboxName is the Sandbox that is this hand."""
    state: Word = ""
    """state of the hand as the log knows it: Pending, Ready, Failed or Lost."""
    message: Text = ""
    """message says why its Sandbox is not ready, for example the scheduler's words."""


class ErrorStatus(StatusModel):
    """The error that ended the last turn."""

    type: Word
    """type of the error, for example overloaded_error."""
    message: Text = ""
    """message of the error."""


class AgentSessionStatus(StatusModel):
    """What was observed of the session; rebuilt from the log at any time."""

    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra=list_map("type"))
    ] = ()
    """conditions are Ready, Reconciling, Stalled, TurnComplete, Succeeded, StoreDurable and ContextProfileFits."""
    observed_generation: Annotated[Int64, Field(ge=-1)] = -1
    """observedGeneration is the generation that the operator has acted upon, -1 before the first."""
    session_id: Annotated[str, Field(max_length=64)] = ""
    """sessionID of the session in the log."""
    state: Literal["idle", "running", "rescheduling", "terminated", "closed"] | None = None
    """state of the session: idle, running, rescheduling, terminated or closed."""
    mode: OperatingMode | None = None
    """mode that is in force in the log: Running or Suspended."""
    stop_reason: Word = ""
    """stopReason of the last turn, for example end_turn."""
    last_seq: Annotated[Int64, Field(ge=0)] = 0
    """lastSeq is the position of the last event that this status includes."""
    turns: Annotated[Int32, Field(ge=0)] = 0
    """turns that have ended."""
    usage: Usage | None = None
    """usage is tokens over the whole session."""
    tool_calls: Annotated[Int32, Field(ge=0)] = 0
    """toolCalls that were made."""
    time_to_first_token_milliseconds: Annotated[Int64, Field(ge=0)] | None = None
    """timeToFirstTokenMilliseconds is from the first message to the first token of the model."""
    agent: PinnedAgent | None = None
    """agent that is pinned into the session."""
    delivered_messages: Annotated[
        tuple[Annotated[str, Field(max_length=63)], ...],
        Field(max_length=64, json_schema_extra=list_set()),
    ] = ()
    """deliveredMessages are the ids of spec.messages that are in the log."""
    hands: Annotated[
        tuple[HandStatus, ...], Field(max_length=16, json_schema_extra=list_map("name"))
    ] = ()
    """hands of the session."""
    error: ErrorStatus | None = None
    """error that ended the last turn."""


class AgentSession(Model):
    """One run of an agent: what it is told, where it runs, and what became of it."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["cowhand.dev/v1alpha1"] = API_VERSION
    kind: Literal["AgentSession"] = "AgentSession"
    metadata: ObjectMeta = ObjectMeta()
    spec: AgentSessionSpec
    """spec is what the user wants."""
    status: AgentSessionStatus = AgentSessionStatus()
    """status is what was observed."""


__all__ = [
    "AgentSession",
    "AgentSessionSpec",
    "AgentSessionStatus",
    "Budget",
    "ErrorStatus",
    "Fork",
    "HandStatus",
    "Message",
    "OperatingMode",
    "PinnedAgent",
    "Usage",
]
