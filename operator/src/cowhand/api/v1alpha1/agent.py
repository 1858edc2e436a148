"""Agent: model, system prompt, tools and hands of a session; pinned into the session when it starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from cowhand.api.labels import API_VERSION
from cowhand.api.markers import cel, list_map, merge
from cowhand.api.meta import DNS_LABEL, Int32, LocalRef, Model, ObjectMeta, SecretKeyRef

BASE_URL = (
    r"^https?://([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?"
    r"(/[A-Za-z0-9._~/-]*)?$"
)

ToolName: TypeAlias = Literal["bash", "read", "write", "edit", "glob", "grep"]
Permission: TypeAlias = Literal["Allow", "Ask", "Deny"]

TOOL_NAMES: tuple[ToolName, ...] = ("bash", "read", "write", "edit", "glob", "grep")
"""Tools that an agent has when it names none, in the order the model sees them."""

ONE_HAND = (
    "an agent has one hand in this version: keep one entry of hands (several hands come with a "
    "later version)"
)


USD = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"


class ModelPrices(Model):
    """What a million tokens cost, in US dollars."""

    input: Annotated[str, Field(max_length=16, pattern=USD)]
    """input is the price of a million input tokens, for example "2.50"."""
    output: Annotated[str, Field(max_length=16, pattern=USD)]
    """output is the price of a million output tokens."""


class ModelSpec(Model):
    """Which model answers, and where."""

    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^\S+$")]
    """id of the model as the Messages API knows it."""
    max_tokens: Annotated[Int32, Field(ge=1, le=128_000)] = 8192
    """maxTokens is the most tokens that one response may have."""
    base_url: Annotated[str, Field(min_length=8, max_length=512, pattern=BASE_URL)] | None = None
    """baseURL of the Messages API without /v1/messages and without a query; default the chart's
    model.baseURL."""
    secret_ref: SecretKeyRef | None = None
    """secretRef names the Secret that holds the model key; default the chart's model.secretName. The
    Secret's annotation cowhand.dev/allowed-hosts must list the host of the base URL."""
    prices: ModelPrices | None = None
    """prices of the model, for budget.maxCost. Absent: the list price of the model's family; a model
    of no known family needs them."""


LOG_TOOLS = ("read_log", "search_log")
"""Tools that an agent has besides when it names none and its context profile may drop context."""

BUILT_IN_NAMES = (*TOOL_NAMES, *LOG_TOOLS)
"""All tools that Cowhand brings."""

_BUILT_IN = ", ".join(BUILT_IN_NAMES)
UNKNOWN_TOOL = f"name of a BuiltIn tool must be one of {_BUILT_IN}"
TAKEN_NAME = f"name of a Custom tool must not be one of {_BUILT_IN}: choose another name"
CUSTOM_NEEDS = "a Custom tool needs description and inputSchema"
CUSTOM_ONLY = "description and inputSchema are for type Custom: the built-in tools have their own"
NO_PERMISSION = (
    "a Custom tool has no permission: its client decides whether it runs; leave permission out"
)
_NAMES = "[" + ", ".join(f"'{name}'" for name in BUILT_IN_NAMES) + "]"


class Tool(Model):
    """One tool: a built-in one and whether it may run, or a custom one that the client answers."""

    model_config = ConfigDict(
        json_schema_extra=merge(
            cel(f"self.type == 'Custom' || self.name in {_NAMES}", UNKNOWN_TOOL, field=".name"),
            cel(f"self.type != 'Custom' || !(self.name in {_NAMES})", TAKEN_NAME, field=".name"),
            cel(
                "self.type != 'Custom' || (has(self.description) && has(self.inputSchema))",
                CUSTOM_NEEDS,
            ),
            cel(
                "self.type == 'Custom' || (!has(self.description) && !has(self.inputSchema))",
                CUSTOM_ONLY,
            ),
            cel(
                "self.type != 'Custom' || self.permission == 'Allow'",
                NO_PERMISSION,
                field=".permission",
            ),
        )
    )

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    """name of the tool: bash, read, write, edit, glob, grep, read_log or search_log, or any other for type
    Custom."""
    type: Literal["BuiltIn", "Custom"] = "BuiltIn"
    """type is BuiltIn (runs in the sandbox; read_log and search_log show the session's own log)
    or Custom: Claude's call is handed to the client, which
    answers with user.custom_tool_result (`cowhand answer`)."""
    permission: Permission = "Allow"
    """permission is Allow (runs at once), Ask (waits for an approval) or Deny (never runs)."""
    description: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """description of a Custom tool, which tells Claude what it does and when to use it."""
    input_schema: (
        Annotated[
            dict[str, Any],
            Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}),
        ]
        | None
    ) = None
    """inputSchema of a Custom tool: the JSON Schema of its input, with type "object"."""

    @model_validator(mode="after")
    def _check(self) -> Tool:
        custom = self.type == "Custom"
        if custom == (self.name in BUILT_IN_NAMES):
            raise ValueError(TAKEN_NAME if custom else UNKNOWN_TOOL)
        if custom and (self.description is None or self.input_schema is None):
            raise ValueError(CUSTOM_NEEDS)
        if not custom and (self.description is not None or self.input_schema is not None):
            raise ValueError(CUSTOM_ONLY)
        if custom and self.permission != "Allow":
            raise ValueError(NO_PERMISSION)
        return self


class SandboxHand(Model):
    """A hand that is a sandbox pod of the session's own."""

    environment_ref: LocalRef | None = None
    """environmentRef names the Environment of this hand; default the session's."""
    provisioning: Literal["Lazy", "Eager"] = "Lazy"
    """provisioning is Lazy (made by the first tool call) or Eager (made with the session)."""


class Hand(Model):
    """One hand of the agent."""

    name: Annotated[str, Field(min_length=1, max_length=20, pattern=DNS_LABEL)]
    """name of the hand, a DNS label."""
    sandbox: SandboxHand
    """sandbox makes this hand a sandbox pod."""


class ContextSpec(Model):
    """What is done before the conversation outgrows the model's context window."""

    profile: Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)] = "auto"
    """profile is plain (nothing), compaction (the API summarizes on demand), reset (the model writes
    notes and goes on in a new window), clearing (old tool results are removed), the name of an installed
    profile, or auto: the one that declares itself best for the model, plain for unknown models."""
    window_tokens: Annotated[Int32, Field(ge=1000)] | None = None
    """windowTokens is the size of the model's context window; default what Cowhand knows of the model,
    200000 for unknown ones."""
    trigger_tokens: Annotated[Int32, Field(ge=1)] | None = None
    """triggerTokens is the size of a request that makes the profile act; default three quarters of the
    window, at most 400000."""
    keep_tool_results: Annotated[Int32, Field(ge=0, le=1000)] | None = None
    """keepToolResults is how many of the newest tool results the profile clearing leaves; default 3."""
    clear_at_least_tokens: Annotated[Int32, Field(ge=0)] | None = None
    """clearAtLeastTokens is the least that the profile clearing removes at once, because each removal
    costs the prompt cache; default a fifth of triggerTokens."""
    instructions: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    """instructions replace the built-in prompt for the summary (compaction) or the notes (reset)."""


ALL_TOOLS: tuple[Tool, ...] = tuple(Tool(name=name) for name in TOOL_NAMES)
DEFAULT_HANDS: tuple[Hand, ...] = (Hand(name="sandbox", sandbox=SandboxHand()),)


class AgentSpec(Model):
    """What an agent is: everything but the work it is given."""

    model: ModelSpec
    """model says which model answers, and where."""
    system: Annotated[str, Field(max_length=100_000)] | None = None
    """system is the system prompt."""
    tools: Annotated[tuple[Tool, ...], Field(max_length=64, json_schema_extra=list_map("name"))] = (
        ALL_TOOLS
    )
    """tools that the agent has, and their permissions. Absent: bash, read, write, edit, glob and grep,
    allowed, and unless context.profile is plain also read_log and search_log, with which the agent reads
    the log of its own session. Given: only those that are named."""
    context: ContextSpec = ContextSpec()
    """context says what is done before the conversation outgrows the model's context window."""
    hands: Annotated[
        tuple[Hand, ...],
        Field(
            min_length=1,
            max_length=16,
            json_schema_extra=merge(list_map("name"), cel("self.size() <= 1", ONE_HAND)),
        ),
    ] = DEFAULT_HANDS
    """hands of the agent, where its tools run. Absent: one lazy sandbox called "sandbox"."""

    def permissions(self) -> dict[str, Permission]:
        """Name -> permission of the built-in tools that the agent has."""
        found = {tool.name: tool.permission for tool in self.tools if tool.type == "BuiltIn"}
        if "tools" not in self.model_fields_set and self.context.profile != "plain":
            found |= dict.fromkeys(LOG_TOOLS, "Allow")
        return dict(found)

    @model_validator(mode="after")
    def _check(self) -> AgentSpec:
        if len(self.hands) > 1:
            raise ValueError(f"hands: {ONE_HAND}")
        if len({tool.name for tool in self.tools}) != len(self.tools):
            raise ValueError("tools: each tool may be named once")
        return self


class Agent(Model):
    """An agent: model, system prompt, tools, permissions and hands."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["cowhand.dev/v1alpha1"] = API_VERSION
    kind: Literal["Agent"] = "Agent"
    metadata: ObjectMeta = ObjectMeta()
    spec: AgentSpec
    """spec is what the user wants."""
