"""The Kubernetes API as plain dicts: the protocol `Kube`, and `AioKube`, its only real implementation.

Every process that speaks to Kubernetes (operator, broker, gateway, bootstrap) gets a `Kube` from
`connect` and passes it down; tests pass `support.memory_kube.MemoryKube`, which meets the same
contract (tests/unit/kube/test_contract.py runs on both).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Protocol
from urllib.parse import urlencode

import aiohttp

from cowhand.errors import UserError
from cowhand.kube import kinds, transport
from cowhand.kube.errors import Conflict, KubeUnavailable, NotFound, from_answer
from cowhand.kube.kinds import Kind
from cowhand.kube.transport import Transport

Manifest = dict[str, Any]

PAGE: Final = 500
"""Objects asked for in one page of a list."""

_MERGE: Final = "application/merge-patch+json"
_APPLY: Final = "application/apply-patch+yaml"


class Kube(Protocol):
    """What Cowhand asks of the Kubernetes API; dict in, dict out.

    Errors of all methods: the tree in `cowhand.kube.errors`.
    """

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        """One object, None if it does not exist. Raises NotServed if its kind does not exist."""

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Manifest]:
        """All objects of a kind, of one namespace or (None) of all; `apiVersion` and `kind` are set.

        Raises NotServed when the kind is unknown, so that "none" and "no such kind" are never confused.
        """

    async def apply(
        self, manifest: Manifest, *, manager: str, force: bool = True, subresource: str = ""
    ) -> Manifest:
        """Server-side apply: creates or updates exactly the fields in the manifest.

        A `metadata.uid` or `metadata.resourceVersion` in it is a precondition (Conflict).
        With a subresource (`status`) the object must exist (NotFound).
        """

    async def create(self, manifest: Manifest) -> Manifest:
        """POST; answers what the server answers (for reviews: with `status`). Raises AlreadyExists."""

    async def patch(
        self, kind: Kind, namespace: str | None, name: str, body: Manifest, *, subresource: str = ""
    ) -> Manifest:
        """JSON merge patch; `metadata.resourceVersion` in the body is a precondition. Raises NotFound."""

    async def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> bool:
        """Ask for deletion; False if there is no such object (or none with this uid)."""

    async def close(self) -> None:
        """Close the connections."""


class AioKube:
    """`Kube` over a `Transport`, with raw dicts and without retries (the caller's queue retries)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def _call(
        self,
        method: str,
        path: str,
        *,
        what: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        """One request; the decoded answer, or an error of our tree."""
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            answer = await self._transport.send(method, target, headers, body)
        except (TimeoutError, aiohttp.ClientError, OSError) as err:
            text = str(err) or type(err).__name__
            raise KubeUnavailable(f"{what}: the API server does not answer: {text}") from err
        if not 200 <= answer.status <= 299:
            raise from_answer(answer.status, answer.raw, what=what, retry_after=answer.retry_after)
        loaded: Manifest = json.loads(answer.raw)
        return loaded

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        """See `Kube.get`."""
        try:
            return await self._call(
                "GET", _one(kind, namespace, name), what=f"get {kind} {namespace}/{name}"
            )
        except NotFound:
            return None

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Manifest]:
        """See `Kube.list`."""
        items: list[Manifest] = []
        query = {"limit": str(PAGE)}
        if label_selector:
            query["labelSelector"] = label_selector
        while True:
            page = await self._call("GET", kind.path(namespace), what=f"list {kind}", query=query)
            items.extend(
                {"apiVersion": kind.api_version, "kind": kind.kind, **item}
                for item in page.get("items") or ()
            )
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return items
            query["continue"] = token

    async def apply(
        self, manifest: Manifest, *, manager: str, force: bool = True, subresource: str = ""
    ) -> Manifest:
        """See `Kube.apply`."""
        kind, namespace, name = _address(manifest)
        return await self._call(
            "PATCH",
            _one(kind, namespace, name, subresource),
            what=f"apply {kind} {namespace}/{name}",
            query={"fieldManager": manager, "force": "true" if force else "false"},
            body=manifest,
            content_type=_APPLY,
        )

    async def create(self, manifest: Manifest) -> Manifest:
        """See `Kube.create`."""
        kind = kinds.of(manifest)
        namespace = (manifest.get("metadata") or {}).get("namespace")
        return await self._call(
            "POST", kind.path(namespace), what=f"create {kind} in {namespace}", body=manifest
        )

    async def patch(
        self, kind: Kind, namespace: str | None, name: str, body: Manifest, *, subresource: str = ""
    ) -> Manifest:
        """See `Kube.patch`."""
        return await self._call(
            "PATCH",
            _one(kind, namespace, name, subresource),
            what=f"patch {kind} {namespace}/{name}",
            body=body,
            content_type=_MERGE,
        )

    async def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> bool:
        """See `Kube.delete`."""
        options: Manifest = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
        }
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            await self._call(
                "DELETE",
                _one(kind, namespace, name),
                what=f"delete {kind} {namespace}/{name}",
                body=options,
            )
        except NotFound:
            return False
        except Conflict:
            # A failed uid precondition is a plain 409: look whether the object is still the one meant.
            found = await self.get(kind, namespace, name) if uid is not None else None
            if uid is not None and (found is None or found["metadata"]["uid"] != uid):
                return False
            raise
        return True

    async def close(self) -> None:
        """See `Kube.close`."""
        await self._transport.close()


def _one(kind: Kind, namespace: str | None, name: str, subresource: str = "") -> str:
    """Path of one object; without a name it would be the whole collection's."""
    if not name or (kind.namespaced and not namespace):
        raise UserError(f"a {kind.kind} is asked for without its name", field="metadata.name")
    return kind.path(namespace, name, subresource)


def _address(manifest: Manifest) -> tuple[Kind, str | None, str]:
    """Kind, namespace and name of a manifest."""
    metadata = manifest.get("metadata") or {}
    name = metadata.get("name")
    if not name:
        raise UserError("metadata.name must be set to apply an object", field="metadata.name")
    return kinds.of(manifest), metadata.get("namespace"), str(name)


async def connect(kubeconfig: str | None = None) -> AioKube:
    """A client from a kubeconfig file, or as a pod, or from the default kubeconfig, in this order.

    Args:
        kubeconfig: path of a file; None tries the pod's service account, then the default file.

    Raises:
        UserError: there is neither, or what is there is not usable.
    """
    pod = transport.in_pod() if kubeconfig is None else None
    return AioKube(pod or await transport.by_kubeconfig(kubeconfig))
