"""A real server starts with what bootstrap made: certificate, user file and passwords fit together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cowhand.bootstrap import objects
from cowhand.bootstrap.run import Bootstrap
from cowhand.kube import kinds
from cowhand.session.acl import CONTROL_USERS
from cowhand.settings import BootstrapSettings
from support.memory_kube import MemoryKube
from support.store import Store

NS = "cowhand-system"


class Made:
    """A server with the objects of one bootstrap run, and its clients."""

    def __init__(self, kube: MemoryKube, folder: Path) -> None:
        found = {
            (s["metadata"]["namespace"], s["metadata"]["name"]): s for s in kube.all(kinds.SECRET)
        }
        self.secrets = found
        pair = objects.pair_of(found[(NS, "cowhand-tls-store")])
        self.ca = str(folder / "ca.crt")
        files = {"tls.crt": pair.certificate, "tls.key": pair.key}
        files["ca.crt"] = objects.pair_of(found[(NS, "cowhand-ca-key")]).certificate
        for name, content in files.items():
            (folder / name).write_text(content)
        self.server = Store(
            acl=objects.value(found[(NS, "cowhand-store-acl")], "users.acl"),
            tls=(str(folder / "tls.crt"), str(folder / "tls.key"), self.ca),
        ).start()

    def client(self, user: str | None, password: str | None) -> redis.Redis:
        return redis.Redis(
            host="127.0.0.1",
            port=self.server.port,
            username=user,
            password=password,
            ssl=True,
            ssl_ca_certs=self.ca,
        )

    def as_user(self, namespace: str, name: str) -> redis.Redis:
        secret = self.secrets[(namespace, name)]
        return self.client(objects.value(secret, "username"), objects.value(secret, "password"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:

    kube = MemoryKube()
    settings = BootstrapSettings(namespace=NS, tenants=("default", "team-b"))
    asyncio.run(Bootstrap(kube, settings).run())
    made = Made(kube, tmp_path_factory.mktemp("store"))
    yield made
    made.server.stop()


@pytest.mark.parametrize("user", CONTROL_USERS)
def test_the_control_plane_reaches_every_tenant(made: Made, user: str) -> None:
    client = made.as_user(NS, f"cowhand-store-{user}")
    assert client.set(f"cowhand:team-b:{{p00}}:{user}", "x")
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.flushall()


def test_a_tenant_reaches_its_own_keys_only(made: Made) -> None:
    client = made.as_user("default", "cowhand-store")
    assert client.set("cowhand:default:{p00}:x", "x")
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.get("cowhand:team-b:{p00}:x")


def test_nobody_else_gets_in(made: Made) -> None:
    with pytest.raises(redis.exceptions.AuthenticationError):
        made.client(None, None).get("cowhand:default:{p00}:x")
    with pytest.raises(redis.exceptions.AuthenticationError):
        made.client("t-default", "wrong").ping()
    with pytest.raises(redis.exceptions.AuthenticationError):
        made.client("default", "").ping()


def test_the_probe_may_ping_and_nothing_else(made: Made) -> None:
    client = made.client(objects.PROBE_USER, "anything")
    assert client.ping()
    for command in (
        ["GET", "cowhand:gen"],
        ["INFO"],
        ["PUBLISH", "cowhand:x", "y"],
        ["ACL", "LIST"],
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)
