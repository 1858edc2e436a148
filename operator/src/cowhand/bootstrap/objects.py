"""The objects that bootstrap makes, and the text of the store's user file: pure.

Used by `cowhand.bootstrap.run`; names are those of docs/interfaces.md section 1.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cowhand.api import labels
from cowhand.bootstrap.certs import KeyPair
from cowhand.session.acl import CONTROL_USERS, users_acl

Manifest = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY_VALUE = "cowhand-bootstrap"
LABELS = {labels.APP_NAME: labels.APP_NAME_VALUE, MANAGED_BY: MANAGED_BY_VALUE}

SERVICES = ("archive", "broker", "gateway", "store")
"""Components that serve TLS; each has a Service `cowhand-<component>`."""


PROBE_USER = "probe"
PROBE_RULE = f"user {PROBE_USER} on nopass resetkeys resetchannels -@all +ping"
"""The store's readiness check: may do nothing but PING, which fails while data is loaded."""


def tls_secret(component: str) -> str:
    """Name of the Secret with a component's certificate."""
    return f"cowhand-tls-{component}"


OWN_SECRETS = (
    labels.CA_SECRET,
    labels.STORE_ACL_SECRET,
    *(f"cowhand-store-{user}" for user in CONTROL_USERS),
    *(tls_secret(component) for component in SERVICES),
)
"""Secrets that bootstrap makes in the control plane's namespace."""


def _metadata(namespace: str, name: str) -> Manifest:
    return {"name": name, "namespace": namespace, "labels": dict(LABELS)}


def secret(namespace: str, name: str, data: Mapping[str, str], kind: str = "Opaque") -> Manifest:
    """A Secret; values are text."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": kind,
        "metadata": _metadata(namespace, name),
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


def tls(namespace: str, name: str, pair: KeyPair) -> Manifest:
    """A Secret with a certificate and its key."""
    data = {"tls.crt": pair.certificate, "tls.key": pair.key}
    return secret(namespace, name, data, "kubernetes.io/tls")


def ca_config_map(namespace: str, certificate: str) -> Manifest:
    """The ConfigMap that every pod of ours mounts to check certificates."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(namespace, labels.CA_CONFIG_MAP),
        "data": {labels.CA_KEY: certificate},
    }


def value(found: Mapping[str, Any], key: str) -> str:
    """One value of a Secret as text, empty if it is absent."""
    raw = (found.get("data") or {}).get(key)
    return base64.b64decode(raw).decode() if raw else ""


def pair_of(found: Mapping[str, Any]) -> KeyPair:
    """The key pair in a TLS Secret."""
    return KeyPair(value(found, "tls.crt"), value(found, "tls.key"))


def acl_text(
    passwords: Mapping[str, str], tenants: Sequence[str], prefix: str, existing: str = ""
) -> str:
    """The store's user file.

    Users that are not ours stay as they are; ours are always as they should be, so that a new tenant
    gets its user, a tenant that is no longer served loses it, and `default` is off.

    Args:
        passwords: user -> password in clear.
        tenants: namespaces that are served.
        prefix: first part of every key.
        existing: the file as it is.

    Raises:
        UserError: a user has no password, or a name is malformed.
    """
    hashed = {
        user: hashlib.sha256(password.encode()).hexdigest() for user, password in passwords.items()
    }
    foreign = [line for line in existing.splitlines() if _is_foreign(line)]
    return users_acl(hashed, tenants, prefix) + "\n".join([PROBE_RULE, *foreign]) + "\n"


def _is_foreign(line: str) -> bool:
    words = line.split()
    if len(words) < 2 or words[0] != "user":
        return False
    return words[1] not in ("default", PROBE_USER, *CONTROL_USERS) and not words[1].startswith("t-")
