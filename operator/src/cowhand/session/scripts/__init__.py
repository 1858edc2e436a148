"""The Lua scripts of the log, loaded as package data: the only code that writes session state.

Each script touches keys of one partition only. `KEYS` declares which parts it takes, in which order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Final

PARTS: Final[dict[str, tuple[str, ...]]] = {
    "create": ("meta", "log", "dedupe", "ready", "proj"),
    "ingest": ("meta", "log", "dedupe", "ready", "workers", "own"),
    "claim": ("meta", "log", "ready", "workers", "own", "proj", "timers"),
    "append": ("meta", "log", "own", "proj"),
    "touch": ("meta", "own"),
    "park": ("meta", "own", "proj", "timers"),
    "handover": ("meta", "own", "proj", "ready"),
    "requeue": ("meta", "own", "proj", "ready", "workers"),
    "audit": ("meta", "ready", "workers", "own", "timers"),
    "set_mode": ("meta", "log", "dedupe", "ready", "workers", "own", "proj"),
    "close": ("meta", "log", "dedupe", "hands", "own", "proj", "timers"),
    "put_hand": ("meta", "hands"),
    "put_sandbox": (),
    "tomb": (),
    "beat": ("workers",),
    "suspects": ("own", "workers"),
    "gate_enter": (),
    "gate_shut": (),
    "gate_open": (),
    "slots": (),
    "due": ("timers", "ready"),
    "giveback": ("meta", "ready"),
    "trim": ("ready",),
    "archived": ("meta", "log"),
    "forget": ("ready",),
    "stage": (),
    "import": ("meta", "log", "dedupe", "ready", "own", "proj"),
    "regress": ("meta", "log", "dedupe", "proj"),
    "accept": ("meta", "proj"),
}
"""Parts of a session (see `keys.SessionKeys.name`) that each script takes as KEYS."""


@dataclass(frozen=True)
class Script:
    """A script with its digest, as EVALSHA wants it."""

    name: str
    source: str

    @cached_property
    def sha(self) -> str:
        """SHA-1 of the source, which is how the server names a script."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def load() -> dict[str, Script]:
    """All scripts by name, each with `lib.lua` before it."""
    folder = resources.files(__name__)
    lib = (folder / "lib.lua").read_text(encoding="utf-8")
    return {
        name: Script(name, lib + (folder / f"{name}.lua").read_text(encoding="utf-8"))
        for name in PARTS
    }
