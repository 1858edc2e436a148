"""An in-memory Kubernetes API for tests: `cowhand.kube.client.Kube` without a server.

Keeps what controllers depend on: uid, generation, resourceVersion, the status subresource, server-side
apply with field managers, merge patch, finalizers, garbage collection by ownerReferences, immutable pods,
answers 409 and 5xx on demand (`fail`). `tests/unit/kube/test_contract.py` runs the same tests on this
class and, where a cluster is reachable, on a real API server.
"""

from __future__ import annotations

import copy
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from cowhand.errors import UserError
from cowhand.kube import kinds
from cowhand.kube.errors import AlreadyExists, Conflict, Invalid, NotFound, NotServed
from cowhand.kube.kinds import Kind

Manifest = dict[str, Any]
Key = tuple[str, str, str]
Path = tuple[str, ...]

_REVIEWS = {
    kinds.TOKEN_REVIEW,
    kinds.SUBJECT_ACCESS_REVIEW,
    kinds.LOCAL_SUBJECT_ACCESS_REVIEW,
    kinds.SELF_SUBJECT_ACCESS_REVIEW,
}
_WITH_STATUS = {
    kinds.AGENT,
    kinds.AGENT_SESSION,
    kinds.ENVIRONMENT,
    kinds.SANDBOX,
    kinds.POD,
    kinds.DEPLOYMENT,
    kinds.STATEFUL_SET,
    kinds.JOB,
    kinds.NAMESPACE,
    kinds.SERVICE,
}
_SERVER_FIELDS = {
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "managedFields",
}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    """Path -> value of the leaves; lists are atomic."""
    if isinstance(value, dict) and value:
        found: dict[Path, Any] = {}
        for key, item in value.items():
            found.update(_leaves(item, (*path, key)))
        return found
    return {path: value}


def _remove(target: Manifest, path: Path) -> None:
    """Remove a leaf and the parents that become empty."""
    trail = [target]
    for key in path[:-1]:
        step = trail[-1].get(key)
        if not isinstance(step, dict):
            return
        trail.append(step)
    trail[-1].pop(path[-1], None)
    for parent, key in zip(reversed(trail[:-1]), reversed(path[:-1]), strict=True):
        if parent[key] == {}:
            del parent[key]


def _merge(target: Manifest, patch: Manifest, *, drop_null: bool) -> Manifest:
    """`patch` merged into a copy of `target`; null removes (JSON merge patch) if `drop_null`."""
    out = dict(target)
    for key, value in patch.items():
        if value is None and drop_null:
            out.pop(key, None)
        elif isinstance(value, dict):
            base = out.get(key)
            out[key] = _merge(base if isinstance(base, dict) else {}, value, drop_null=drop_null)
        else:
            out[key] = copy.deepcopy(value)
    return out


class MemoryKube:
    """`Kube` in memory.

    Attributes:
        writes: (verb, plural) -> number of successful writes.
        on_change: called with ("ADDED" | "MODIFIED" | "DELETED", object) after each change.
        missing: kinds whose CRD "is not installed".
        review: answers the `status` of a review, given its manifest.
    """

    def __init__(self) -> None:
        self.writes: Counter[tuple[str, str]] = Counter()
        self.on_change: list[Callable[[str, Manifest], None]] = []
        self.missing: set[Kind] = set()
        self.review: Callable[[Manifest], Manifest] = lambda manifest: {}
        self._objects: dict[Kind, dict[tuple[str, str], Manifest]] = defaultdict(dict)
        self._applied: dict[tuple[Kind, str, str], dict[str, dict[Path, Any]]] = defaultdict(dict)
        self._version = 0
        self._failures: list[tuple[str, Kind | None, Exception, int]] = []

    # -- for tests ---------------------------------------------------------------------------------

    def backup(self) -> Any:
        """The state of the API server, for `restore`."""
        return copy.deepcopy((dict(self._objects), dict(self._applied)))

    def restore(self, backup: Any) -> None:
        """Become what `backup` answered; no watcher is told, as after a restore of etcd."""
        objects, applied = copy.deepcopy(backup)
        self._objects = defaultdict(dict, objects)
        self._applied = defaultdict(dict, applied)

    def fail(self, verb: str, kind: Kind | None, error: Exception, *, times: int = 1) -> None:
        """Let the next `times` calls of `verb` (`get`, `list`, `apply`, ...) on `kind` raise `error`."""
        self._failures.append((verb, kind, error, times))

    def heal(self) -> None:
        """Forget the failures that were asked for."""
        self._failures.clear()

    def put(self, manifest: Manifest) -> Manifest:
        """Store an object as it is, status and all (what a kubelet or another controller did)."""
        kind = kinds.of(manifest)
        metadata = manifest.get("metadata", {})
        key = (metadata.get("namespace") or "", metadata["name"])
        old = self._objects[kind].get(key)
        new = _merge(old or {}, manifest, drop_null=True)
        return self._store(kind, key, old, new)

    def all(self, kind: Kind) -> list[Manifest]:
        """Every stored object of a kind."""
        return [copy.deepcopy(item) for item in self._objects[kind].values()]

    def vanish(self, kind: Kind, namespace: str, name: str) -> None:
        """Remove an object at once and without telling anybody (a missed DELETED event)."""
        self._objects[kind].pop((namespace, name), None)

    # -- Kube --------------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        self._enter("get", kind)
        found = self._objects[kind].get((namespace or "", name))
        return copy.deepcopy(found)

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Manifest]:
        self._enter("list", kind)
        return [
            copy.deepcopy(item)
            for (where, _), item in self._objects[kind].items()
            if (namespace is None or where == namespace) and _selected(item, label_selector)
        ]

    async def apply(
        self, manifest: Manifest, *, manager: str, force: bool = True, subresource: str = ""
    ) -> Manifest:
        kind = kinds.of(manifest)
        self._enter("apply", kind)
        metadata = manifest.get("metadata") or {}
        if not metadata.get("name"):
            raise UserError("metadata.name must be set", field="metadata.name")
        key = (metadata.get("namespace") or "", metadata["name"])
        old = self._objects[kind].get(key)
        if old is None and subresource:
            raise NotFound(f"apply {kind} {key}: not found")
        self._check_version(kind, key, old, metadata)
        body = self._writable(kind, manifest, subresource)
        leaves = _leaves({k: v for k, v in body.items() if k not in ("apiVersion", "kind")})
        managers = self._applied[(kind, *key)]
        slot = f"{manager}/{subresource}"
        for other, fields in managers.items():
            if other == slot or old is None:
                continue
            clash = [p for p, v in leaves.items() if p in fields and fields[p] != v]
            if clash and not force:
                raise Conflict(f"apply {kind} {key}: {clash[0]} is owned by {other}")
            for path in clash:
                del fields[path]
        new = copy.deepcopy(old or {})
        kept = {path for name, fields in managers.items() if name != slot for path in fields}
        for path in set(managers.get(slot, {})) - set(leaves) - kept:
            _remove(new, path)
        new = _merge(new, body, drop_null=False)
        stored = self._store(kind, key, old, new)
        managers[slot] = leaves
        self.writes[("apply", kind.plural)] += 1
        return stored

    async def create(self, manifest: Manifest) -> Manifest:
        kind = kinds.of(manifest)
        self._enter("create", kind)
        self.writes[("create", kind.plural)] += 1
        if kind in _REVIEWS:
            return {**copy.deepcopy(manifest), "status": self.review(manifest)}
        metadata = manifest.get("metadata") or {}
        name = metadata.get("name") or f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
        key = (metadata.get("namespace") or "", name)
        if key in self._objects[kind]:
            raise AlreadyExists(f"create {kind} {key}: already exists")
        body = self._writable(kind, manifest, "")
        body["metadata"]["name"] = name
        return self._store(kind, key, None, body)

    async def patch(
        self, kind: Kind, namespace: str | None, name: str, body: Manifest, *, subresource: str = ""
    ) -> Manifest:
        self._enter("patch", kind)
        key = (namespace or "", name)
        old = self._objects[kind].get(key)
        if old is None:
            raise NotFound(f"patch {kind} {key}: not found")
        self._check_version(kind, key, old, body.get("metadata") or {})
        allowed = self._writable(kind, body, subresource)
        stored = self._store(kind, key, old, _merge(old, allowed, drop_null=True))
        self.writes[("patch", kind.plural)] += 1
        return stored

    async def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> bool:
        self._enter("delete", kind)
        key = (namespace or "", name)
        old = self._objects[kind].get(key)
        if old is None or (uid is not None and old["metadata"]["uid"] != uid):
            return False
        self.writes[("delete", kind.plural)] += 1
        if old["metadata"].get("finalizers"):
            if "deletionTimestamp" not in old["metadata"]:
                new = copy.deepcopy(old)
                new["metadata"]["deletionTimestamp"] = _now()
                self._store(kind, key, old, new)
            return True
        self._drop(kind, key)
        return True

    async def close(self) -> None:
        return None

    # -- inside ------------------------------------------------------------------------------------

    def _enter(self, verb: str, kind: Kind) -> None:
        for index, (wanted, which, error, times) in enumerate(self._failures):
            if wanted == verb and which in (None, kind):
                if times <= 1:
                    del self._failures[index]
                else:
                    self._failures[index] = (wanted, which, error, times - 1)
                raise error
        if kind in self.missing:
            raise NotServed(f"{verb} {kind}: the server could not find the requested resource")

    def _check_version(
        self, kind: Kind, key: tuple[str, str], old: Manifest | None, metadata: Manifest
    ) -> None:
        for field in ("uid", "resourceVersion"):
            wanted = metadata.get(field)
            if wanted and (old is None or old["metadata"][field] != wanted):
                raise Conflict(f"{kind} {key}: precondition {field} failed")

    def _writable(self, kind: Kind, manifest: Manifest, subresource: str) -> Manifest:
        """The part of a manifest that a write to this (sub)resource may change."""
        body = copy.deepcopy(manifest)
        head: Manifest = {k: body[k] for k in ("apiVersion", "kind") if k in body}
        if subresource == "status":
            return {**head, "status": body.get("status", {})}
        if subresource == "scale":
            return {"spec": {"replicas": body["spec"]["replicas"]}}
        if kind in _WITH_STATUS:
            body.pop("status", None)
        metadata = body.setdefault("metadata", {})
        for field in _SERVER_FIELDS:
            metadata.pop(field, None)
        return body

    def _store(
        self, kind: Kind, key: tuple[str, str], old: Manifest | None, new: Manifest
    ) -> Manifest:
        new = copy.deepcopy(new)
        new["apiVersion"], new["kind"] = kind.api_version, kind.kind
        metadata = new.setdefault("metadata", {})
        metadata["name"] = key[1]
        if key[0]:
            metadata["namespace"] = key[0]
        if old is not None and new == old:
            return copy.deepcopy(old)
        if kind == kinds.POD and old is not None and old.get("spec") != new.get("spec"):
            raise Invalid(
                f"pods {key}: spec: Forbidden: pod updates may not change fields",
                causes=(("spec", "Forbidden: pod updates may not change fields"),),
            )
        self._version += 1
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", _now())
        metadata["resourceVersion"] = str(self._version)
        if old is None:
            metadata["generation"] = 1
        elif _without(old, "metadata", "status") != _without(new, "metadata", "status"):
            metadata["generation"] = old["metadata"]["generation"] + 1
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self._objects[kind][key] = new
            self._drop(kind, key)
            return copy.deepcopy(new)
        self._objects[kind][key] = new
        self._tell("MODIFIED" if old is not None else "ADDED", new)
        return copy.deepcopy(new)

    def _drop(self, kind: Kind, key: tuple[str, str]) -> None:
        gone = self._objects[kind].pop(key)
        self._applied.pop((kind, *key), None)
        self._tell("DELETED", gone)
        uid = gone["metadata"]["uid"]
        for child_kind, children in list(self._objects.items()):
            for child_key, child in list(children.items()):
                if uid in _owners(child) and child_key in children:
                    if child["metadata"].get("finalizers"):
                        new = copy.deepcopy(child)
                        new["metadata"].setdefault("deletionTimestamp", _now())
                        self._store(child_kind, child_key, child, new)
                    else:
                        self._drop(child_kind, child_key)

    def _tell(self, what: str, item: Manifest) -> None:
        for listener in list(self.on_change):
            listener(what, copy.deepcopy(item))


def _without(item: Manifest, *fields: str) -> Manifest:
    return {key: value for key, value in item.items() if key not in fields}


def _owners(item: Manifest) -> Iterable[str]:
    return [ref["uid"] for ref in item["metadata"].get("ownerReferences") or ()]


def _selected(item: Manifest, selector: str) -> bool:
    """Equality, `!=` and existence selectors, comma separated."""
    labels = item["metadata"].get("labels") or {}
    for part in filter(None, selector.split(",")):
        if "!=" in part:
            key, _, value = part.partition("!=")
            if labels.get(key) == value:
                return False
        elif "=" in part:
            key, _, value = part.replace("==", "=").partition("=")
            if labels.get(key) != value:
                return False
        elif part not in labels:
            return False
    return True
