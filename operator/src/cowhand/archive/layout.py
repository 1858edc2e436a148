"""Paths of the archive's objects, and who may ask for which: pure.

Everything of a session lies below `<namespace>/<session id>/`, so that deleting it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cowhand.kube.review import Caller, Refusal, check_pod_account
from cowhand.session import archive
from cowhand.session.blobs import Span

NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SESSION: Final = re.compile(r"sesn_[0-9a-f]{32}")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
SPAN: Final = re.compile(r"([1-9][0-9]{0,11})-([1-9][0-9]{0,11})")


@dataclass(frozen=True)
class Names:
    """Whom the archive serves.

    Attributes:
        tenants: namespaces.
        control: user names of gateway and operator, which may ask for every tenant.
        harness: service account of harness pods, which may ask for their own namespace.
    """

    tenants: Sequence[str]
    control: Sequence[str]
    harness: str


def session_folder(namespace: str, session_id: str) -> str:
    """Folder of a session.

    Raises:
        ValueError: the names are not those of a namespace and a session.
    """
    if not NAMESPACE.fullmatch(namespace) or not SESSION.fullmatch(session_id):
        raise ValueError(f"{namespace!r}/{session_id!r} is not a session")
    return f"{namespace}/{session_id}"


def blob_path(namespace: str, session_id: str, sha256: str) -> str:
    """Path of a blob; raises ValueError."""
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is not a SHA-256 in hex")
    return f"{session_folder(namespace, session_id)}/blobs/{sha256}"


def segments_folder(namespace: str, session_id: str) -> str:
    """Folder of a session's segments; raises ValueError."""
    return f"{session_folder(namespace, session_id)}/segments"


def segment_path(namespace: str, session_id: str, span: Span) -> str:
    """Path of a segment; raises ValueError."""
    return f"{segments_folder(namespace, session_id)}/{archive.name(span)}"


def check_caller(caller: Caller, namespace: str, names: Names) -> Refusal | None:
    """Whether a caller may read and write what belongs to sessions of a namespace."""
    if namespace not in names.tenants:
        return Refusal("forbidden", f"The namespace {namespace} is not a tenant.")
    if caller.user in names.control:
        if not caller.pod_uid:
            return Refusal("forbidden", "The token is not bound to a pod; use a projected token.")
        return None
    refusal = check_pod_account(caller, names.harness, names.tenants)
    if refusal is None and caller.namespace != namespace:
        text = f"A pod of {caller.namespace} may not ask for sessions of {namespace}."
        return Refusal("forbidden", text)
    return refusal
