"""`cowhand bootstrap`: makes the CA, certificates, store users and passwords that are missing.

A Helm hook runs it before each install and upgrade, because templates must not make random values: they
would differ at every rendering. It can run any number of times, also twice at once: what exists stays,
every secret value is made by a create that only one of two runs wins, and everything that follows from
the secret values (user file, CA ConfigMaps) is computed from what is stored afterwards.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from cowhand.api import labels
from cowhand.bootstrap import certs, objects, teardown
from cowhand.bootstrap.objects import Manifest
from cowhand.errors import Retryable
from cowhand.kube import kinds
from cowhand.kube.client import Kube, connect
from cowhand.kube.errors import AlreadyExists, Conflict
from cowhand.session.acl import CONTROL_USERS, tenant_user
from cowhand.settings import BootstrapSettings

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]

TRIES: Final = 5
"""How often a write is tried that somebody else overtakes."""


async def run(settings: BootstrapSettings) -> None:
    """Make what is missing (or, with mode `teardown`, take the release apart).

    Raises:
        CowhandError: the API server refuses or does not answer; the Job tries again.
    """
    kube = await connect()
    try:
        if settings.mode == "teardown":
            await teardown.teardown(kube, settings)
        else:
            await Bootstrap(kube, settings).run()
    finally:
        await kube.close()


class Bootstrap:
    """One run over the control plane's namespace and its tenants."""

    def __init__(
        self,
        kube: Kube,
        settings: BootstrapSettings,
        *,
        now: Clock = lambda: datetime.now(UTC),
        token: Callable[[], str] = lambda: secrets.token_hex(32),
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._now = now
        self._token = token

    async def run(self) -> None:
        """Everything, in the order in which one thing needs another."""
        ca = await self._ca()
        for component in objects.SERVICES:
            await self._leaf(component, ca)
        for namespace in (self._settings.namespace, *self._settings.tenants):
            await self._ca_config_map(namespace, ca.certificate)
        await self._acl(await self._passwords())

    async def _ca(self) -> certs.KeyPair:
        namespace, now = self._settings.namespace, self._now()
        found = await self._kube.get(kinds.SECRET, namespace, labels.CA_SECRET)
        if found is None:
            fresh = certs.new_ca(namespace, now)
            found = await self._create(objects.tls(namespace, labels.CA_SECRET, fresh))
        pair = objects.pair_of(found)
        if reason := certs.ca_is_due(pair, now):
            log.info("making a new CA", extra={"reason": reason})
            pair = certs.new_ca(namespace, now)
            await self._replace(found, objects.tls(namespace, labels.CA_SECRET, pair))
        return pair

    async def _leaf(self, component: str, ca: certs.KeyPair) -> None:
        namespace, now = self._settings.namespace, self._now()
        names = certs.service_names(f"cowhand-{component}", namespace)
        secret = objects.tls_secret(component)
        found = await self._kube.get(kinds.SECRET, namespace, secret)
        if found is None:
            fresh = objects.tls(namespace, secret, certs.new_leaf(ca, names, now))
            found = await self._create(fresh)
        if reason := certs.leaf_is_due(objects.pair_of(found), ca, names, now):
            log.info("making a new certificate", extra={"secret": secret, "reason": reason})
            await self._replace(
                found, objects.tls(namespace, secret, certs.new_leaf(ca, names, now))
            )

    async def _ca_config_map(self, namespace: str, certificate: str) -> None:
        wanted = objects.ca_config_map(namespace, certificate)
        found = await self._kube.get(kinds.CONFIG_MAP, namespace, labels.CA_CONFIG_MAP)
        if found is None:
            found = await self._create(wanted)
        if found.get("data") != wanted["data"]:
            await self._replace(found, wanted)

    async def _passwords(self) -> dict[str, str]:
        """User -> password, as stored in the end."""
        places = {
            user: (self._settings.namespace, f"cowhand-store-{user}") for user in CONTROL_USERS
        } | {
            tenant_user(tenant): (tenant, labels.STORE_SECRET) for tenant in self._settings.tenants
        }
        return {
            user: await self._password(namespace, name, user)
            for user, (namespace, name) in places.items()
        }

    async def _password(self, namespace: str, name: str, user: str) -> str:
        found = await self._kube.get(kinds.SECRET, namespace, name)
        if found is None:
            data = {"username": user, "password": self._token()}
            found = await self._create(objects.secret(namespace, name, data))
        if not objects.value(found, "password") or objects.value(found, "username") != user:
            password = objects.value(found, "password") or self._token()
            data = {"username": user, "password": password}
            found = await self._replace(found, objects.secret(namespace, name, data))
        return objects.value(found, "password")

    async def _acl(self, passwords: dict[str, str]) -> None:
        namespace, name = self._settings.namespace, labels.STORE_ACL_SECRET
        for _ in range(TRIES):
            found = await self._kube.get(kinds.SECRET, namespace, name)
            existing = objects.value(found, "users.acl") if found else ""
            text = objects.acl_text(
                passwords, self._settings.tenants, self._settings.prefix, existing
            )
            wanted = objects.secret(namespace, name, {"users.acl": text})
            try:
                if found is None:
                    await self._kube.create(wanted)
                elif existing != text:
                    await self._replace(found, wanted)
            except (AlreadyExists, Conflict):
                continue
            return
        raise Retryable(f"Secret {namespace}/{name} keeps changing under us")

    async def _create(self, manifest: Manifest) -> Manifest:
        """Create; if another run was faster, what that one made."""
        meta, kind = manifest["metadata"], kinds.of(manifest)
        try:
            made = await self._kube.create(manifest)
        except AlreadyExists:
            found = await self._kube.get(kind, meta["namespace"], meta["name"])
            if found is None:
                raise Retryable(f"{kind} {meta['namespace']}/{meta['name']} was deleted") from None
            return found
        log.info("made", extra={"object": f"{kind} {meta['namespace']}/{meta['name']}"})
        return made

    async def _replace(self, found: Manifest, wanted: Manifest) -> Manifest:
        """Replace the data of an object, if nobody changed it since it was read (Conflict)."""
        meta = found["metadata"]
        body = {
            "metadata": {"resourceVersion": meta["resourceVersion"]},
            "data": {
                **dict.fromkeys(set(found.get("data") or {}) - set(wanted["data"])),
                **wanted["data"],
            },
        }
        return await self._kube.patch(kinds.of(wanted), meta["namespace"], meta["name"], body)
