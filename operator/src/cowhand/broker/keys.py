"""The broker's signing keys: kept in one Secret, made by the first replica that needs them.

Entries of the Secret are `<unix seconds>.<key id>` -> 32 raw bytes. The newest entry signs, all are
published, so that a key is rotated by adding one: proxies and harnesses fetch the keys when they meet
an id that they do not know, and hand records that an older key signed stay valid.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cowhand.errors import UserError
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.errors import AlreadyExists
from cowhand.wire.keys import SigningKey

log = logging.getLogger(__name__)

RELOAD_S: Final = 60.0
"""A key that another replica added is seen after at most this long."""


class KeyStore:
    """Signing keys in a Secret.

    Args:
        kube: the Kubernetes API.
        namespace: of the Secret.
        name: of the Secret.
        clock: seconds since the epoch.
    """

    def __init__(
        self, kube: Kube, namespace: str, name: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._clock = clock
        self._keys: list[SigningKey] = []

    @property
    def signing(self) -> SigningKey:
        """The key that signs now; `load` must have succeeded."""
        return self._keys[-1]

    @property
    def public(self) -> dict[str, Ed25519PublicKey]:
        """All public keys by id."""
        return {key.kid: key.public for key in self._keys}

    @property
    def loaded(self) -> bool:
        """Whether there are keys."""
        return bool(self._keys)

    async def load(self) -> None:
        """Read the Secret; make it if it is missing.

        Two replicas that start together agree: one create wins, the other reads what it made.

        Raises:
            KubeUnavailable, Forbidden: the Secret cannot be read or made.
            UserError: it holds something else than keys.
        """
        secret = await self._kube.get(kinds.SECRET, self._namespace, self._name)
        if secret is None:
            try:
                secret = await self._kube.create(self._manifest())
                log.info("signing key made", extra={"secret": self._name})
            except AlreadyExists:
                secret = await self._kube.get(kinds.SECRET, self._namespace, self._name)
        self._keys = parse_keys((secret or {}).get("data") or {}, self._name)

    async def rotate(self) -> SigningKey:
        """Add a key, which signs from now on; answers it. Other replicas follow within `RELOAD_S`."""
        await self._kube.patch(
            kinds.SECRET, self._namespace, self._name, {"data": self._manifest()["data"]}
        )
        await self.load()
        return self.signing

    def _manifest(self) -> dict[str, Any]:
        key = SigningKey.generate()
        raw = base64.b64encode(key.private.private_bytes_raw()).decode()
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {
                "namespace": self._namespace,
                "name": self._name,
                "labels": {
                    "app.kubernetes.io/name": "cowhand",
                    "app.kubernetes.io/component": "broker",
                },
            },
            "data": {f"{int(self._clock()):012d}.{key.kid}": raw},
        }


def parse_keys(data: dict[str, str], name: str) -> list[SigningKey]:
    """Keys of the Secret's `data`, oldest first.

    Raises:
        UserError: an entry is not a key, or there is none.
    """
    keys = []
    for entry in sorted(data):
        try:
            raw = base64.b64decode(data[entry], validate=True)
            key = SigningKey.of(Ed25519PrivateKey.from_private_bytes(raw))
        except (ValueError, TypeError):
            key = None
        if key is None or entry.partition(".")[2] != key.kid:
            text = f"The entry {entry!r} of the Secret {name} is not a signing key; remove it."
            # Without the cause, which may quote the entry.
            raise UserError(text, field="data") from None
        keys.append(key)
    if not keys:
        raise UserError(f"The Secret {name} holds no signing key; delete it to have one made.")
    return keys
