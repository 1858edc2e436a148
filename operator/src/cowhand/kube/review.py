"""Who calls one of our servers: TokenReview, cached briefly by the hash of the token.

Used by the broker and the archive, whose callers are pods with projected tokens. Nobody's word is taken for who they
are: a pod is what TokenReview says.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from cowhand.kube.client import Kube

POD_UID_EXTRA: Final = "authentication.kubernetes.io/pod-uid"
POD_NAME_EXTRA: Final = "authentication.kubernetes.io/pod-name"

_ACCOUNT: Final = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})")

ACCEPTED_S: Final = 60.0
"""A token of a pod that is gone works for at most this long."""

REFUSED_S: Final = 5.0
"""A refused token is not asked about again for this long: it must not become load on the API server."""

MAX_ENTRIES: Final = 8192
MAX_TOKEN: Final = 16 * 1024

Kind = Literal["unauthenticated", "forbidden", "not_found", "invalid", "unavailable"]

STATUS: Final[dict[Kind, int]] = {
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "invalid": 400,
    "unavailable": 503,
}
"""HTTP status of a refusal."""


@dataclass(frozen=True)
class Refusal:
    """Why something is not given; the message is for people and never quotes a secret."""

    type: Kind
    message: str


@dataclass(frozen=True)
class Caller:
    """Whom a token belongs to, by TokenReview.

    Attributes:
        user: user name.
        namespace: namespace of the service account.
        account: name of the service account.
        pod_uid: uid of the pod that the token is bound to, or empty.
        pod_name: its name, or empty.
    """

    user: str
    namespace: str
    account: str
    pod_uid: str
    pod_name: str


def caller_of(status: Mapping[str, Any], audience: str) -> Caller | Refusal:
    """The caller from the `status` of a TokenReview; it must be for this audience."""
    if status.get("authenticated") is not True:
        return Refusal("unauthenticated", "The API server does not accept this token.")
    if audience not in (status.get("audiences") or ()):
        text = f"The token is not for the audience {audience}."
        return Refusal("unauthenticated", text)
    user = status.get("user") or {}
    name = str(user.get("username") or "")
    match = _ACCOUNT.fullmatch(name)
    if match is None:
        return Refusal("forbidden", "Only service accounts are served here.")
    extra = user.get("extra") or {}
    return Caller(
        name, match[1], match[2], _only(extra, POD_UID_EXTRA), _only(extra, POD_NAME_EXTRA)
    )


def _only(extra: Mapping[str, Any], name: str) -> str:
    values = list(extra.get(name) or ())
    return str(values[0]) if len(values) == 1 else ""


def check_pod_account(caller: Caller, account: str, tenants: Sequence[str]) -> Refusal | None:
    """The caller must be a pod of this service account in a namespace that we serve."""
    if caller.account != account:
        text = f"The service account {caller.account} may not do this; {account} may."
        return Refusal("forbidden", text)
    if caller.namespace not in tenants:
        return Refusal("forbidden", f"The namespace {caller.namespace} is not a tenant.")
    if not caller.pod_uid or not caller.pod_name:
        return Refusal("forbidden", "The token is not bound to a pod; use a projected token.")
    return None


class Reviewer:
    """Asks the API server whom a token belongs to.

    Args:
        kube: the Kubernetes API.
        audience: whom a token must be for.
        clock: monotonic seconds.
    """

    def __init__(
        self, kube: Kube, audience: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._audience = audience
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, Caller | Refusal]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Caller | Refusal]] = {}

    async def caller(self, authorization: str) -> Caller | Refusal:
        """The caller of a request by its `Authorization` header.

        Raises:
            KubeUnavailable: the API server does not answer.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN:
            return Refusal("unauthenticated", "Send this pod's token: Authorization: Bearer ...")
        key = hashlib.sha256(token.encode()).digest()
        known = self._known.get(key)
        if known is not None and self._clock() < known[0]:
            return known[1]
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.create_task(self._ask(key, token))
            self._asking[key] = asking
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(asking)

    async def _ask(self, key: bytes, token: str) -> Caller | Refusal:
        answer = await self._kube.create(
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [self._audience]},
            }
        )
        found = caller_of(answer.get("status") or {}, self._audience)
        life = REFUSED_S if isinstance(found, Refusal) else ACCEPTED_S
        self._known[key] = (self._clock() + life, found)
        self._known.move_to_end(key)
        if len(self._known) > MAX_ENTRIES:
            self._known.popitem(last=False)
        return found
