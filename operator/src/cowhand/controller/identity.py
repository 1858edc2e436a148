"""The store's identity, kept outside the store: an emptied store is not taken for a new one.

A process notices when the store changes under it, but one that starts anew knows nothing of the store
before, and to the operator an empty store looks as if no session had ever run: it would run them all again.
So the operator gives the store's connections (`session.connect`) this memory, a ConfigMap of its namespace.
Deleting the ConfigMap is how a person says that the store which is there now is the one to use.
"""

from __future__ import annotations

from cowhand.api.labels import STORE_IDENTITY
from cowhand.errors import CowhandError, StoreUnavailable
from cowhand.kube.client import Kube
from cowhand.kube.errors import AlreadyExists
from cowhand.kube.kinds import CONFIG_MAP


class IdentityInConfigMap:
    """See `session.store.IdentityKeeper`.

    Args:
        kube: reads and creates the ConfigMap.
        namespace: of the operator.
    """

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube = kube
        self._namespace = namespace

    @property
    def where(self) -> str:
        """See `session.store.IdentityKeeper`."""
        return f"ConfigMap {self._namespace}/{STORE_IDENTITY}"

    async def recall(self) -> str | None:
        """See `session.store.IdentityKeeper`. Raises StoreUnavailable if Kubernetes does not say."""
        try:
            found = await self._kube.get(CONFIG_MAP, self._namespace, STORE_IDENTITY)
        except CowhandError as err:
            raise StoreUnavailable(
                f"which store this should be stands in {self.where}, which cannot be read: {err}",
                after=1.0,
            ) from err
        return None if found is None else str((found.get("data") or {}).get("identity") or "")

    async def keep(self, identity: str) -> None:
        """See `session.store.IdentityKeeper`. Raises StoreUnavailable if Kubernetes does not take it."""
        manifest = {
            "apiVersion": CONFIG_MAP.api_version,
            "kind": CONFIG_MAP.kind,
            "metadata": {"namespace": self._namespace, "name": STORE_IDENTITY},
            "data": {"identity": identity},
        }
        try:
            await self._kube.create(manifest)
        except AlreadyExists:
            # The other replica was first: compare with what it kept.
            raise StoreUnavailable(f"{self.where} has just been made", after=0.1) from None
        except CowhandError as err:
            raise StoreUnavailable(
                f"the store's identity cannot be kept in {self.where}: {err}", after=1.0
            ) from err
