"""Durability profiles: what a barrier asks of the store, and whether the store that is there can keep the promise.

`barrier` and `confirmed` are what `store.Store.wait` does for a profile; `read_server` and `judge` turn what a
server says of itself into a verdict; `Durability` asks the server, at the start of every process of the control
plane and from then on. Tenants' logins may not ask it: their barriers alone tell them. docs/guarantees.md says
what each profile means for people.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from cowhand.errors import (
    CowhandError,
    Denied,
    StoreTooWeak,
    StoreUnavailable,
    Terminal,
    UserError,
)
from cowhand.session.cluster import parse
from cowhand.session.link import Pipe
from cowhand.session.log import Profile
from cowhand.telemetry.metrics import STORE_PROFILE

if TYPE_CHECKING:
    from cowhand.session.store import Store

LOG = logging.getLogger(__name__)

LOOK_SECONDS: Final = 15.0
"""How often the server is looked at after the start."""

SETTLE_SECONDS = 30.0
"""How long a start waits for replicas that are not there yet before it refuses."""

PAUSE = 0.5

FLOORS: Final[Mapping[str, tuple[int, int]]] = {"Redis": (7, 2), "Valkey": (8, 0)}
"""Oldest versions that are supported; WAITAOF and the commands of our logins are in them."""

RANK: Final[Mapping[str, int]] = {"none": 0, "dev": 1, "standard": 2, "strict": 3, "managed": 3}


def barrier(profile: Profile, replicas: int, timeout_ms: int) -> tuple[str | int, ...] | None:
    """The command that waits until what a connection wrote is as durable as promised; None: there is no barrier."""
    if profile == "standard":
        return ("WAIT", replicas, timeout_ms)
    if profile == "strict":
        return ("WAITAOF", 1, replicas, timeout_ms)
    return None


def confirmed(profile: Profile, replicas: int, reply: Any) -> bool:
    """Whether a barrier's reply says that enough have it: `n` of WAIT, `[local, n]` of WAITAOF."""
    if profile == "strict":
        return bool(reply[0] >= 1 and reply[1] >= replicas)
    return bool(reply >= replicas)


@dataclass(frozen=True)
class Server:
    """What a server says of itself.

    Attributes:
        name: `Valkey` or `Redis`.
        version: its version.
        primary: whether it takes writes.
        replicas: replicas that are in step with it.
        aof: whether it writes an append-only file.
        fsync: `always`, `everysec`, `no`; empty where we may not ask.
        cluster: whether it is a node of a Redis Cluster.
    """

    name: str
    version: tuple[int, ...]
    primary: bool = True
    replicas: int = 0
    aof: bool = False
    fsync: str = ""
    cluster: bool = False

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class Verdict:
    """What the store that is there promises.

    Attributes:
        demanded: profile that was set.
        effective: what it comes to: a profile, or `none` (not even the death of the server's process is survived).
        server: name and version.
        faults: why it is less than demanded, each with what to do; empty if it is not.
        notes: what is worth knowing besides.
        passing: whether waiting may help: only replicas are missing.
    """

    demanded: Profile
    effective: str
    server: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passing: bool = False

    @property
    def weaker(self) -> bool:
        """Whether it promises less than demanded."""
        return RANK[self.effective] < RANK[self.demanded]


def read_server(info: str, fsync: str = "") -> Server:
    """What INFO says; `fsync` is the value of `appendfsync` where CONFIG GET is allowed."""
    pairs = (line.split(":", 1) for line in info.splitlines() if ":" in line and line[0] != "#")
    fields = {name: value.strip() for name, value in pairs}
    valkey = fields.get("server_name") == "valkey" or "valkey_version" in fields
    version = fields.get("valkey_version") or fields.get("redis_version") or "0"
    replicas = [value for name, value in fields.items() if _is_replica(name, value)]
    return Server(
        name="Valkey" if valkey else "Redis",
        version=tuple(int(part) for part in version.split(".") if part.isdigit()),
        primary=fields.get("role", "master") == "master",
        replicas=len(replicas),
        aof=fields.get("aof_enabled") == "1",
        fsync=fsync,
        cluster=(fields.get("redis_mode") or fields.get("server_mode")) == "cluster",
    )


def _is_replica(name: str, value: str) -> bool:
    return name.startswith("slave") and name[5:].isdigit() and "state=online" in value


def judge(demanded: Profile, replicas: int, server: Server) -> Verdict:
    """What a server's promise comes to.

    Args:
        demanded: profile that was set.
        replicas: replicas that have to confirm a barrier of `standard` and `strict`.
        server: the primary.

    Raises:
        StoreTooWeak: a version that is not supported, whatever was allowed.
    """
    floor = FLOORS[server.name]
    if server.version[:2] < floor:
        raise StoreTooWeak(
            f"the store is {server}, but Cowhand needs {server.name} {floor[0]}.{floor[1]} or newer:"
            " upgrade it (Valkey 8 reads the files of Redis 7.2)"
        )
    if demanded == "managed":
        # The provider's word is taken for it: a server cannot be asked for its transaction log.
        return Verdict(demanded, "managed", str(server))
    kept, copies = server.aof and server.fsync != "no", server.replicas >= replicas
    faults, notes = [], []
    if not server.aof:
        faults.append(
            "it writes no append-only file: set `appendonly yes` (a store of a cloud provider: profile managed)"
        )
    elif server.fsync == "no":
        faults.append("it leaves writing to the disk to the kernel: set `appendfsync everysec`")
    if demanded != "dev" and not copies:
        faults.append(
            f"{server.replicas} of {replicas} replicas are in step with it: add replicas, or set store.replicas"
        )
    if demanded == "strict" and kept and server.fsync != "always":
        notes.append(
            "each barrier may take up to 2 s: with `appendfsync always` it takes milliseconds"
        )
    effective = "none" if not kept else demanded if demanded == "dev" or copies else "dev"
    return Verdict(
        *(demanded, effective, str(server), tuple(faults), tuple(notes)),
        passing=effective != demanded and kept and not copies,
    )


def weakest(verdicts: Sequence[Verdict]) -> Verdict:
    """What a store of several servers comes to: the least of them, with the faults and notes of all."""
    least = min(verdicts, key=lambda one: RANK[one.effective])
    if len(verdicts) == 1:
        return least
    return replace(
        least,
        server=f"{', '.join(sorted({one.server for one in verdicts}))} ({len(verdicts)} primaries)",
        faults=tuple(dict.fromkeys(fault for one in verdicts for fault in one.faults)),
        notes=tuple(dict.fromkeys(note for one in verdicts for note in one.notes)),
        passing=all(one.passing for one in verdicts if one.weaker) and least.weaker,
    )


class Durability:
    """Looks at the store that is there; one for each process of the control plane."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.verdict: Verdict | None = None
        self._may_ask = True

    async def look(self) -> Verdict:
        """Ask the server now. Raises StoreTooWeak (its version), StoreUnavailable (also: it is a replica)."""
        config = self._store.config
        verdicts = []
        for pipe in await self._store.reads.pipes():
            server = await self._ask(pipe)
            if not server.primary:
                raise StoreUnavailable(
                    "the store that answers is a replica: is a failover going on?"
                )
            if server.cluster and parse(config.url) is None:
                raise UserError(
                    "the store is a Redis Cluster: give its URL as redis+cluster://host:port,host:port",
                    field="url",
                )
            try:
                verdicts.append(judge(config.profile, config.replicas, server))
            except StoreTooWeak as err:
                self._tell(Verdict(config.profile, "none", str(server), (str(err),)))
                raise
        verdict = weakest(verdicts)
        self._tell(verdict)
        return verdict

    def as_dict(self) -> dict[str, Any] | None:
        """What was seen last, for the gateway's `/healthz`; None: nothing yet."""
        if self.verdict is None:
            return None
        return asdict(self.verdict)

    async def _ask(self, pipe: Pipe) -> Server:
        parts = [await pipe.call("INFO", part) for part in ("server", "replication", "persistence")]
        return read_server(b"".join(parts).decode(errors="replace"), await self._fsync(pipe))

    async def _fsync(self, pipe: Pipe) -> str:
        """`appendfsync`; empty where we may not ask: the logins that bootstrap makes have no CONFIG."""
        if not self._may_ask:
            return ""
        try:
            found = await pipe.call("CONFIG", "GET", "appendfsync")
        except (Denied, Terminal):
            self._may_ask = False
            return ""
        return found[1].decode() if found else ""

    def _tell(self, verdict: Verdict) -> None:
        if verdict == self.verdict:
            return
        self.verdict = verdict
        STORE_PROFILE.clear()
        STORE_PROFILE.labels(verdict.demanded, verdict.effective, verdict.server).set(1)
        text = "the store keeps profile %s (%s, demanded: %s): %s"
        level = logging.WARNING if verdict.weaker else logging.INFO
        more = "; ".join((*verdict.faults, *verdict.notes)) or "all is as it should be"
        LOG.log(level, text, verdict.effective, verdict.server, verdict.demanded, more)

    async def require(self) -> None:
        """Refuse a store that keeps less than the profile that was set; one that cannot be asked is let be.

        Raises:
            StoreTooWeak: it is too old, or weaker than demanded and `allow_weaker` is not set.
        """
        clock = asyncio.get_running_loop()
        end = clock.time() + SETTLE_SECONDS
        while True:
            try:
                verdict = await self.look()
            except (StoreTooWeak, UserError):
                raise
            except CowhandError as err:
                # Away, or not ours: whoever uses it says so, in the way that fits.
                LOG.warning("the store's durability is not known yet: %s", err)
                return
            if not verdict.weaker or self._store.config.allow_weaker:
                return
            if not verdict.passing or clock.time() >= end:
                raise StoreTooWeak(
                    f"store.profile {verdict.demanded} is demanded, but {verdict.server} keeps only"
                    f" {verdict.effective}: {'; '.join(verdict.faults)}. Or accept it: store.allowWeaker"
                )
            await asyncio.sleep(PAUSE)

    async def run(self) -> None:
        """Look for ever: a server that was changed or took over may keep less. Barriers do not rest on this."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except CowhandError as err:
                LOG.warning("the store's durability cannot be seen: %s", err)
