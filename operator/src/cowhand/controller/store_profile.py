"""Watches what the store keeps, for the condition StoreDurable of every session and for Events.

The operator's connection looks at the server anyway (`session.durability`); here that becomes a belief
(`reconcile.store_profile`), an Event on the operator's Deployment when it changes for the worse or back, and a
second look at each session, spread out so that many objects are no burst of writes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, Protocol

from cowhand.errors import CowhandError, Retryable
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.reconcile.store_profile import Belief, Note, StoreProfile, step

DEPLOYMENT: Final = "cowhand-operator"
"""Whose Events these are: the one object that stands for the whole installation."""

LOOK_S: Final = 5.0
"""Seconds between two looks at what was seen of the store."""

LATER: Final = 20
"""Events that are kept while Kubernetes does not answer; older ones go."""

log = logging.getLogger(__name__)


class Verdict(Protocol):
    """What is read of `session.durability.Verdict`."""

    @property
    def demanded(self) -> str:
        """Profile that was set."""

    @property
    def effective(self) -> str:
        """What it comes to."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it is less."""

    @property
    def weaker(self) -> bool:
        """Whether it is less."""


class StoreProfileWatch:
    """One for the leading operator.

    Attributes:
        changed: called when the sessions' condition is another one now.
    """

    def __init__(
        self,
        seen: Callable[[], Verdict | None],
        kube: Kube,
        namespace: str,
        identity: str,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        """`seen` answers what the store was last seen to keep; `namespace` and `identity` are the operator's own."""
        self._seen = seen
        self._kube = kube
        self._namespace = namespace
        self._identity = identity
        self._clock = clock
        self._belief = Belief()
        self._notes: deque[Note] = deque(maxlen=LATER)
        self.changed: Callable[[], None] = lambda: None

    def profile(self) -> StoreProfile | None:
        """What sessions show; None: the store was never seen."""
        return self._belief.shown

    async def look(self) -> None:
        """One look; an Event that cannot be written now is written with a later one."""
        verdict = self._seen()
        found = None
        if verdict is not None:
            found = StoreProfile(
                verdict.demanded, verdict.effective, verdict.weaker, tuple(verdict.faults)
            )
        before = self._belief.shown
        self._belief, notes = step(self._belief, found, self._clock())
        self._notes.extend(notes)
        if self._belief.shown != before:
            self.changed()
        while self._notes:
            try:
                await self._write(self._notes[0])
            except Retryable as err:
                log.info("an Event of the store's profile has to wait: %s", err)
                return
            except CowhandError as err:
                log.warning("an Event of the store's profile cannot be written: %s", err)
            self._notes.popleft()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def _write(self, note: Note) -> None:
        deployment = await self._kube.get(kinds.DEPLOYMENT, self._namespace, DEPLOYMENT)
        uid = None if deployment is None else deployment["metadata"]["uid"]
        await self._kube.create(self._event(note, uid))

    def _event(self, note: Note, uid: str | None) -> Manifest:
        at = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        about: dict[str, Any] = {
            "apiVersion": kinds.DEPLOYMENT.api_version,
            "kind": kinds.DEPLOYMENT.kind,
            "namespace": self._namespace,
            "name": DEPLOYMENT,
        }
        return {
            "apiVersion": kinds.EVENT.api_version,
            "kind": kinds.EVENT.kind,
            "metadata": {
                "namespace": self._namespace,
                "name": f"{DEPLOYMENT}.{secrets.token_hex(8)}",
            },
            # Without the uid `kubectl describe` would not find it.
            "involvedObject": about if uid is None else {**about, "uid": uid},
            "type": note.type,
            "reason": note.reason,
            "message": note.message[:1024],
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
            "source": {"component": DEPLOYMENT},
            "reportingComponent": "cowhand.dev/operator",
            "reportingInstance": self._identity,
        }
