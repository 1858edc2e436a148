"""The Sandbox resource of one instance of a session's hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cowhand.api import labels
from cowhand.api.v1alpha1 import OperatingMode
from cowhand.desired import names

Manifest = dict[str, Any]


@dataclass(frozen=True)
class SandboxOf:
    """What a session's Sandbox is made of.

    Attributes:
        namespace: the tenant.
        session_id: holder.
        hand: name of the hand.
        instance: from 1.
        environment: frozen EnvironmentSpec as JSON, from the log.
        resources: FileResources as JSON, from the log.
        owner_name: the AgentSession, empty for sessions without one.
        owner_uid: its uid.
    """

    namespace: str
    session_id: str
    hand: str
    instance: int
    environment: Mapping[str, Any]
    resources: Sequence[Mapping[str, Any]]
    owner_name: str = ""
    owner_uid: str = ""


def hand_labels(session_id: str, hand: str, instance: int) -> dict[str, str]:
    """Labels that say whose hand a Sandbox or pod is."""
    return {
        labels.SESSION_ID: session_id,
        labels.HAND: hand,
        labels.INSTANCE: str(instance),
    }


def session_sandbox(of: SandboxOf, mode: OperatingMode) -> Manifest:
    """The Sandbox, owned by the AgentSession if there is one."""
    name = names.sandbox_name(of.session_id, of.hand, of.instance)
    metadata: Manifest = {
        "namespace": of.namespace,
        "name": name,
        "labels": {
            labels.APP_NAME: labels.APP_NAME_VALUE,
            labels.APP_COMPONENT: labels.COMPONENT_SANDBOX,
            labels.SANDBOX: names.label_value(name),
            **hand_labels(of.session_id, of.hand, of.instance),
        },
    }
    if of.owner_uid:
        metadata["ownerReferences"] = [
            {
                "apiVersion": labels.API_VERSION,
                "kind": "AgentSession",
                "name": of.owner_name,
                "uid": of.owner_uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ]
    spec: Manifest = {
        "environment": dict(of.environment),
        "holder": {"sessionID": of.session_id, "hand": of.hand, "instance": of.instance},
        "operatingMode": mode,
    }
    if of.resources:
        spec["resources"] = [dict(resource) for resource in of.resources]
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "Sandbox",
        "metadata": metadata,
        "spec": spec,
    }
