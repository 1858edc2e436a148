"""Conditions and their reasons: closed lists, each with the moment at which it is used.

Imported by whoever writes or reads a condition; `docs/api.md` prints these lists. A reason that is
not here must not be written.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A word with its meaning; `str()` is the word, `meaning` the text for the documentation."""

    meaning: str

    def __new__(cls, word: str, meaning: str = "") -> Reason:
        """Make a member from its word and its meaning."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member


class SessionCondition(StrEnum):
    """Condition types of AgentSession."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    TURN_COMPLETE = "TurnComplete"
    SUCCEEDED = "Succeeded"
    STORE_DURABLE = "StoreDurable"
    CONTEXT_PROFILE_FITS = "ContextProfileFits"


class SandboxCondition(StrEnum):
    """Condition types of Sandbox."""

    READY = "Ready"
    EGRESS_ENFORCED = "EgressEnforced"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class SessionReady(Reason):
    """Reasons of AgentSession Ready: the session is in the log and does what its spec asks."""

    ACCEPTED = "Accepted", "True: the session is in the log and may run."
    ALREADY_RAN = (
        "AlreadyRan",
        "True: the log holds a finished run of the same namespace, name and spec, which this object "
        "adopted; nothing ran again. Set spec.runID for a new run.",
    )
    SUSPENDED = "Suspended", "True: the session is in the log and stands still, as its spec asks."
    TERMINATED = "Terminated", "True: the session has ended for good; its log can be read."
    PENDING = "Pending", "Unknown: the operator has seen the object and not yet written to the log."
    AGENT_NOT_FOUND = "AgentNotFound", "False: the Agent of spec.agentRef does not exist (yet)."
    ENVIRONMENT_NOT_FOUND = (
        "EnvironmentNotFound",
        "False: the Environment of spec.environmentRef or of a hand does not exist (yet).",
    )
    FORK_SOURCE_NOT_FOUND = (
        "ForkSourceNotFound",
        "False: the session of spec.fork does not exist in this namespace (yet).",
    )
    INVALID_FORK = (
        "InvalidFork",
        "False: the session of spec.fork cannot be forked at that position; the message names the "
        "nearest ones that can.",
    )
    INVALID_SPEC = (
        "InvalidSpec",
        "False: the spec passed the API server but cannot be run; the message names the field.",
    )
    TOO_LARGE = (
        "TooLarge",
        "False: the snapshot of agent and environment is larger than an event may be.",
    )
    NAMESPACE_NOT_SERVED = (
        "NamespaceNotServed",
        "False: the namespace is not among the chart's tenants.",
    )
    STORE_UNAVAILABLE = "StoreUnavailable", "False: the store of the log does not answer."
    QUOTA_EXCEEDED = (
        "QuotaExceeded",
        "False: the namespace has used up its share of the store of the log; the message says how much it has.",
    )
    SESSION_LOST = (
        "SessionLost",
        "False: status names a session that the store does not know: its data was lost or replaced.",
    )
    LOG_ROLLED_BACK = (
        "LogRolledBack",
        "False: more of the log was seen than the store has: its end was lost. Nothing runs until it "
        "is restored, or spec.acceptLogPosition accepts the loss.",
    )
    DELETING = "Deleting", "False: the object is being deleted and its log is being ended."


class SessionReconciling(Reason):
    """Reasons of AgentSession Reconciling: present (True) only while something is on its way."""

    CREATING = "Creating", "True: the session is being written to the log."
    WAITING_FOR_REFERENCE = (
        "WaitingForReference",
        "True: an Agent, Environment or session that spec names does not exist yet.",
    )
    DELIVERING = "Delivering", "True: a message that was added to the spec is not in the log yet."
    CHANGING_MODE = (
        "ChangingMode",
        "True: operatingMode has changed and the log does not say so yet.",
    )
    CHANGING_BUDGET = (
        "ChangingBudget",
        "True: spec.budget has changed and the log does not say so yet.",
    )
    STORE_UNAVAILABLE = "StoreUnavailable", "True: the store does not answer; it is tried again."
    QUOTA_EXCEEDED = (
        "QuotaExceeded",
        "True: it is tried again when the namespace has room in the store.",
    )
    DELETING = "Deleting", "True: the log is being ended."


class SessionStalled(Reason):
    """Reasons of AgentSession Stalled: present (True) only when trying again cannot help."""

    INVALID_SPEC = "InvalidSpec", "True: the spec cannot be run; change it or make a new object."
    INVALID_FORK = (
        "InvalidFork",
        "True: the position of spec.fork cannot be forked; make a new object.",
    )
    TOO_LARGE = "TooLarge", "True: agent and environment together are too large for the log."
    NAMESPACE_NOT_SERVED = (
        "NamespaceNotServed",
        "True: the namespace is not among the chart's tenants.",
    )
    SESSION_LOST = "SessionLost", "True: the store does not know the session of this object."
    LOG_ROLLED_BACK = "LogRolledBack", "True: the store lost the end of the session's log."


class TurnComplete(Reason):
    """Reasons of AgentSession TurnComplete: True while the session is idle after a turn."""

    END_TURN = "EndTurn", "True: the model ended its turn; all messages are answered."
    REQUIRES_ACTION = (
        "RequiresAction",
        "True: the turn waits for people: a tool call has permission Ask and needs an approval.",
    )
    INTERRUPTED = "Interrupted", "True: somebody interrupted the turn."
    BUDGET_REACHED = "BudgetReached", "True: spec.budget is used up."
    REFUSED = "Refused", "True: the model refused to go on (stop reason refusal)."
    ERROR = (
        "Error",
        "True: the turn ended with an error: retries were used up, or the session was terminated. "
        "status.error says which.",
    )
    RUNNING = "Running", "False: a turn is being worked on, or waits for a harness."
    PENDING = "Pending", "False: no turn has started yet."
    SUSPENDED = "Suspended", "False: the session was suspended before its turn ended."


class Succeeded(Reason):
    """Reasons of AgentSession Succeeded: how the run as a whole ended; Unknown while it can go on."""

    COMPLETED = "Completed", "True: the session was ended after a turn that ended with EndTurn."
    ERROR = "Error", "False: the last turn ended with an error; a new message starts another turn."
    REFUSED = "Refused", "False: the model refused to go on."
    BUDGET_REACHED = "BudgetReached", "False: spec.budget is used up; raise it and send a message."
    TERMINATED = "Terminated", "False: the session was ended before its turn was complete."
    PENDING = "Pending", "Unknown: no turn has started yet."
    RUNNING = "Running", "Unknown: a turn is being worked on."
    IDLE = "Idle", "Unknown: the last turn ended with EndTurn; another message can follow."
    REQUIRES_ACTION = "RequiresAction", "Unknown: the turn waits for an approval."
    INTERRUPTED = "Interrupted", "Unknown: the turn was interrupted; another message can follow."
    SUSPENDED = "Suspended", "Unknown: the session is suspended."


class StoreDurable(Reason):
    """Reasons of AgentSession StoreDurable: the store keeps the log as `store.profile` demands."""

    DEV = "Dev", "True: profile dev is demanded and kept."
    STANDARD = "Standard", "True: profile standard is demanded and kept."
    STRICT = "Strict", "True: profile strict is demanded and kept."
    MANAGED = "Managed", "True: profile managed: the provider's word is taken for it."
    WEAKER_THAN_DEMANDED = (
        "WeakerThanDemanded",
        "False: the store keeps less than store.profile demands; the message says what, why and what to "
        "do. Under store.allowWeaker the session runs all the same.",
    )
    STORE_UNAVAILABLE = "StoreUnavailable", "Unknown: the store of the log does not answer."
    NOT_OBSERVED = "NotObserved", "Unknown: the operator could not look at the store yet."


class ContextProfileFits(Reason):
    """Reasons of AgentSession ContextProfileFits: its context profile was made for its model.

    Present from the moment when a harness has chosen the profile, before the first request.
    """

    MADE_FOR_MODEL = (
        "MadeForModel",
        "True: the profile names the model among those it was made for.",
    )
    NOT_MADE_FOR_MODEL = (
        "NotMadeForModel",
        "False: the profile was not made for the model and may cost more or lose more than another one; the "
        "session runs all the same. See docs/context-profiles.md.",
    )


class SandboxReady(Reason):
    """Reasons of Sandbox Ready: a session can execute in it."""

    READY = "Ready", "True: the pod is Ready: egress is enforced, proxy and sandboxd answer."
    SUSPENDED = "Suspended", "False: spec.operatingMode is Suspended, so there is no pod."
    PENDING = "Pending", "False: the pod was made and is not yet scheduled."
    STARTING = "Starting", "False: the pod is scheduled; its containers are starting."
    ENVIRONMENT_NOT_FOUND = (
        "EnvironmentNotFound",
        "False: the Environment of spec.environmentRef does not exist (yet).",
    )
    CONFIG_MAP_NOT_FOUND = (
        "ConfigMapNotFound",
        "False: a ConfigMap of spec.resources does not exist (yet), or lacks a key.",
    )
    INVALID_SPEC = "InvalidSpec", "False: no pod can be made from the spec; the message says why."
    POD_REFUSED = (
        "PodRefused",
        "False: the API server refused the pod: quota, admission policy or pod security.",
    )
    UNSCHEDULABLE = "Unschedulable", "False: no node fits the pod; the message is the scheduler's."
    IMAGE_UNAVAILABLE = "ImageUnavailable", "False: an image of the pod cannot be pulled."
    CONTAINER_NOT_CREATED = (
        "ContainerNotCreated",
        "False: the node cannot create a container of the pod; the message is the kubelet's.",
    )
    EGRESS_NOT_ENFORCED = (
        "EgressNotEnforced",
        "False: the rules of the pod could not be loaded or did not hold; see EgressEnforced.",
    )
    STARTUP_TIMEOUT = (
        "StartupTimeout",
        "False: the pod was not Ready within the environment's startupTimeoutSeconds.",
    )
    CRASHED = "Crashed", "False: a container of the pod ends again and again."
    POD_LOST = "PodLost", "False: the pod failed, was evicted or deleted; what ran in it is lost."
    FOREIGN_POD = (
        "ForeignPod",
        "False: a pod of this name exists that this Sandbox does not own; it is left alone.",
    )
    NAMESPACE_NOT_SERVED = (
        "NamespaceNotServed",
        "False: the namespace is not among the chart's tenants.",
    )
    EXPIRED = "Expired", "False: spec.ttlSecondsAfterCreation is over."
    DELETING = "Deleting", "False: the object is being deleted."


class EgressEnforced(Reason):
    """Reasons of Sandbox EgressEnforced: its network rules are loaded and were seen to hold."""

    VERIFIED = "Verified", "True: a check under the sandbox's own user id reached nothing."
    PENDING = "Pending", "Unknown: the check has not run yet, or there is no pod."
    RULES_FAILED = (
        "RulesFailed",
        "False: the rules could not be loaded; the message names the feature that the node lacks.",
    )
    VERIFY_FAILED = "VerifyFailed", "False: the check reached something that it must not reach."


class SandboxReconciling(Reason):
    """Reasons of Sandbox Reconciling: present (True) only while something is on its way."""

    STARTING = "Starting", "True: the pod is being made or is starting."
    STOPPING = "Stopping", "True: the pod is being deleted."
    WAITING_FOR_REFERENCE = (
        "WaitingForReference",
        "True: an Environment or ConfigMap that spec names does not exist yet.",
    )


class SandboxStalled(Reason):
    """Reasons of Sandbox Stalled: present (True) only when trying again cannot help."""

    INVALID_SPEC = "InvalidSpec", "True: no pod can be made from the spec."
    EGRESS_NOT_ENFORCED = "EgressNotEnforced", "True: the node cannot enforce the rules."
    STARTUP_TIMEOUT = "StartupTimeout", "True: the pod was not Ready in time."
    IMAGE_UNAVAILABLE = "ImageUnavailable", "True: several tries to pull an image failed."
    CONTAINER_NOT_CREATED = (
        "ContainerNotCreated",
        "True: several tries to create a container failed.",
    )
    POD_LOST = "PodLost", "True: the pod is gone, and with it this hand."
    FOREIGN_POD = "ForeignPod", "True: a pod of this name belongs to somebody else."
    NAMESPACE_NOT_SERVED = (
        "NamespaceNotServed",
        "True: the namespace is not among the chart's tenants.",
    )


REASONS: dict[str, dict[str, type[Reason]]] = {
    "AgentSession": {
        SessionCondition.READY: SessionReady,
        SessionCondition.RECONCILING: SessionReconciling,
        SessionCondition.STALLED: SessionStalled,
        SessionCondition.TURN_COMPLETE: TurnComplete,
        SessionCondition.SUCCEEDED: Succeeded,
        SessionCondition.STORE_DURABLE: StoreDurable,
        SessionCondition.CONTEXT_PROFILE_FITS: ContextProfileFits,
    },
    "Sandbox": {
        SandboxCondition.READY: SandboxReady,
        SandboxCondition.EGRESS_ENFORCED: EgressEnforced,
        SandboxCondition.RECONCILING: SandboxReconciling,
        SandboxCondition.STALLED: SandboxStalled,
    },
}
"""kind -> condition type -> its reasons."""
