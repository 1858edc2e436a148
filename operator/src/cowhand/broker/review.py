"""TokenReview for callers of the broker, cached briefly by the hash of the token."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from cowhand.api import labels
from cowhand.broker.policy import Caller, Refusal, caller_of
from cowhand.kube.client import Kube

ACCEPTED_S: Final = 60.0
"""A token of a pod that is gone works for at most this long."""

REFUSED_S: Final = 5.0
"""A refused token is not asked about again for this long: it must not become load on the API server."""

MAX_ENTRIES: Final = 8192
MAX_TOKEN: Final = 16 * 1024


class Reviewer:
    """Asks the API server whom a token belongs to.

    Args:
        kube: the Kubernetes API.
        clock: monotonic seconds.
    """

    def __init__(self, kube: Kube, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
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
                "spec": {"token": token, "audiences": [labels.AUDIENCE_BROKER]},
            }
        )
        found = caller_of(answer.get("status") or {})
        life = REFUSED_S if isinstance(found, Refusal) else ACCEPTED_S
        self._known[key] = (self._clock() + life, found)
        self._known.move_to_end(key)
        if len(self._known) > MAX_ENTRIES:
            self._known.popitem(last=False)
        return found
