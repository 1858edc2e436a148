"""The store misbehaves: restarts, forgotten scripts, an empty disk, wrong passwords, foreign tenants, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import ipaddress
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cowhand.errors import Denied, SessionNotFound, StoreMismatch, StoreUnavailable, UserError
from cowhand.session import connect
from cowhand.session import link as link_module
from cowhand.session.acl import CONTROL_USERS, users_acl
from cowhand.session.log import StoreConfig
from cowhand.session.preview import Preview
from cowhand.session.store import Store
from support import sessions as make
from support.store import Store as Server
from support.store import installed

USERS = (*CONTROL_USERS, "t-team-a", "t-team-b")


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server().start()
    yield one
    one.stop()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[Store]:
    async with connect(StoreConfig(server.url), namespace="team-a") as one:
        yield one


async def test_scripts_that_the_server_forgot_are_loaded_again(log_roles):
    sid = await make.start(log_roles.log)
    await log_roles.store.writes.call("SCRIPT", "FLUSH")
    assert await log_roles.log.emit_event(sid, make.message("m1")) == 3
    await log_roles.store.writes.call("SCRIPT", "FLUSH")
    many = (log_roles.log.emit_event(sid, make.message(f"x{n}")) for n in range(20))
    assert sorted(await asyncio.gather(*many)) == list(range(4, 24))


async def test_everything_goes_on_after_a_restart_of_the_server(server, store):
    log, worker = store.session_log(), store.worker_log("pod-1")
    await worker.beat()
    sid = await make.start(log)
    work = worker.work()
    assert await anext(work) == sid
    lease = await make.take(worker, sid)
    await worker.append(lease, [make.result("before")])
    follow = log.follow(sid, 5)
    following = asyncio.create_task(anext(follow))
    waiting = asyncio.create_task(anext(work))
    await asyncio.to_thread(server.restart)
    assert await worker.append(lease, [make.result("after")]) == 5
    await worker.beat()
    assert (await asyncio.wait_for(following, 60)).data["content"] == "after"
    other = await make.start(log)
    assert await asyncio.wait_for(waiting, 60) == other
    await work.aclose()
    await follow.aclose()
    assert [e.seq for e in await log.get_events(sid)] == [1, 2, 3, 4, 5]


async def test_a_server_that_does_not_answer_is_unavailable(server, store, monkeypatch):
    sid = await make.start(store.session_log())
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.1)
    server.kill()
    with pytest.raises(StoreUnavailable):
        await store.session_log().emit_event(sid, make.message("m1"))
    with pytest.raises(StoreUnavailable):
        await store.session_log().get_session(sid)
    with pytest.raises(StoreUnavailable):
        await store.check()
    server.start()
    assert await store.session_log().emit_event(sid, make.message("m1")) == 3


async def test_an_empty_server_in_its_place_is_noticed(server, store):
    log, worker = store.session_log(), store.worker_log("pod-1")
    await worker.beat()
    sid = await make.start(log)
    lease = await make.take(worker, sid)
    await store.session_log().get_session(sid)
    await asyncio.to_thread(server.restart, empty=True)
    # Another process makes it a store of its own.
    async with connect(StoreConfig(server.url), namespace="team-a") as newcomer:
        await newcomer.check()
    for attempt in (
        log.create_session(make.meta(make.new_sid()), [make.created()]),
        log.get_session(sid),
        worker.append(lease, [make.result()]),
        worker.beat(),
        anext(worker.work()),
        anext(store.control_log().projection_nudges(["team-a"])),
        store.check(),
    ):
        with pytest.raises(StoreMismatch, match="Restore its volume"):
            await attempt


async def test_who_follows_goes_on_when_the_right_data_is_back(server, store):
    """The pub/sub connection that met a wrong store must not stay refused for good."""
    log = store.session_log()
    sid = await make.start(log)
    nudges = store.control_log().projection_nudges(["team-a"])
    assert await anext(nudges) == "team-a"
    aside = await asyncio.to_thread(server.swap_for_empty)
    with pytest.raises(StoreMismatch):
        await anext(nudges)
    for attempt in (
        anext(log.follow(sid)),
        anext(store.control_log().projection_nudges(["team-a"])),
    ):
        with pytest.raises(StoreMismatch):
            await attempt
    await asyncio.to_thread(server.swap_back, aside)
    events = log.follow(sid)
    assert (await anext(events)).seq == 1
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    await log.emit_event(sid, make.message("m1"))
    assert (await waiting).seq == 3
    nudges = store.control_log().projection_nudges(["team-a"])
    assert await anext(nudges) == "team-a"
    again = asyncio.ensure_future(anext(nudges))
    await make.start(log)
    assert await asyncio.wait_for(again, 60) == "team-a"


async def test_an_empty_server_without_an_identity_is_not_adopted(server, store):
    await store.check()
    await asyncio.to_thread(server.restart, empty=True)
    with pytest.raises(StoreMismatch):
        await store.check()
    assert server.command("EXISTS", "cowhand:gen") == b":0\r\n"


class Memory:
    """An IdentityKeeper that outlives processes."""

    where = "ConfigMap cowhand-system/cowhand-store-identity"

    def __init__(self) -> None:
        self.kept: str | None = None

    async def recall(self) -> str | None:
        return self.kept

    async def keep(self, identity: str) -> None:
        self.kept = identity


async def test_a_process_that_starts_anew_refuses_an_emptied_store_until_a_person_accepts_it(
    server,
):
    memory = Memory()
    config = StoreConfig(server.url)
    async with connect(config, namespace="team-a", keeper=memory) as first:
        sid = await make.start(first.session_log())
    old = memory.kept
    assert old
    await asyncio.to_thread(server.restart, empty=True)
    async with connect(config, namespace="team-a", keeper=memory) as operator:
        for _ in range(2):
            with pytest.raises(StoreMismatch, match=f"is empty.*delete {memory.where}"):
                await operator.session_log().get_session(sid)
        assert server.command("EXISTS", "cowhand:gen") == b":0\r\n", "it made itself a new store"
        async with connect(config, namespace="team-a") as newcomer:
            await newcomer.check()
        with pytest.raises(StoreMismatch, match="is another one"):
            await operator.session_log().get_session(sid)
        memory.kept = None
        with pytest.raises(SessionNotFound):
            await operator.session_log().get_session(sid)
        assert memory.kept
        assert memory.kept != old


async def test_without_that_memory_a_new_process_takes_the_emptied_store_for_a_new_one(server):
    config = StoreConfig(server.url)
    async with connect(config, namespace="team-a") as first:
        sid = await make.start(first.session_log())
    await asyncio.to_thread(server.restart, empty=True)
    async with connect(config, namespace="team-a") as operator:
        with pytest.raises(SessionNotFound):
            await operator.session_log().get_session(sid)


async def test_data_lost_behind_an_open_connection_is_noticed(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.log.get_session(sid)
    await log_roles.store.writes.call("FLUSHALL")
    for attempt in (
        log_roles.log.get_session(sid),
        log_roles.log.get_events(sid),
        log_roles.log.emit_event(sid, make.message("m")),
        log_roles.worker.append(lease, [make.result()]),
    ):
        with pytest.raises(StoreMismatch):
            await attempt


async def test_a_missing_session_in_the_right_store_is_no_mismatch(log_roles):
    """Control of the test above."""
    await log_roles.store.verify()


def test_a_bad_url_says_so():
    with pytest.raises(UserError, match="store URL 'http://x' is not valid"):
        connect(StoreConfig("http://x"))
    with pytest.raises(UserError, match="not a namespace"):
        connect(StoreConfig("redis://127.0.0.1:1")).session_log()


# Users


@pytest.fixture(scope="module", params=sorted(installed()) or [""])
def guarded(request: pytest.FixtureRequest) -> Iterator[Server]:
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in USERS}
    acl = users_acl(hashed, ["team-a", "team-b"])
    one = Server(installed().get(request.param), acl=acl).start()
    yield one
    one.stop()


def as_user(server: Server, user: str, namespace: str = "team-a", **more: str) -> Store:
    config = StoreConfig(server.url, username=user, password=more.get("password", f"pw-{user}"))
    return connect(config, namespace=namespace)


async def test_a_tenant_does_all_its_work_and_the_control_plane_too(guarded):
    async with as_user(guarded, "operator") as control_store, as_user(guarded, "t-team-a") as store:
        control = control_store.control_log()
        digest = hashlib.sha256(guarded.binary.encode()).hexdigest()
        sid = make.new_sid()
        await control_store.session_log().create_session(
            make.meta(sid, tombstone=digest), [make.created(), make.message()]
        )
        log, worker = store.session_log(), store.worker_log("pod-1")
        await worker.beat()
        work = worker.work()
        assert await anext(work) == sid
        await work.aclose()
        lease = await make.take(worker, sid)
        follow, nudges = log.follow(sid, 4), worker.nudges()
        following, nudged = asyncio.create_task(anext(follow)), asyncio.create_task(anext(nudges))
        await worker.append(lease, [make.result()], status={"turns": 1})
        assert (await asyncio.wait_for(following, 60)).seq == 4
        await worker.touch(lease)
        await worker.barrier()
        await log.emit_event(sid, make.message("m1"))
        assert sid in await worker.beat()
        assert not (await worker.park(lease, 5)).parked
        await worker.handover(lease)
        lease = await make.take(worker, sid)
        assert await worker.get_hand(sid, "sandbox", 1) is None
        assert await worker.sweep() == 0
        parked = await worker.park(lease, lease.next_seq, state="rescheduling", wake_at_ms=1)
        assert parked.parked
        assert await worker.sweep() == 1
        lease = await make.take(worker, sid)
        gate = store.rate_gate()
        entry = await gate.enter("w", "m")
        await gate.shut("w", "m", entry, kind="rate_limit_error", retry_after_s=0)
        await gate.opened("w", "m", await gate.enter("w", "m"))
        await control.set_mode("team-a", sid, "suspended", make.suspended())
        assert await control.take_projections("team-a") == [sid]
        assert await anext(control.projection_nudges(["team-a", "team-b"])) == "team-a"
        await control.drop_worker("team-a", "pod-1")
        await control.sweep("team-a")
        await control.backlog("team-a")
        await control.close("team-a", sid, make.deleted(), retain_s=1)
        await worker.retire()
        for task, generator in ((following, follow), (nudged, nudges)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await generator.aclose()


async def test_nothing_acknowledged_is_lost_when_a_guarded_store_restarts():
    """The append-only file is replayed as the default user, each script as a transaction (see users_acl)."""
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in USERS}
    server = Server(acl=users_acl(hashed, ["team-a"]), fsync="always").start()
    try:
        async with as_user(server, "operator") as control:
            sid = await make.start(control.session_log())
            before = await control.session_log().get_events(sid)
            server.kill()
            server.start()
            assert await control.session_log().get_events(sid) == before
            assert "CRITICAL" not in server.log_tail()
    finally:
        server.stop()


async def test_a_tenant_reaches_nothing_of_another(guarded):
    async with (
        as_user(guarded, "operator", "team-b") as theirs,
        as_user(guarded, "t-team-a", "team-b") as store,
    ):
        sid = await make.start(theirs.session_log(), namespace="team-b")
        keys = theirs.keys().session(sid)
        log, worker, control = store.session_log(), store.worker_log("pod-1"), store.control_log()
        for attempt in (
            log.get_session(sid),
            log.get_events(sid),
            log.emit_event(sid, make.message("m1")),
            log.create_session(make.meta(make.new_sid(), "team-b"), [make.created()]),
            anext(log.follow(sid)),
            worker.beat(),
            worker.claim(sid),
            anext(worker.work()),
            worker.get_hand(sid, "sandbox", 1),
            control.set_mode("team-b", sid, "suspended", make.suspended()),
            control.close("team-b", sid, make.deleted(), retain_s=0),
            control.backlog("team-b"),
            store.writes.call("PUBLISH", keys.tail, "9"),
            store.previews().publish(sid, Preview(5, 0, 0, "look here")),
            anext(store.previews().follow(sid)),
            store.rate_gate().enter("w", "m"),
            store.writes.call("XADD", keys.log, "*", "t", "x"),
        ):
            with pytest.raises(Denied, match="ACL"):
                await attempt
        # A script that declares a key of its own and then reaches for a foreign one.
        own = store.keys("team-a").session(sid)
        source = "return redis.call('HGETALL', ARGV[1])"
        loaded = await theirs.writes.call("SCRIPT", "LOAD", source)
        with pytest.raises(Denied, match="ACL"):
            await store.writes.call("EVALSHA", loaded, 1, own.meta, keys.meta)
        assert [e.seq for e in await theirs.session_log().get_events(sid)] == [1, 2]
        assert (await theirs.session_log().get_session(sid)).mode == "running"


FORBIDDEN = [
    ("CONFIG", "GET", "*"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("ACL", "LIST"),
    ("SLOWLOG", "GET"),
    ("MONITOR",),
    ("SHUTDOWN",),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "LOAD", "return 1"),
    ("EVAL", "return 1", "0"),
    ("FUNCTION", "LOAD", "#!lua name=x\n"),
    ("FCALL", "x", "0"),
    ("GET", "cowhand:scripts"),
    ("REPLICAOF", "NO", "ONE"),
    ("PSUBSCRIBE", "*"),
    ("SUBSCRIBE", "cowhand:team-b:{p00}:p"),
    ("CLIENT", "LIST"),
    ("SET", "cowhand:gen", "mine"),
    ("DEL", "cowhand:gen"),
    ("GET", "other:key"),
]


@pytest.mark.parametrize("command", FORBIDDEN, ids=" ".join)
async def test_a_tenant_cannot_harm_the_store(guarded, command):
    async with as_user(guarded, "operator") as operator:
        await operator.check()
    async with as_user(guarded, "t-team-a") as store:
        await store.check()
        with pytest.raises(Denied, match="ACL"):
            await store.reads.call(*command)


async def test_the_control_plane_cannot_administer_the_store(guarded):
    async with as_user(guarded, "operator") as store:
        for command in FORBIDDEN[:4]:
            with pytest.raises(Denied, match="ACL"):
                await store.reads.call(*command)


@pytest.mark.parametrize(
    ("user", "password"), [("t-team-a", "wrong"), ("", ""), ("nobody", "pw"), ("default", "")]
)
async def test_wrong_or_no_password(guarded, user, password):
    async with as_user(guarded, user, password=password) as store:
        with pytest.raises(Denied, match="user or password"):
            await store.check()
        with pytest.raises(Denied):
            await anext(store.worker_log("pod-1").nudges())


async def test_a_tenant_waits_for_the_identity_that_the_control_plane_makes(guarded, monkeypatch):
    async with as_user(guarded, "operator") as operator:
        await operator.writes.call("DEL", "cowhand:gen")
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    async with as_user(guarded, "t-team-a") as store:
        with pytest.raises(StoreUnavailable, match="no identity yet"):
            await store.check()
        async with as_user(guarded, "broker") as broker:
            await broker.check()
        await store.check()


# TLS


def certificate(folder: Path) -> tuple[str, str, str]:
    """A self-signed certificate for 127.0.0.1: (certificate, key, CA) as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "tls.crt", folder / "tls.key"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(cert), str(private), str(cert)


async def test_tls_with_our_ca_and_only_with_it(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = certificate(tmp_path / "a")
    foreign = certificate(tmp_path / "b")[2]
    server = Server(tls=files).start()
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    try:
        async with connect(StoreConfig(server.url, ca_file=files[2]), namespace="team-a") as store:
            sid = await make.start(store.session_log())
            assert len(await store.session_log().get_events(sid)) == 2
        for ca in (foreign, ""):
            async with connect(StoreConfig(server.url, ca_file=ca), namespace="team-a") as store:
                with pytest.raises(StoreUnavailable, match="certificate"):
                    await store.check()
    finally:
        server.stop()


# A replica


async def test_profile_standard_waits_for_a_replica(server, monkeypatch):
    replica = Server().start()
    monkeypatch.setattr("cowhand.session.barriers.WAIT_MS", 200)
    config = StoreConfig(server.url, profile="standard")
    try:
        async with connect(config, namespace="team-a") as store:
            with pytest.raises(StoreUnavailable, match="ask again"):
                await make.start(store.session_log())
            replica.command("REPLICAOF", "127.0.0.1", str(server.port))
            sid = make.new_sid()
            for _ in range(100):  # Idempotent: until the replica has joined.
                with contextlib.suppress(StoreUnavailable):
                    await make.start(store.session_log(), sid=sid)
                    break
            monkeypatch.setattr("cowhand.session.barriers.WAIT_MS", 20_000)
            worker = store.worker_log("pod-1")
            await worker.beat()
            lease = await make.take(worker, sid)
            await worker.append(lease, [make.result("safe")])
            await worker.barrier(lease)
            # The connection breaks between append and barrier: the barrier looks whether the append is there.
            await worker.append(lease, [make.result("safe too")])
            await store.writes.link.close()
            await worker.barrier(lease)
            await worker.barrier()
            await asyncio.to_thread(server.kill)
            replica.command("REPLICAOF", "NO", "ONE")
            async with connect(StoreConfig(replica.url), namespace="team-a") as promoted:
                log = await promoted.session_log().get_events(sid)
                assert [e.data.get("content") for e in log[-2:]] == ["safe", "safe too"]
    finally:
        replica.stop()
