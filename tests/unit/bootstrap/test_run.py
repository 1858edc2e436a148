"""Bootstrap on an in-memory API server: complete, idempotent, race-safe, and it repairs what follows."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cowhand.bootstrap import certs, objects
from cowhand.bootstrap.run import Bootstrap
from cowhand.errors import Retryable, UserError
from cowhand.kube import kinds
from cowhand.kube.errors import Conflict
from cowhand.session.acl import CONTROL_USERS
from cowhand.settings import BootstrapSettings
from cowhand.settings import bootstrap as load_settings
from support.memory_kube import MemoryKube

NOW = datetime(2026, 11, 21, tzinfo=UTC)
NS = "cowhand-system"
Json = dict[str, Any]


def bootstrap(
    kube: MemoryKube, *tenants: str, now: datetime = NOW, prefix: str = "cowhand"
) -> Bootstrap:
    settings = BootstrapSettings(namespace=NS, tenants=tenants or ("default",), prefix=prefix)
    counter = itertools.count()
    mark = id(counter)
    return Bootstrap(kube, settings, now=lambda: now, token=lambda: f"pw-{mark}-{next(counter)}")


def snapshot(kube: MemoryKube) -> dict[tuple[str, str, str], tuple[str, Json]]:
    return {
        (kind.kind, item["metadata"]["namespace"], item["metadata"]["name"]): (
            item["metadata"]["resourceVersion"],
            item["data"],
        )
        for kind in (kinds.SECRET, kinds.CONFIG_MAP)
        for item in kube.all(kind)
    }


def text(kube_snapshot: Any, kind: str, namespace: str, name: str, key: str) -> str:
    raw = kube_snapshot[(kind, namespace, name)][1][key]
    return raw if kind == "ConfigMap" else base64.b64decode(raw).decode()


async def test_it_makes_exactly_what_the_interfaces_name() -> None:
    kube = MemoryKube()
    await bootstrap(kube, "default", "team-b").run()
    made = snapshot(kube)
    secrets = {(ns, name) for kind, ns, name in made if kind == "Secret"}
    assert secrets == {
        (NS, "cowhand-ca-key"),
        (NS, "cowhand-tls-archive"),
        (NS, "cowhand-tls-broker"),
        (NS, "cowhand-tls-gateway"),
        (NS, "cowhand-tls-store"),
        (NS, "cowhand-store-acl"),
        (NS, "cowhand-store-operator"),
        (NS, "cowhand-store-broker"),
        (NS, "cowhand-store-gateway"),
        (NS, "cowhand-store-archive"),
        ("default", "cowhand-store"),
        ("team-b", "cowhand-store"),
    }
    maps = {(ns, name) for kind, ns, name in made if kind == "ConfigMap"}
    assert maps == {(ns, "cowhand-ca") for ns in (NS, "default", "team-b")}
    ca = text(made, "Secret", NS, "cowhand-ca-key", "tls.crt")
    assert {
        text(made, "ConfigMap", ns, "cowhand-ca", "ca.crt")
        for _, ns, name in made
        if name == "cowhand-ca"
    } == {ca}
    assert text(made, "Secret", "team-b", "cowhand-store", "username") == "t-team-b"


async def test_passwords_differ_and_stand_hashed_in_the_user_file() -> None:
    kube = MemoryKube()
    await bootstrap(kube, "default", "team-b").run()
    made = snapshot(kube)
    places = [(NS, f"cowhand-store-{user}") for user in CONTROL_USERS]
    places += [("default", "cowhand-store"), ("team-b", "cowhand-store")]
    passwords = [text(made, "Secret", ns, name, "password") for ns, name in places]
    assert len(set(passwords)) == 6
    acl = text(made, "Secret", NS, "cowhand-store-acl", "users.acl")
    assert acl.startswith("user default off ")
    for password in passwords:
        assert password not in acl
        assert f"#{hashlib.sha256(password.encode()).hexdigest()}" in acl


async def test_a_second_run_changes_nothing() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    before = snapshot(kube)
    await bootstrap(kube).run()
    assert snapshot(kube) == before


async def test_a_new_tenant_gets_its_user_and_nothing_else_changes() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    before = snapshot(kube)
    await bootstrap(kube, "default", "team-b").run()
    after = snapshot(kube)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("Secret", NS, "cowhand-store-acl")}
    assert "user t-team-b on" in text(after, "Secret", NS, "cowhand-store-acl", "users.acl")
    await bootstrap(kube).run()
    final = text(snapshot(kube), "Secret", NS, "cowhand-store-acl", "users.acl")
    assert "t-team-b" not in final
    assert "user t-default on" in final


async def test_foreign_users_stay_and_default_stays_off() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    edited = "user default on nopass ~* +@all\nuser backup on #aa ~* +@read\nuser operator on nopass +@all\n"
    kube.put(objects.secret(NS, "cowhand-store-acl", {"users.acl": edited}))
    await bootstrap(kube).run()
    lines = text(snapshot(kube), "Secret", NS, "cowhand-store-acl", "users.acl").splitlines()
    assert [line for line in lines if line.startswith("user default")] == [
        "user default off resetpass ~* &* +@all"
    ]
    assert "user backup on #aa ~* +@read" in lines
    assert [line for line in lines if "nopass" in line] == [objects.PROBE_RULE]


@pytest.mark.parametrize("runs", [2, 3])
async def test_runs_at_the_same_time_agree(runs: int) -> None:
    kube = Interleaved()
    results = await asyncio.gather(
        *(bootstrap(kube, "default", "team-b").run() for _ in range(runs)), return_exceptions=True
    )
    assert all(r is None or isinstance(r, Retryable) for r in results), results
    assert None in results
    made = snapshot(kube)
    ca = objects.pair_of(await kube.get(kinds.SECRET, NS, "cowhand-ca-key") or {})
    for component in objects.SERVICES:
        leaf = objects.pair_of(await kube.get(kinds.SECRET, NS, f"cowhand-tls-{component}") or {})
        names = certs.service_names(f"cowhand-{component}", NS)
        assert certs.leaf_is_due(leaf, ca, names, NOW) == ""
    password = text(made, "Secret", "team-b", "cowhand-store", "password")
    acl = text(made, "Secret", NS, "cowhand-store-acl", "users.acl")
    assert hashlib.sha256(password.encode()).hexdigest() in acl


class Interleaved(MemoryKube):
    """Every call lets the others go first."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        found = await super().get(*args, **kwargs)
        await asyncio.sleep(0)
        return found

    async def create(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return await super().create(*args, **kwargs)


async def test_certificates_are_renewed_before_they_expire_and_the_ca_stays() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    before = snapshot(kube)
    later = NOW + certs.LEAF_LIFE - timedelta(days=29)
    await bootstrap(kube, now=later).run()
    after = snapshot(kube)
    assert {key[2] for key in before if before[key] != after[key]} == {
        f"cowhand-tls-{component}" for component in objects.SERVICES
    }


async def test_a_lost_ca_is_replaced_together_with_everything_it_signed() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    before = snapshot(kube)
    kube.vanish(kinds.SECRET, NS, "cowhand-ca-key")
    await bootstrap(kube).run()
    after = snapshot(kube)
    assert {key[2] for key in before if before[key] != after[key]} == {
        "cowhand-ca-key",
        "cowhand-ca",
        *(f"cowhand-tls-{component}" for component in objects.SERVICES),
    }


async def test_an_unreadable_ca_is_left_for_people() -> None:
    kube = MemoryKube()
    kube.put(objects.secret(NS, "cowhand-ca-key", {"tls.crt": "junk", "tls.key": "junk"}))
    with pytest.raises(UserError, match="cowhand-ca-key"):
        await bootstrap(kube).run()
    assert [s["metadata"]["name"] for s in kube.all(kinds.SECRET)] == ["cowhand-ca-key"]


async def test_it_gives_up_when_the_user_file_keeps_changing() -> None:
    kube = MemoryKube()
    await bootstrap(kube).run()
    kube.fail("patch", kinds.SECRET, Conflict("changed"), times=50)
    with pytest.raises(Retryable, match="keeps changing"):
        await bootstrap(kube, "default", "team-b").run()


async def test_a_password_without_its_user_name_is_completed_and_kept() -> None:
    kube = MemoryKube()
    kube.put(objects.secret("default", "cowhand-store", {"password": "kept"}))
    await bootstrap(kube).run()
    made = snapshot(kube)
    assert text(made, "Secret", "default", "cowhand-store", "password") == "kept"
    assert text(made, "Secret", "default", "cowhand-store", "username") == "t-default"


def test_settings() -> None:
    env = {"COWHAND_NAMESPACE": NS, "COWHAND_TENANTS": "default, team-b"}
    loaded = load_settings(env)
    assert (loaded.tenants, loaded.mode, loaded.purge) == (("default", "team-b"), "install", False)
    torn = load_settings({**env, "COWHAND_BOOTSTRAP_MODE": "teardown", "COWHAND_PURGE": "true"})
    assert (torn.mode, torn.purge) == ("teardown", True)
    with pytest.raises(UserError, match="install or teardown"):
        load_settings({**env, "COWHAND_BOOTSTRAP_MODE": "explode"})
