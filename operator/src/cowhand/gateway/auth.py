"""Who calls (TokenReview), and whether they may (SubjectAccessReview): Kubernetes decides, we only ask.

Rights are granted with ordinary RBAC on virtual subresources of `agentsessions.cowhand.dev` (`events`,
`messages`, `approvals`, `exec`); they exist only as words in a Role. Answers are cached briefly, so that
a stream of requests is not a stream of reviews: a revoked right works on for at most the life of its entry.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from cowhand.gateway.errors import Forbidden, Unknown
from cowhand.kube.client import Kube

AUDIENCE: Final = "cowhand-gateway"
"""Audience that a caller's token must be bound to."""

TOKEN_TTL_S: Final = 60.0
REFUSED_TTL_S: Final = 5.0
ACCESS_TTL_S: Final = 10.0
ENTRIES: Final = 4096
"""Bound of each cache; the oldest entry goes first."""

V = TypeVar("V")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Caller:
    """A person or program that Kubernetes knows.

    Attributes:
        user: user name, for example `system:serviceaccount:default:cowhand-cli`.
        uid: uid of the user, may be empty.
        groups: groups of the user.
        extra: further attributes that authorizers may look at, name -> values.
    """

    user: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def actor(self) -> dict[str, Any]:
        """What is written into an event as `actor`."""
        return {"user": self.user, "groups": list(self.groups), "via": "gateway"}


@dataclass(frozen=True)
class Right:
    """One verb on one virtual subresource, in one namespace.

    Attributes:
        name: name of the AgentSession, so that `resourceNames` of a Role work; empty for all.
    """

    verb: str
    subresource: str
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        where = f" on {self.name}" if self.name else ""
        return (
            f"{self.verb} agentsessions/{self.subresource}.cowhand.dev{where} "
            f"in namespace {self.namespace}"
        )


@dataclass
class Expiring(Generic[V]):
    """A bounded map whose entries die after their time."""

    clock: Clock
    limit: int = ENTRIES
    _entries: OrderedDict[Hashable, tuple[float, V]] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> V | None:
        """The live entry, or None."""
        found = self._entries.get(key)
        if found is None:
            return None
        if found[0] <= self.clock():
            del self._entries[key]
            return None
        return found[1]

    def put(self, key: Hashable, value: V, ttl_s: float) -> None:
        """Set an entry; the oldest goes when there are too many."""
        self._entries.pop(key, None)
        self._entries[key] = (self.clock() + ttl_s, value)
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)

    def pop(self, key: Hashable) -> V | None:
        """Take a live entry out."""
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def __len__(self) -> int:
        return len(self._entries)


class Authority:
    """Asks the Kubernetes API who a caller is and what they may do."""

    def __init__(self, kube: Kube, clock: Clock = time.monotonic) -> None:
        self._kube = kube
        self._callers: Expiring[Caller | str] = Expiring(clock)
        self._rights: Expiring[tuple[bool, str]] = Expiring(clock)

    async def authenticate(self, authorization: str | None, api_key: str | None) -> Caller:
        """Who holds this token.

        Args:
            authorization: value of the header `Authorization`, `Bearer <token>`.
            api_key: value of `X-Api-Key`, where older official clients put the same token.

        Raises:
            Unknown: no token, or Kubernetes does not accept it for our audience.
            KubeUnavailable: no answer from the API server.
            Denied: the gateway itself may not ask for reviews.
        """
        token = _token(authorization) or (api_key or "").strip()
        if not token:
            raise Unknown(
                "no token: send `Authorization: Bearer <token>`; make one with "
                f"`kubectl create token cowhand-cli --audience {AUDIENCE}`"
            )
        key = hashlib.sha256(token.encode()).digest()
        found = self._callers.get(key)
        if found is None:
            found = await self._review(token)
            ttl = TOKEN_TTL_S if isinstance(found, Caller) else REFUSED_TTL_S
            self._callers.put(key, found, ttl)
        if isinstance(found, str):
            raise Unknown(found)
        return found

    async def _review(self, token: str) -> Caller | str:
        review = await self._kube.create(
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [AUDIENCE]},
            }
        )
        status = review.get("status") or {}
        # A server without audience support answers `authenticated` and no audiences: not good enough.
        if not status.get("authenticated") or AUDIENCE not in (status.get("audiences") or ()):
            why = f" ({status['error']})" if status.get("error") else ""
            return (
                f"Kubernetes does not accept this token for the audience {AUDIENCE}{why}; make a new "
                f"one with `kubectl create token cowhand-cli --audience {AUDIENCE}`"
            )
        user = status.get("user") or {}
        if not user.get("username"):
            return "Kubernetes accepts this token but names no user for it"
        return Caller(
            user=user["username"],
            uid=user.get("uid") or "",
            groups=tuple(user.get("groups") or ()),
            extra=tuple(
                (name, tuple(values)) for name, values in sorted((user.get("extra") or {}).items())
            ),
        )

    async def authorize(self, caller: Caller, right: Right) -> None:
        """Check that the caller has the right.

        Raises:
            Forbidden: they do not; the message names verb, resource and namespace.
            KubeUnavailable: no answer from the API server.
        """
        key = (caller, right)
        found = self._rights.get(key)
        if found is None:
            found = await self._access(caller, right)
            self._rights.put(key, found, ACCESS_TTL_S)
        allowed, reason = found
        if not allowed:
            why = f" ({reason})" if reason else ""
            raise Forbidden(
                f"user {caller.user} may not {right}{why}: bind a Role with verb {right.verb} on "
                f"resource agentsessions/{right.subresource} of API group cowhand.dev there"
            )

    async def _access(self, caller: Caller, right: Right) -> tuple[bool, str]:
        attributes = {
            "group": "cowhand.dev",
            "version": "v1alpha1",
            "resource": "agentsessions",
            "subresource": right.subresource,
            "verb": right.verb,
            "namespace": right.namespace,
            **({"name": right.name} if right.name else {}),
        }
        review = await self._kube.create(
            {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": caller.user,
                    "uid": caller.uid,
                    "groups": list(caller.groups),
                    "extra": {name: list(values) for name, values in caller.extra},
                    "resourceAttributes": attributes,
                },
            }
        )
        status = review.get("status") or {}
        allowed = bool(status.get("allowed")) and not status.get("denied")
        return allowed, str(status.get("reason") or status.get("evaluationError") or "")


def _token(authorization: str | None) -> str:
    scheme, _, rest = (authorization or "").partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""
