"""Every decision of the broker, pure: who a caller is, what they may have, and why not.

Nobody's word is taken for a session. A pod is what TokenReview says and what the API server holds; a
lease is what the store holds; a hand record counts only with our own signature. `app.py` fetches these
and asks here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from cowhand.api import labels
from cowhand.kube.review import Caller, Refusal
from cowhand.session.log import HandRecord, SessionState
from cowhand.session.slots import Asked

_SESSION: Final = re.compile(r"sesn_[0-9a-f]{32}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SLOT: Final = re.compile(r"[0-9a-z]{1,16}")

MAX_SLOTS: Final = 4096
"""Requests that one proxy may name at a time; it serves 2048 connections."""

MAX_COUNT: Final = 1_000_000
MAX_PAUSE_MS: Final = 60_000
"""A proxy cannot stop a workspace for longer than the endpoint's limits last, which are per minute."""


@dataclass(frozen=True)
class Registration:
    """What a sandbox's proxy says of itself."""

    port: int
    cert_sha256: str


def registration_of(body: Mapping[str, Any]) -> Registration | Refusal:
    """The body of `POST /v1/register`."""
    port, digest = body.get("port"), body.get("cert_sha256")
    if type(port) is not int or not 0 < port < 65536:
        return Refusal("invalid", "port must be a number from 1 to 65535.")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        return Refusal("invalid", "cert_sha256 must be 64 lower-case hex digits.")
    return Registration(port, digest)


def sandbox_owner(pod: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and uid of the Sandbox that controls a pod, None if none does."""
    for owner in (pod.get("metadata") or {}).get("ownerReferences") or ():
        if (
            owner.get("kind") == "Sandbox"
            and owner.get("apiVersion") == labels.API_VERSION
            and owner.get("controller") is True
        ):
            return str(owner.get("name")), str(owner.get("uid"))
    return None


def check_pod(caller: Caller, pod: Mapping[str, Any] | None) -> Refusal | None:
    """The pod of the token must still be there, and be the same one."""
    if pod is None or (pod.get("metadata") or {}).get("uid") != caller.pod_uid:
        return Refusal("forbidden", "The pod of this token does not exist any more.")
    if (pod.get("spec") or {}).get("serviceAccountName") != caller.account:
        return Refusal("forbidden", "The pod runs under another service account.")
    return None


def same_address(peer: str, addresses: Sequence[str]) -> str | None:
    """The one of `addresses` that `peer` is, compared as addresses; None if it is none of them."""
    try:
        ip = ipaddress.ip_address(peer.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return next((a for a in addresses if ipaddress.ip_address(a) == ip), None)
    except ValueError:
        return None


def hand_record(
    pod: Mapping[str, Any],
    sandbox: Mapping[str, Any] | None,
    peer: str,
    asked: Registration,
    previous: HandRecord | None,
) -> HandRecord | Refusal:
    """The record of a sandbox that registers, unsigned.

    Args:
        pod: the caller's pod, already checked against its token.
        sandbox: the Sandbox that controls it, as the API server holds it, None if it does not exist.
        peer: address that the request came from.
        asked: port and certificate.
        previous: an older record of the same sandbox with a valid signature of ours, else None.
    """
    meta = pod["metadata"]
    owner = sandbox_owner(pod)
    if owner is None:
        return Refusal("forbidden", "The pod is not controlled by a Sandbox.")
    found = (sandbox or {}).get("metadata") or {}
    if found.get("uid") != owner[1] or found.get("name") != meta.get("name"):
        # The pod of a Sandbox has its name: nobody can put a second pod in its place.
        return Refusal("forbidden", "The pod's Sandbox does not exist, or has another name.")
    status = pod.get("status") or {}
    addresses = [str(entry.get("ip")) for entry in status.get("podIPs") or ()]
    if status.get("podIP"):
        addresses.append(str(status["podIP"]))
    address = same_address(peer, addresses)
    if address is None:
        return Refusal(
            "forbidden", f"The request came from {peer}, which is not the pod's address."
        )
    holder = _holder(meta, (sandbox or {}).get("spec") or {})
    if isinstance(holder, Refusal):
        return holder
    session_id, hand, instance = holder
    if previous is not None and previous.state == "Lost":
        return Refusal("forbidden", "This sandbox was declared lost; a new one takes its place.")
    kept = previous is not None and previous.owner_epoch > 0
    return HandRecord(
        session_id=session_id,
        hand=hand,
        instance=instance,
        state="Ready",
        sandbox=owner[0],
        sandbox_uid=owner[1],
        pod_uid=str(meta["uid"]),
        address=f"[{address}]:{asked.port}" if ":" in address else f"{address}:{asked.port}",
        cert_sha256=asked.cert_sha256,
        # A transfer since the first registration stays in force when the proxy restarts.
        owner=previous.owner if previous is not None and kept else session_id,
        owner_epoch=previous.owner_epoch
        if previous is not None and kept
        else int(bool(session_id)),
    )


def _holder(meta: Mapping[str, Any], spec: Mapping[str, Any]) -> tuple[str, str, int] | Refusal:
    """Session, hand and instance: the pod's labels and the Sandbox's holder must say the same."""
    marks = meta.get("labels") or {}
    labelled = tuple(
        str(marks.get(k, "")) for k in (labels.SESSION_ID, labels.HAND, labels.INSTANCE)
    )
    holder = spec.get("holder")
    if holder is None:
        if any(labelled):
            return Refusal("forbidden", "The pod names a session, its Sandbox has no holder.")
        return "", "", 0
    held = tuple(str(holder.get(k, "")) for k in ("sessionID", "hand", "instance"))
    if labelled != held:
        return Refusal("forbidden", "The pod's labels and its Sandbox's holder differ.")
    if not _SESSION.fullmatch(held[0]) or not held[1] or not held[2].isdecimal():
        return Refusal("forbidden", "The holder of the Sandbox is not complete.")
    return held[0], held[1], int(held[2])


def session_named(body: Mapping[str, Any]) -> tuple[str, str] | Refusal:
    """Session id and lease in the body of a harness pod's request."""
    session_id, lease = body.get("session_id"), body.get("lease")
    if not isinstance(session_id, str) or not _SESSION.fullmatch(session_id):
        return Refusal("invalid", "session_id must be sesn_ and 32 hex digits.")
    if not isinstance(lease, str) or not 0 < len(lease) <= 256:
        return Refusal("invalid", "lease must be the lease string of the session.")
    return session_id, lease


def lease_epoch(caller: Caller, state: SessionState, lease: str) -> int | Refusal:
    """Epoch of a lease that is live and held by the calling pod, in the session's own namespace."""
    if state.meta.namespace != caller.namespace:
        return Refusal("forbidden", "The session belongs to another namespace.")
    if not state.lease or lease != state.lease:
        return Refusal(
            "forbidden", "The lease is not live: another worker holds the session, or nobody."
        )
    epoch, _, rest = lease.partition(":")
    worker = rest.partition(":")[0]
    if not epoch.isdecimal() or not worker.startswith(f"{caller.pod_uid}."):
        return Refusal("forbidden", "The lease is held by a worker in another pod.")
    return int(epoch)


def owned_hand(record: HandRecord | None, session_id: str) -> HandRecord | Refusal:
    """The record of a sandbox that a session may execute in.

    Args:
        record: the newest record with a valid signature of ours, else None.
        session_id: the session that asks.
    """
    if record is None or record.state != "Ready":
        return Refusal("not_found", "There is no such sandbox, or it is not ready.")
    if record.owner != session_id or record.owner_epoch < 1:
        return Refusal("forbidden", "The sandbox belongs to another session.")
    return record


@dataclass(frozen=True)
class ExecRequest:
    """What the gateway asks for a person."""

    namespace: str
    sandbox_uid: str
    actor: str


def exec_request(
    caller: Caller, body: Mapping[str, Any], gateway: str, tenants: Sequence[str]
) -> ExecRequest | Refusal:
    """The body of `POST /v1/exec-token`, which only the gateway's account may send."""
    if caller.user != gateway:
        return Refusal("forbidden", "Only the gateway may ask for exec tokens.")
    values = [body.get(name) for name in ("namespace", "sandbox_uid", "actor")]
    if not all(isinstance(value, str) and 0 < len(value) <= 512 for value in values):
        return Refusal("invalid", "namespace, sandbox_uid and actor must be given as text.")
    namespace, sandbox_uid, actor = (str(value) for value in values)
    if namespace not in tenants:
        return Refusal("not_found", f"The namespace {namespace} is not a tenant.")
    return ExecRequest(namespace, sandbox_uid, actor)


def slots_asked(body: Mapping[str, Any]) -> tuple[str, Asked] | Refusal:
    """The pool and what a harness proxy says of its requests, from the body of `POST /v1/model-slots`."""
    wrong = Refusal(
        "invalid",
        'Send {"pool": 64 hex digits, "client": text, "waiting": number, "wanted", "held", "done": lists of ids,'
        ' "pause_ms"?: number}.',
    )
    pool, client = body.get("pool"), body.get("client")
    counts = body.get("waiting"), body.get("pause_ms", 0)
    ids = [body.get(name) for name in ("wanted", "held", "done")]
    if not isinstance(pool, str) or not _HASH.fullmatch(pool):
        return wrong
    if not isinstance(client, str) or not _SLOT.fullmatch(client):
        return wrong
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        return wrong
    if not all(isinstance(items, list) and len(items) <= MAX_SLOTS for items in ids):
        return wrong
    wanted, held, done = (tuple(items or ()) for items in ids)
    if not all(isinstance(i, str) and _SLOT.fullmatch(i) for i in (*wanted, *held, *done)):
        return wrong
    waiting, pause_ms = (int(count or 0) for count in counts)
    return pool, Asked(client, waiting, wanted, held, done, min(pause_ms, MAX_PAUSE_MS))


def secret_of(model: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and key of the Secret in a session's frozen model, None if the endpoint needs no key."""
    secret = model.get("secret")
    if not secret:
        return None
    return str(secret.get("name", "")), str(secret.get("key", ""))


def check_allowed_host(base_url: str, secret: str, annotation: str) -> Refusal | None:
    """The Secret must list the host that its value goes to.

    Args:
        base_url: where the key would be sent.
        secret: name of the Secret, for the message.
        annotation: value of `cowhand.dev/allowed-hosts`: `host` (any port, https only) or `host:port`.
            Plain HTTP needs the port, and never 443: the base URL of a session stands in the store, where
            its tenant's harness could take the `s` away.
    """
    wrong = Refusal("invalid", f"The model's base URL {base_url!r} is not http(s)://host.")
    try:
        parts = urlsplit(base_url)
        host = (parts.hostname or "").lower()
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return wrong
    if parts.scheme not in ("http", "https") or not host:
        return wrong
    name = f"[{host}]" if ":" in host else host
    allowed = {word.strip().lower() for word in annotation.split(",") if word.strip()}
    secure = parts.scheme == "https"
    if f"{name}:{port}" in allowed and (secure or port != 443):
        return None
    if secure and name in allowed:
        return None
    listed = ", ".join(sorted(allowed)) or "none"
    return Refusal(
        "forbidden",
        f"The Secret {secret} may not be sent to {parts.scheme}://{name}:{port}: its annotation"
        f" {labels.ALLOWED_HOSTS} lists {listed}. Add {name if secure else f'{name}:{port}'} there if"
        " that is meant.",
    )
