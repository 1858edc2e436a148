"""Names of the things that a session owns, from docs/interfaces.md section 1: pure text.

Used by builders and by the controller; the broker and the gateway read the labels that come from here.
"""

from __future__ import annotations

import hashlib
from typing import Final

LABEL_LIMIT: Final = 63
"""Longest value of a Kubernetes label."""


def session_id(uid: str) -> str:
    """Session id of an AgentSession: `sesn_` and its uid without dashes."""
    return f"sesn_{uid.replace('-', '')}"


def sandbox_name(session: str, hand: str, instance: int) -> str:
    """Name of the Sandbox that is one instance of a session's hand."""
    return f"{session.removeprefix('sesn_')[:12]}-{hand}-{instance}"


def label_value(name: str) -> str:
    """A name as a label value: itself, or its beginning and a hash where it is too long."""
    if len(name) <= LABEL_LIMIT:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{name[: LABEL_LIMIT - 11].rstrip('-.')}-{digest}"
