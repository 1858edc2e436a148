"""Certificates: usable by a real TLS stack, and renewed for each reason there is."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest

from cowhand.bootstrap import certs
from cowhand.bootstrap.certs import KeyPair
from cowhand.errors import UserError

NOW = datetime(2026, 11, 21, tzinfo=UTC)
NAMES = certs.service_names("cowhand-broker", "cowhand-system")


@pytest.fixture(scope="module")
def ca() -> KeyPair:
    return certs.new_ca("cowhand-system", NOW)


def handshake(ca: KeyPair, leaf: KeyPair, name: str, tmp: str) -> None:
    """A TLS handshake in memory; raises ssl.SSLError when the client does not accept the server."""
    with open(f"{tmp}/crt", "w") as crt, open(f"{tmp}/key", "w") as key:
        crt.write(leaf.certificate)
        key.write(leaf.key)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(f"{tmp}/crt", f"{tmp}/key")
    client_context = ssl.create_default_context(cadata=ca.certificate)
    a, b, c, d = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(a, b, server_hostname=name)
    server = server_context.wrap_bio(c, d, server_side=True)
    done: set[object] = set()
    for _ in range(20):
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
            c.write(b.read())
            a.write(d.read())
        if len(done) == 2:
            return
    raise AssertionError("no end of the handshake")


@pytest.mark.parametrize(
    "name",
    ["cowhand-broker.cowhand-system.svc", "cowhand-broker", "localhost", "127.0.0.1"],
)
def test_a_client_with_the_ca_accepts_every_name(
    ca: KeyPair, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    now = datetime.now(UTC)
    fresh = certs.new_ca("cowhand-system", now)
    leaf = certs.new_leaf(fresh, NAMES, now)
    tmp = str(tmp_path_factory.mktemp("tls"))
    handshake(fresh, leaf, name, tmp)
    with pytest.raises(ssl.SSLError):
        handshake(fresh, leaf, "cowhand-gateway", tmp)
    with pytest.raises(ssl.SSLError):
        handshake(certs.new_ca("other", now), leaf, name, tmp)


def test_a_fresh_leaf_is_not_due(ca: KeyPair) -> None:
    assert certs.leaf_is_due(certs.new_leaf(ca, NAMES, NOW), ca, NAMES, NOW) == ""


def test_each_reason_to_renew(ca: KeyPair) -> None:
    leaf = certs.new_leaf(ca, NAMES, NOW)
    other = certs.new_leaf(ca, NAMES, NOW)
    end = NOW + certs.LEAF_LIFE
    assert certs.leaf_is_due(leaf, ca, NAMES, end - timedelta(days=31)) == ""
    assert certs.leaf_is_due(leaf, ca, NAMES, end - timedelta(days=29)) == "expires"
    assert certs.leaf_is_due(leaf, ca, (*NAMES, "new.example"), NOW) == "a name is missing"
    assert "another CA" in certs.leaf_is_due(leaf, certs.new_ca("x", NOW), NAMES, NOW)
    assert "belong together" in certs.leaf_is_due(
        KeyPair(leaf.certificate, other.key), ca, NAMES, NOW
    )
    assert "cannot be read" in certs.leaf_is_due(KeyPair("", ""), ca, NAMES, NOW)


def test_another_ca_of_the_same_name_does_not_count(ca: KeyPair) -> None:
    twin = certs.new_ca("cowhand-system", NOW)
    assert "another CA" in certs.leaf_is_due(certs.new_leaf(twin, NAMES, NOW), ca, NAMES, NOW)


def test_a_ca_expires_and_a_broken_one_is_an_error_that_says_what_to_do(ca: KeyPair) -> None:
    assert certs.ca_is_due(ca, NOW) == ""
    assert certs.ca_is_due(ca, NOW + certs.CA_LIFE - timedelta(days=1)) == "expires"
    with pytest.raises(UserError, match="delete the Secret"):
        certs.ca_is_due(KeyPair("junk", "junk"), NOW)
    with pytest.raises(UserError, match="do not belong together"):
        certs.ca_is_due(KeyPair(ca.certificate, certs.new_ca("x", NOW).key), NOW)


def test_a_leaf_never_outlives_its_ca() -> None:
    ca = certs.new_ca("x", NOW)
    late = NOW + certs.CA_LIFE - timedelta(days=60)
    leaf = certs.new_leaf(ca, NAMES, late)
    assert certs.leaf_is_due(leaf, ca, NAMES, late) == ""
    assert certs.leaf_is_due(leaf, ca, NAMES, late + timedelta(days=40)) == "expires"
