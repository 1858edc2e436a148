"""Settings of every process, from `COWHAND_*` environment variables: the only reader of the environment.

Called by the CLI, which builds one frozen object and hands it to the process's `run`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from cowhand.errors import UserError

T = TypeVar("T")

Profile = Literal["dev", "standard", "strict", "managed"]
PROFILES: Final[Mapping[str, Profile]] = {
    "dev": "dev",
    "standard": "standard",
    "strict": "strict",
    "managed": "managed",
}
"""Durability profiles of the store: docs/guarantees.md."""


def _get(env: Mapping[str, str], name: str, default: T, parse: Callable[[str], T]) -> T:
    raw = env.get(f"COWHAND_{name}", "")
    if raw == "":
        return default
    try:
        return parse(raw)
    except (ValueError, KeyError) as err:
        raise UserError(f"COWHAND_{name}={raw!r} is not valid: {err}", field=name) from err


def _need(env: Mapping[str, str], name: str) -> str:
    raw = env.get(f"COWHAND_{name}", "")
    if not raw:
        raise UserError(f"COWHAND_{name} must be set", field=name)
    return raw


def _words(raw: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in raw.split(",")) if word)


def _count(raw: str) -> int:
    if not raw.isdecimal():
        raise ValueError("give a whole number, 0 or more")
    return int(raw)


def size(raw: str) -> int:
    """Bytes of a size in the store's own units: `1024`, `100k`, `64kb`, `512mb`, `2gb` (k is 1000, kb is 1024)."""
    text = raw.strip().lower()
    number = text.rstrip("kmgb")
    units = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
    units |= {"kb": 1024, "mb": 1024**2, "gb": 1024**3}
    if not number.isdigit() or text[len(number) :] not in units:
        raise ValueError("give bytes, or a number with k, kb, m, mb, g or gb")
    return int(number) * units[text[len(number) :]]


@dataclass(frozen=True)
class StoreSettings:
    """How a process reaches the store: `COWHAND_STORE_*`."""

    url: str
    """`rediss://host:port/0`; `redis://` without TLS."""
    username: str = ""
    """ACL user."""
    password: str = field(default="", repr=False)
    """Its password; `COWHAND_STORE_PASSWORD`, or the file `COWHAND_STORE_PASSWORD_FILE`."""
    ca_file: str = ""
    """PEM file of the CA, default the system's."""
    prefix: str = "cowhand"
    """First part of every key."""
    partitions: int = 16
    """Partitions of the store, fixed at install."""
    profile: Profile = "dev"
    """Durability profile (`COWHAND_STORE_PROFILE`)."""
    replicas: int = 1
    """Replicas that confirm a barrier of profiles standard and strict (`COWHAND_STORE_REPLICAS`)."""
    allow_weaker: bool = False
    """Go on with a store that keeps less than the profile (`COWHAND_STORE_ALLOW_WEAKER`, `true` or `false`)."""
    sentinel_username: str = ""
    """User at the Sentinels; the file `COWHAND_STORE_SENTINEL_USERNAME_FILE`, which may be missing."""
    sentinel_password: str = field(default="", repr=False)
    """Its password; the file `COWHAND_STORE_SENTINEL_PASSWORD_FILE`."""


def _file(path: str) -> str:
    """Content of a file; empty without one."""
    if not path or not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as handle:
        return handle.read().strip()


def store(env: Mapping[str, str] | None = None) -> StoreSettings:
    """Store settings from the environment."""
    env = os.environ if env is None else env
    password = env.get("COWHAND_STORE_PASSWORD", "")
    if file := env.get("COWHAND_STORE_PASSWORD_FILE", ""):
        with open(file, encoding="utf-8") as handle:
            password = handle.read().strip()
    profile = _get(env, "STORE_PROFILE", "dev", str)
    replicas = _get(env, "STORE_REPLICAS", 1, int)
    if profile not in PROFILES:
        raise UserError(
            f"COWHAND_STORE_PROFILE={profile!r} is none of {', '.join(PROFILES)}", field="profile"
        )
    if replicas < (profile == "standard"):
        raise UserError(
            f"COWHAND_STORE_REPLICAS={replicas}: profile standard rests on at least one replica, and no profile"
            " on fewer than none",
            field="replicas",
        )
    return StoreSettings(
        url=_need(env, "STORE_URL"),
        username=_get(env, "STORE_USERNAME", "", str),
        password=password,
        ca_file=_get(env, "STORE_CA_FILE", "", str),
        prefix=_get(env, "STORE_PREFIX", "cowhand", str),
        partitions=_get(env, "STORE_PARTITIONS", 16, int),
        profile=PROFILES[profile],
        replicas=replicas,
        allow_weaker=_get(env, "STORE_ALLOW_WEAKER", "false", str) == "true",
        sentinel_username=_file(env.get("COWHAND_STORE_SENTINEL_USERNAME_FILE", "")),
        sentinel_password=_file(env.get("COWHAND_STORE_SENTINEL_PASSWORD_FILE", "")),
    )


@dataclass(frozen=True)
class ArchiveAccess:
    """How a process with a token of its own reaches the archive: `COWHAND_ARCHIVE_*`."""

    url: str
    """`https://host:port` (`COWHAND_ARCHIVE_URL`); empty: there is none, payloads stand inline."""
    ca_file: str = "/etc/cowhand/ca/ca.crt"
    """CA of the archive (`COWHAND_CA_FILE`)."""
    token_file: str = "/var/run/secrets/cowhand-archive/token"  # noqa: S105 - a path
    """Projected token with audience cowhand-archive (`COWHAND_ARCHIVE_TOKEN_FILE`)."""


def archive_access(env: Mapping[str, str]) -> ArchiveAccess:
    """Access to the archive from the environment."""
    default = ArchiveAccess("")
    return ArchiveAccess(
        url=_get(env, "ARCHIVE_URL", "", str),
        ca_file=_get(env, "CA_FILE", default.ca_file, str),
        token_file=_get(env, "ARCHIVE_TOKEN_FILE", default.token_file, str),
    )


@dataclass(frozen=True)
class OperatorSettings:
    """`cowhand operator`."""

    store: StoreSettings
    namespace: str
    """Namespace of the control plane (`COWHAND_NAMESPACE`), where the leader Lease lives."""
    identity: str
    """Name of this replica in the Lease (`COWHAND_POD_NAME`)."""
    tenants: tuple[str, ...]
    """Namespaces that are served (`COWHAND_TENANTS`, comma separated)."""
    image: str
    """Image of our own processes (`COWHAND_IMAGE`), for the proxy and init containers of sandboxes."""
    sandbox_image: str
    """Default image of sandboxes (`COWHAND_SANDBOX_IMAGE`)."""
    image_pull_policy: str
    """`COWHAND_IMAGE_PULL_POLICY`, default IfNotPresent."""
    broker_url: str
    """`COWHAND_BROKER_URL`, given to sandbox proxies."""
    model_base_url: str
    """Default endpoint of the Messages API (`COWHAND_MODEL_BASE_URL`)."""
    model_secret: str
    """Default Secret of the model key in the tenant (`COWHAND_MODEL_SECRET`)."""
    default_environment: Mapping[str, object]
    """Environment of sessions that name none (`COWHAND_DEFAULT_ENVIRONMENT`, JSON EnvironmentSpec)."""
    retain_s: int
    """Life of a deleted session's log with deletionPolicy Retain, seconds (default 30 days)."""
    harness_min: int
    """Warm minimum of harness pods per tenant (default 1)."""
    harness_max: int
    """Maximum of harness pods per tenant (default 10)."""
    sessions_per_harness: int
    """Sessions in work per harness pod that scaling aims at (default 50)."""
    lease_seconds: int
    """Duration of the leader Lease (default 30); renew deadline and retry follow from it."""
    tenant_quota: int | None = None
    """Bytes of each tenant in the store (`COWHAND_TENANT_QUOTA`, for example 512mb; 0: no limit; default: an
    equal share of 80 % of the store's memory)."""
    metrics_port: int = 0
    """Port of the metrics, plain HTTP (`COWHAND_METRICS_PORT`, default 0: none)."""
    archive: ArchiveAccess = ArchiveAccess("")
    """Where large payloads and old events are."""


def operator(env: Mapping[str, str] | None = None) -> OperatorSettings:
    """Settings of `cowhand operator`."""
    env = os.environ if env is None else env
    return OperatorSettings(
        store=store(env),
        namespace=_need(env, "NAMESPACE"),
        identity=_need(env, "POD_NAME"),
        tenants=_words(_need(env, "TENANTS")),
        image=_need(env, "IMAGE"),
        sandbox_image=_need(env, "SANDBOX_IMAGE"),
        image_pull_policy=_get(env, "IMAGE_PULL_POLICY", "IfNotPresent", str),
        broker_url=_need(env, "BROKER_URL"),
        model_base_url=_get(env, "MODEL_BASE_URL", "https://api.anthropic.com", str),
        model_secret=_get(env, "MODEL_SECRET", "cowhand-model", str),
        default_environment=_get(env, "DEFAULT_ENVIRONMENT", {}, json.loads),
        retain_s=_get(env, "RETAIN_SECONDS", 30 * 86400, int),
        harness_min=_get(env, "HARNESS_MIN", 1, int),
        harness_max=_get(env, "HARNESS_MAX", 10, int),
        sessions_per_harness=_get(env, "SESSIONS_PER_HARNESS", 50, int),
        lease_seconds=_get(env, "LEASE_SECONDS", 30, int),
        tenant_quota=_get(env, "TENANT_QUOTA", None, size),
        metrics_port=_get(env, "METRICS_PORT", 0, int),
        archive=archive_access(env),
    )


@dataclass(frozen=True)
class HarnessSettings:
    """`cowhand harness`."""

    store: StoreSettings
    namespace: str
    """The tenant (`COWHAND_NAMESPACE`)."""
    pod_uid: str
    """`COWHAND_POD_UID`, first part of the worker id."""
    proxy_url: str
    """The proxy of this pod (`COWHAND_PROXY_URL`, default http://127.0.0.1:8181)."""
    max_sessions: int
    """Sessions in work at the same time (default 200)."""
    drain_seconds: int
    """How long streams may go on after SIGTERM (default 20)."""
    tool_timeout_ms: int
    """Time limit of a tool call that names none (default 120000)."""
    max_tool_output: int
    """Characters of a tool's output that Claude sees (default 30000)."""
    hand_wait_s: float
    """How long a tool call waits for its sandbox (default 180)."""
    metrics_port: int = 0
    """Port of the metrics, plain HTTP (`COWHAND_METRICS_PORT`, default 0: none)."""
    archive: bool = False
    """Whether there is an archive behind the proxy (`COWHAND_ARCHIVE`, `true` or `false`, default false)."""


def harness(env: Mapping[str, str] | None = None) -> HarnessSettings:
    """Settings of `cowhand harness`."""
    env = os.environ if env is None else env
    return HarnessSettings(
        store=store(env),
        namespace=_need(env, "NAMESPACE"),
        pod_uid=_need(env, "POD_UID"),
        proxy_url=_get(env, "PROXY_URL", "http://127.0.0.1:8181", str),
        max_sessions=_get(env, "MAX_SESSIONS", 200, int),
        drain_seconds=_get(env, "DRAIN_SECONDS", 20, int),
        tool_timeout_ms=_get(env, "TOOL_TIMEOUT_MS", 120_000, int),
        max_tool_output=_get(env, "MAX_TOOL_OUTPUT", 30_000, int),
        hand_wait_s=_get(env, "HAND_WAIT_SECONDS", 180.0, float),
        metrics_port=_get(env, "METRICS_PORT", 0, int),
        archive=_get(env, "ARCHIVE", "false", str) == "true",
    )


@dataclass(frozen=True)
class ProxySettings:
    """`cowhand proxy`."""

    mode: Literal["harness", "sandbox"]
    """`COWHAND_PROXY_MODE`."""
    broker_url: str
    """`COWHAND_BROKER_URL`."""
    ca_file: str
    """CA of the broker (`COWHAND_CA_FILE`)."""
    token_file: str
    """Projected token of this pod (`COWHAND_TOKEN_FILE`)."""
    listen_host: str
    """Address to listen on: 127.0.0.1 in a harness pod, 0.0.0.0 in a sandbox pod."""
    listen_port: int
    """8181 in a harness pod, 8443 in a sandbox pod (`COWHAND_LISTEN_PORT`)."""
    sandboxd_port: int
    """Port of sandboxd on loopback (default 7070)."""
    ready_file: str
    """Written when the proxy is ready (default /run/cowhand/ready)."""
    namespace: str = ""
    """The tenant (`COWHAND_NAMESPACE`); needed in a harness pod with an archive."""
    archive: ArchiveAccess = ArchiveAccess("")
    """Where large payloads and old events are; harness pods only."""


def proxy(env: Mapping[str, str] | None = None) -> ProxySettings:
    """Settings of `cowhand proxy`."""
    env = os.environ if env is None else env
    mode = _need(env, "PROXY_MODE")
    if mode not in ("harness", "sandbox"):
        raise UserError(f"COWHAND_PROXY_MODE={mode!r} is not harness or sandbox")
    sandbox = mode == "sandbox"
    return ProxySettings(
        mode="sandbox" if sandbox else "harness",
        broker_url=_need(env, "BROKER_URL"),
        ca_file=_get(env, "CA_FILE", "/etc/cowhand/ca/ca.crt", str),
        token_file=_get(env, "TOKEN_FILE", "/var/run/secrets/cowhand/token", str),
        listen_host=_get(env, "LISTEN_HOST", "0.0.0.0" if sandbox else "127.0.0.1", str),  # noqa: S104
        listen_port=_get(env, "LISTEN_PORT", 8443 if sandbox else 8181, int),
        sandboxd_port=_get(env, "SANDBOXD_PORT", 7070, int),
        ready_file=_get(env, "READY_FILE", "/run/cowhand/ready", str),
        namespace=_get(env, "NAMESPACE", "", str),
        archive=archive_access(env),
    )


@dataclass(frozen=True)
class BrokerSettings:
    """`cowhand broker`."""

    store: StoreSettings
    namespace: str
    """Namespace of the control plane, where the key Secret lives (`COWHAND_NAMESPACE`)."""
    tenants: tuple[str, ...]
    """Namespaces that are served."""
    listen_port: int
    """Default 8443."""
    tls_cert: str
    """PEM file (default /etc/cowhand/tls/tls.crt)."""
    tls_key: str
    """PEM file (default /etc/cowhand/tls/tls.key)."""
    keys_secret: str
    """Secret with the signing keys (default cowhand-broker-keys)."""
    gateway_account: str
    """User name of the gateway (default `system:serviceaccount:<namespace>:cowhand-gateway`)."""
    harness_account: str
    """ServiceAccount name of harness pods in a tenant (default cowhand-harness)."""
    sandbox_account: str
    """ServiceAccount name of sandbox pods in a tenant (default cowhand-sandbox)."""
    metrics_port: int = 0
    """Port of the metrics, plain HTTP (`COWHAND_METRICS_PORT`, default 0: none)."""
    max_concurrent_requests: int = 0
    """Model requests to one workspace at the same time, over all tenants (default 0: no limit, and no shares)."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants in it (`COWHAND_TENANT_WEIGHTS`, for example `team-a=2,team-b=0.5`; default 1 each)."""


def weights(raw: str) -> Mapping[str, float]:
    """`name=number` words; each number from 0.01 to 100."""
    found = {}
    for word in _words(raw):
        name, _, number = word.partition("=")
        found[name] = float(number)
        if not name or not 0.01 <= found[name] <= 100:
            raise ValueError("give name=number for each tenant, numbers from 0.01 to 100")
    return found


def broker(env: Mapping[str, str] | None = None) -> BrokerSettings:
    """Settings of `cowhand broker`."""
    env = os.environ if env is None else env
    namespace = _need(env, "NAMESPACE")
    return BrokerSettings(
        store=store(env),
        namespace=namespace,
        tenants=_words(_need(env, "TENANTS")),
        listen_port=_get(env, "LISTEN_PORT", 8443, int),
        tls_cert=_get(env, "TLS_CERT", "/etc/cowhand/tls/tls.crt", str),
        tls_key=_get(env, "TLS_KEY", "/etc/cowhand/tls/tls.key", str),
        keys_secret=_get(env, "KEYS_SECRET", "cowhand-broker-keys", str),
        gateway_account=_get(
            env, "GATEWAY_ACCOUNT", f"system:serviceaccount:{namespace}:cowhand-gateway", str
        ),
        harness_account=_get(env, "HARNESS_ACCOUNT", "cowhand-harness", str),
        sandbox_account=_get(env, "SANDBOX_ACCOUNT", "cowhand-sandbox", str),
        metrics_port=_get(env, "METRICS_PORT", 0, int),
        max_concurrent_requests=_get(env, "MAX_CONCURRENT_REQUESTS", 0, _count),
        tenant_weights=_get(env, "TENANT_WEIGHTS", {}, weights),
    )


@dataclass(frozen=True)
class GatewaySettings:
    """`cowhand gateway`."""

    store: StoreSettings
    tenants: tuple[str, ...]
    """Namespaces that are served."""
    listen_port: int
    """Default 8443."""
    tls_cert: str
    """PEM file (default /etc/cowhand/tls/tls.crt)."""
    tls_key: str
    """PEM file (default /etc/cowhand/tls/tls.key)."""
    broker_url: str
    """For exec tokens."""
    ca_file: str
    """CA of the broker."""
    token_file: str
    """Projected token with audience cowhand-broker."""
    metrics_port: int = 0
    """Port of the metrics, plain HTTP (`COWHAND_METRICS_PORT`, default 0: none)."""
    archive: ArchiveAccess = ArchiveAccess("")
    """Where large payloads and old events are."""


def gateway(env: Mapping[str, str] | None = None) -> GatewaySettings:
    """Settings of `cowhand gateway`."""
    env = os.environ if env is None else env
    return GatewaySettings(
        store=store(env),
        tenants=_words(_need(env, "TENANTS")),
        listen_port=_get(env, "LISTEN_PORT", 8443, int),
        tls_cert=_get(env, "TLS_CERT", "/etc/cowhand/tls/tls.crt", str),
        tls_key=_get(env, "TLS_KEY", "/etc/cowhand/tls/tls.key", str),
        broker_url=_need(env, "BROKER_URL"),
        ca_file=_get(env, "CA_FILE", "/etc/cowhand/ca/ca.crt", str),
        token_file=_get(env, "TOKEN_FILE", "/var/run/secrets/cowhand/token", str),
        metrics_port=_get(env, "METRICS_PORT", 0, int),
        archive=archive_access(env),
    )


@dataclass(frozen=True)
class ArchiveSettings:
    """`cowhand archive`."""

    store: StoreSettings
    tenants: tuple[str, ...]
    """Namespaces that are served."""
    objects_url: str
    """Where the objects are (`COWHAND_OBJECTS_URL`): file:///folder, s3://, gs:// or az://bucket/prefix."""
    objects_options: Mapping[str, str]
    """Options of a bucket (`COWHAND_OBJECTS_OPTIONS`, JSON object of strings, as obstore names them)."""
    objects_config_dir: str
    """Folder with one file for each further option, such as credentials (`COWHAND_OBJECTS_CONFIG_DIR`)."""
    control_accounts: tuple[str, ...]
    """User names that may ask for every tenant (default: gateway and operator of the own namespace)."""
    harness_account: str
    """ServiceAccount name of harness pods in a tenant (default cowhand-harness)."""
    listen_port: int
    """Default 8443."""
    tls_cert: str
    """PEM file (default /etc/cowhand/tls/tls.crt)."""
    tls_key: str
    """PEM file (default /etc/cowhand/tls/tls.key)."""
    metrics_port: int = 0
    """Port of the metrics, plain HTTP (`COWHAND_METRICS_PORT`, default 0: none)."""


def archive(env: Mapping[str, str] | None = None) -> ArchiveSettings:
    """Settings of `cowhand archive`."""
    env = os.environ if env is None else env
    namespace = _need(env, "NAMESPACE")
    account = f"system:serviceaccount:{namespace}:cowhand-"
    return ArchiveSettings(
        store=store(env),
        tenants=_words(_need(env, "TENANTS")),
        objects_url=_need(env, "OBJECTS_URL"),
        objects_options=_get(env, "OBJECTS_OPTIONS", {}, _texts),
        objects_config_dir=_get(env, "OBJECTS_CONFIG_DIR", "", str),
        control_accounts=_get(
            env, "CONTROL_ACCOUNTS", (f"{account}gateway", f"{account}operator"), _words
        ),
        harness_account=_get(env, "HARNESS_ACCOUNT", "cowhand-harness", str),
        listen_port=_get(env, "LISTEN_PORT", 8443, int),
        tls_cert=_get(env, "TLS_CERT", "/etc/cowhand/tls/tls.crt", str),
        tls_key=_get(env, "TLS_KEY", "/etc/cowhand/tls/tls.key", str),
        metrics_port=_get(env, "METRICS_PORT", 0, int),
    )


def _texts(raw: str) -> dict[str, str]:
    found = json.loads(raw)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("it must be a JSON object of strings")
    return found


@dataclass(frozen=True)
class BootstrapSettings:
    """`cowhand bootstrap`: the Helm hook that makes CA, certificates and store users if they are missing."""

    namespace: str
    """Namespace of the control plane."""
    tenants: tuple[str, ...]
    """Namespaces that are served."""
    prefix: str = "cowhand"
    """Key prefix of the store, for the ACL rules."""
    mode: Literal["install", "teardown"] = "install"
    """What to do (`COWHAND_BOOTSTRAP_MODE`): make what is missing, or prepare the release's removal."""
    purge: bool = False
    """Teardown also deletes custom resources, secrets and the store's volume (`COWHAND_PURGE=true`)."""


def bootstrap(env: Mapping[str, str] | None = None) -> BootstrapSettings:
    """Settings of `cowhand bootstrap`."""
    env = os.environ if env is None else env
    mode = _get(env, "BOOTSTRAP_MODE", "install", str)
    if mode not in ("install", "teardown"):
        raise UserError(f"COWHAND_BOOTSTRAP_MODE={mode!r} is not install or teardown")
    return BootstrapSettings(
        namespace=_need(env, "NAMESPACE"),
        tenants=_words(_need(env, "TENANTS")),
        prefix=_get(env, "STORE_PREFIX", "cowhand", str),
        mode="teardown" if mode == "teardown" else "install",
        purge=_get(env, "PURGE", "false", str) == "true",
    )
