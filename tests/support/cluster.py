"""A real Redis Cluster on loopback: nodes that share the slots, replicas where a test asks for them.

Made by hand with CLUSTER commands, so that a test can stop a slot on its way from one node to another.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cowhand.session.cluster import SLOTS, slot_of
from support.store import Store as Server
from support.store import free_port

NODE_TIMEOUT_MS = 500
"""After so long without an answer a node counts as gone."""


class Node(Server):
    """One node."""

    def __init__(self, binary: str | None = None, *, acl: str | None = None) -> None:
        super().__init__(binary, acl=acl)
        self.bus = free_port()
        self.slots: tuple[int, int] | None = None

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(),
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-port", str(self.bus), "--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
        ]

    @property
    def id(self) -> str:
        return self.text("CLUSTER", "MYID")

    def text(self, *words: str) -> str:
        """The answer to one command, a bulk string."""
        return self.command(*words).split(b"\r\n", 1)[1].rstrip(b"\r\n").decode()

    def meet(self, other: Node) -> None:
        self.command("CLUSTER", "MEET", "127.0.0.1", str(other.port), str(other.bus))


class Cluster:
    """`start` before use, `stop` after it. `nodes` are the primaries in the order of their slots."""

    def __init__(
        self,
        binary: str | None = None,
        *,
        primaries: int = 3,
        replicas: int = 0,
        acl: str | None = None,
    ) -> None:
        self.nodes = [Node(binary, acl=acl) for _ in range(primaries)]
        self.replicas = [Node(binary, acl=acl) for _ in range(primaries * replicas)]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> Cluster:
        every = [*self.nodes, *self.replicas]
        for number, node in enumerate(every):
            node.start()
            node.command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        share = SLOTS // len(self.nodes)
        for number, node in enumerate(self.nodes):
            last = SLOTS - 1 if node is self.nodes[-1] else (number + 1) * share - 1
            node.command("CLUSTER", "ADDSLOTSRANGE", str(number * share), str(last))
        for node in every[1:]:
            node.meet(self.nodes[0])
        until(lambda: all(_knows(node, len(every)) for node in every))
        for number, replica in enumerate(self.replicas):
            replica.command("CLUSTER", "REPLICATE", self.nodes[number % len(self.nodes)].id)
        for replica in self.replicas:
            until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))  # noqa: B023
        until(lambda: all(b"cluster_state:ok" in _info(node) for node in every))
        return self

    def stop(self) -> None:
        for node in (*self.nodes, *self.replicas):
            node.stop()

    def flush(self) -> None:
        for node in self.nodes:
            node.flush()

    def owner(self, key: str) -> Node:
        """The node that has a key's slot, as the first node that is alive sees it."""
        slot = slot_of(key)
        for line in self._table().splitlines():
            words = line.split()
            for span in words[8:]:
                first, _, last = span.partition("-")
                if not span.startswith("[") and int(first) <= slot <= int(last or first):
                    port = int(words[1].split("@")[0].rpartition(":")[2])
                    return next(n for n in (*self.nodes, *self.replicas) if n.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def _table(self) -> str:
        for node in (*self.nodes, *self.replicas):
            try:
                return node.text("CLUSTER", "NODES")
            except OSError:
                continue
        raise AssertionError("no node is alive")

    # A slot on its way

    def begin_move(self, key: str, target: Node) -> Node:
        """The slot of a key is on its way; answers where it comes from."""
        source, slot = self.owner(key), str(slot_of(key))
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        return source

    def move_keys(self, key: str, source: Node, target: Node, *, only: str = "") -> int:
        """Take keys of the slot to the target; `only`: those whose name ends so. Answers how many."""
        raw = source.text("CLUSTER", "GETKEYSINSLOT", str(slot_of(key)), "10000").split("\r\n")
        names = [name for name in raw[1::2] if name.endswith(only)]
        for name in names:
            source.command("MIGRATE", "127.0.0.1", str(target.port), name, "0", "5000")
        return len(names)

    def end_move(self, key: str, source: Node, target: Node) -> None:
        """All of the slot is at the target, and everybody knows."""
        self.move_keys(key, source, target)
        for node in (target, source, *self.nodes):
            node.command("CLUSTER", "SETSLOT", str(slot_of(key)), "NODE", target.id)

    def move(self, key: str, target: Node) -> None:
        """The slot of a key goes to another node."""
        self.end_move(key, self.begin_move(key, target), target)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the cluster does not come to it")


def _info(node: Node) -> bytes:
    return node.command("CLUSTER", "INFO")


def _knows(node: Node, count: int) -> bool:
    return f"cluster_known_nodes:{count}\r".encode() in _info(node)
