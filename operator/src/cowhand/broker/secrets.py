"""Reads the model's key from its Secret, for the proxy of a harness pod and for nobody else.

A value is wrapped as soon as it is read: its repr is redacted, and no error here quotes it.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cowhand.api import labels
from cowhand.broker.policy import check_allowed_host, secret_of
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.errors import Forbidden
from cowhand.kube.review import Refusal

CACHE_S: Final = 60.0
"""A changed Secret is seen after at most this long."""

REREAD_S: Final = 5.0
"""After a 401 of the model's endpoint the Secret is read again, but at most this often."""

LIFETIME_S: Final = 300
"""How long a proxy may use what it is given, in seconds."""

MAX_ENTRIES: Final = 1024


class SecretText:
    """A secret value that does not show itself."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value; for the one place that sends it."""
        return self._value

    def __repr__(self) -> str:
        return "SecretText(redacted)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True)
class ModelKey:
    """A key with what limits it.

    Attributes:
        value: the key.
        credential_id: `<secret>/<key>@<resourceVersion>`; may be logged.
        allowed_hosts: the Secret's annotation.
    """

    value: SecretText
    credential_id: str
    allowed_hosts: str


class ModelKeys:
    """Model keys of all tenants, cached.

    Args:
        kube: the Kubernetes API.
        clock: monotonic seconds.
    """

    def __init__(self, kube: Kube, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._cache: OrderedDict[tuple[str, str, str], tuple[float, ModelKey]] = OrderedDict()

    async def credential(
        self, namespace: str, model: Mapping[str, Any], rejected: str
    ) -> dict[str, Any] | Refusal:
        """The answer of `POST /v1/model-credential` for a session's frozen model.

        Args:
            namespace: the session's tenant: Secrets are read only there.
            model: `{"base_url", "secret": {"name", "key"} | None}`.
            rejected: id of a credential that the endpoint refused, or empty.

        Raises:
            KubeUnavailable: the API server does not answer.
        """
        base_url = str(model.get("base_url") or "")
        answer: dict[str, Any] = {
            "base_url": base_url,
            "headers": {},
            "expires_in_s": LIFETIME_S,
            "credential_id": "none",
            "pool": pool_of(base_url, None),
        }
        named = secret_of(model)
        if named is None:
            return answer
        key = await self._key(namespace, *named, rejected)
        if isinstance(key, Refusal):
            return key
        refusal = check_allowed_host(base_url, named[0], key.allowed_hosts)
        if refusal is not None:
            return refusal
        return answer | {
            "headers": _headers(key.value),
            "credential_id": key.credential_id,
            "pool": pool_of(base_url, key.value),
        }

    async def _key(self, namespace: str, name: str, key: str, rejected: str) -> ModelKey | Refusal:
        place = (namespace, name, key)
        now = self._clock()
        cached = self._cache.get(place)
        if cached is not None:
            age = now - cached[0]
            again = rejected == cached[1].credential_id and age >= REREAD_S
            if age < CACHE_S and not again:
                return cached[1]
        try:
            secret = await self._kube.get(kinds.SECRET, namespace, name)
        except Forbidden:
            self._cache.pop(place, None)
            return Refusal(
                "forbidden",
                f"The broker may not read the Secret {namespace}/{name}: add its name to the chart"
                " value model.extraSecretNames.",
            )
        found = parse_model_key(secret, namespace, name, key)
        if isinstance(found, ModelKey):
            self._cache[place] = (now, found)
            self._cache.move_to_end(place)
            if len(self._cache) > MAX_ENTRIES:
                self._cache.popitem(last=False)
        else:
            self._cache.pop(place, None)
        return found


def pool_of(base_url: str, key: SecretText | None) -> str:
    """Name of the workspace that an endpoint counts: who sends the same key to the same place shares its limits.

    A digest that nobody can guess without the key, whatever the Secret is called and in which tenant it is.
    """
    text = f"{base_url.rstrip('/')}\n{'' if key is None else key.reveal()}"
    return hashlib.sha256(text.encode()).hexdigest()


def parse_model_key(
    secret: Mapping[str, Any] | None, namespace: str, name: str, key: str
) -> ModelKey | Refusal:
    """A key from a Secret's manifest, or what is wrong with the Secret."""
    where = f"Secret {namespace}/{name}"
    if secret is None:
        return Refusal(
            "not_found", f"The {where} does not exist; create it with the model's key in {key!r}."
        )
    meta = secret.get("metadata") or {}
    allowed = (meta.get("annotations") or {}).get(labels.ALLOWED_HOSTS)
    if not allowed:
        text = f"The {where} has no annotation {labels.ALLOWED_HOSTS}: it may be sent nowhere."
        return Refusal("forbidden", text)
    encoded = (secret.get("data") or {}).get(key)
    if not encoded:
        return Refusal("not_found", f"The {where} has no entry {key!r}.")
    try:
        value = base64.b64decode(encoded, validate=True).decode("ascii").strip()
    except ValueError:
        value = ""
    if not value or not value.isprintable():
        return Refusal("invalid", f"The entry {key!r} of the {where} is not a key of plain ASCII.")
    version = str(meta.get("resourceVersion", ""))
    return ModelKey(SecretText(value), f"{name}/{key}@{version}", str(allowed))


def _headers(value: SecretText) -> dict[str, str]:
    """OAuth tokens of the Claude API go into `authorization`, API keys into `x-api-key`."""
    text = value.reveal()
    if text.startswith("sk-ant-oat"):
        return {"authorization": f"Bearer {text}"}
    return {"x-api-key": text}
