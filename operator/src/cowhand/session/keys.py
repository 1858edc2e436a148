"""Names of the store's keys and channels. Pure; the layout is docs/interfaces.md section 4.

Everything of a tenant begins with `<prefix>:<namespace>:`, which is what its ACL rule says; then comes the
partition tag `{pNN}`, so that whatever one script touches lies in one cluster slot.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Final

GROUP: Final = "h"
"""Consumer group of the ready streams."""


def doomed(prefix: str) -> str:
    """Sorted set of `<namespace>/<session id>` by the time (ms) at which the archive deletes what it has of them.

    Outside of every tenant's keys: a tenant's login cannot make the archive delete anything.
    """
    return f"{prefix}:doomed"


def slots(prefix: str, pool: str, partitions: int) -> str:
    """Hash of the slots of a model workspace (`slots.py`); outside of every tenant's keys.

    Args:
        prefix: first part of every key.
        pool: hex digest that names the workspace.
        partitions: P of the store.
    """
    return f"{prefix}:{{p{crc(pool) % partitions:02d}}}:slots.{pool}"


def crc(name: str) -> int:
    """CRC16 (XMODEM), which partitions are chosen by."""
    return binascii.crc_hqx(name.encode(), 0)


def identity_key(prefix: str, partition: int | None = None) -> str:
    """Key of the store's identity; on a cluster each partition has a copy, because each may be lost alone."""
    return f"{prefix}:gen" if partition is None else f"{prefix}:{{p{partition:02d}}}:gen"


@dataclass(frozen=True)
class Keys:
    """Key names of one tenant.

    Attributes:
        prefix: first part of every key, `cowhand` by default.
        namespace: the tenant.
        partitions: P, fixed for the life of a store.
    """

    prefix: str
    namespace: str
    partitions: int

    def partition(self, name: str) -> int:
        """Partition of a session id, sandbox uid or tombstone: CRC16 (XMODEM) modulo P."""
        return crc(name) % self.partitions

    def base(self, partition: int) -> str:
        """`<prefix>:<namespace>:{pNN}:`, the beginning of every key of a partition."""
        return f"{self.prefix}:{self.namespace}:{{p{partition:02d}}}:"

    def bases(self) -> list[str]:
        """The bases of all partitions, in order."""
        return [self.base(partition) for partition in range(self.partitions)]

    def base_of(self, name: str) -> str:
        """Base of the partition that `name` falls into."""
        return self.base(self.partition(name))

    def session(self, session_id: str) -> SessionKeys:
        """Keys of one session and of its partition."""
        return SessionKeys(self.base_of(session_id), session_id)

    def sandbox(self, uid: str) -> str:
        """Newest hand record of a sandbox."""
        return f"{self.base_of(uid)}sbx:{uid}"

    def quotas(self) -> list[str]:
        """The tenant's quota, once in each partition; no key of a tenant begins so."""
        return [
            f"{self.prefix}:{{p{partition:02d}}}:quota.{self.namespace}"
            for partition in range(self.partitions)
        ]

    def tombstone(self, digest: str) -> str:
        """Who made this run."""
        return f"{self.base_of(digest)}tomb:{digest}"


@dataclass(frozen=True)
class SessionKeys:
    """Keys that a script about one session may need; `name(...)` gives them in a script's order."""

    base: str
    session_id: str

    def name(self, part: str) -> str:
        """Key of a part of the session (meta, log, ...) or of its partition (ready, workers, own, proj, timers)."""
        suffix = _SESSION_PARTS.get(part)
        if suffix is not None:
            return f"{self.base}s:{self.session_id}:{suffix}"
        return self.base + _PARTITION_PARTS[part]

    @property
    def namespace(self) -> str:
        """The tenant."""
        return self.base.split(":")[1]

    @property
    def meta(self) -> str:
        """The meta hash."""
        return self.name("meta")

    @property
    def log(self) -> str:
        """The log stream."""
        return self.name("log")

    @property
    def hands(self) -> str:
        """The hash of hand records."""
        return self.name("hands")

    @property
    def tail(self) -> str:
        """Channel that announces the last position."""
        return f"{self.base}t:{self.session_id}"

    @property
    def previews(self) -> str:
        """Channel of the text that is being written."""
        return f"{self.base}v:{self.session_id}"


_SESSION_PARTS: Final = {"meta": "m", "log": "l", "dedupe": "d", "hands": "h"}
_PARTITION_PARTS: Final = {
    "ready": "rdy",
    "workers": "w",
    "own": "own",
    "proj": "proj",
    "timers": "tmr",
}
