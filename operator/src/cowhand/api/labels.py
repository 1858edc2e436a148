"""Names that several parts use, from docs/interfaces.md section 1: one place for each.

Imported by builders, controllers, broker and gateway; nothing here is computed.
"""

from __future__ import annotations

from typing import Final

GROUP: Final = "cowhand.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "cowhand.dev/v1alpha1"
CATEGORY: Final = "cowhand"

# Labels.
APP_NAME: Final = "app.kubernetes.io/name"
APP_NAME_VALUE: Final = "cowhand"
APP_COMPONENT: Final = "app.kubernetes.io/component"
SESSION_ID: Final = "cowhand.dev/session-id"
HAND: Final = "cowhand.dev/hand"
INSTANCE: Final = "cowhand.dev/instance"
SANDBOX: Final = "cowhand.dev/sandbox"

COMPONENT_OPERATOR: Final = "operator"
COMPONENT_BROKER: Final = "broker"
COMPONENT_GATEWAY: Final = "gateway"
COMPONENT_HARNESS: Final = "harness"
COMPONENT_STORE: Final = "store"
COMPONENT_ARCHIVE: Final = "archive"
COMPONENT_SANDBOX: Final = "sandbox"

# Annotations.
ALLOWED_HOSTS: Final = "cowhand.dev/allowed-hosts"
"""On a Secret: hosts its value may be sent to, comma separated `host` or `host:port`."""

FINALIZER: Final = "cowhand.dev/session"
"""On AgentSession: its log still has to be ended."""

FIELD_MANAGER: Final = "cowhand-operator"
STATUS_FIELD_MANAGER: Final = "cowhand-operator-status"

# ServiceAccounts.
ACCOUNT_OPERATOR: Final = "cowhand-operator"
ACCOUNT_BROKER: Final = "cowhand-broker"
ACCOUNT_GATEWAY: Final = "cowhand-gateway"
ACCOUNT_HARNESS: Final = "cowhand-harness"
ACCOUNT_SANDBOX: Final = "cowhand-sandbox"
ACCOUNT_CLI: Final = "cowhand-cli"

# Objects that have one name everywhere.
HARNESS_DEPLOYMENT: Final = "cowhand-harness"
CA_CONFIG_MAP: Final = "cowhand-ca"
CA_KEY: Final = "ca.crt"
CA_SECRET: Final = "cowhand-ca-key"  # noqa: S105 - the name of a Secret
STORE_SECRET: Final = "cowhand-store"  # noqa: S105 - the name of a Secret
STORE_IDENTITY: Final = "cowhand-store-identity"
"""ConfigMap of the release namespace: which store this is; the operator makes it."""
STORE_ACL_SECRET: Final = "cowhand-store-acl"  # noqa: S105 - the name of a Secret

# Token audiences.
AUDIENCE_BROKER: Final = "cowhand-broker"
AUDIENCE_GATEWAY: Final = "cowhand-gateway"
AUDIENCE_ARCHIVE: Final = "cowhand-archive"

# User ids inside our pods.
UID_COWHAND: Final = 62017
UID_SANDBOX: Final = 1000
UID_STORE: Final = 999
