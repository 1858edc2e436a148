"""Settings of sandboxd from `SANDBOXD_*`, and the environment that commands get.

The only reader of the process environment; called once by `__main__`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

OWN_PREFIXES = ("SANDBOXD_", "COWHAND_", "KUBERNETES_", "ANTHROPIC_")
"""Variables with these prefixes are about us or the cluster, and no command sees them."""

DEFAULTS = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/home/sandbox",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
}


@dataclass(frozen=True)
class Settings:
    """What one sandboxd process needs to know."""

    port: int = 7070
    """TCP port on 127.0.0.1 (`SANDBOXD_PORT`); 0 takes a free one."""
    workdir: Path = Path("/workspace")
    """Where relative paths and a new shell begin (`SANDBOXD_WORKDIR`)."""
    state: Path = Path("/run/sandboxd")
    """Directory of the journal and the pipes (`SANDBOXD_STATE`)."""
    command_env: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULTS))
    """Environment of the shell."""


def command_environment(env: Mapping[str, str], package_root: Path) -> dict[str, str]:
    """The environment of commands: ours without what only sandboxd needs.

    Args:
        env: the environment of this process.
        package_root: directory that PYTHONPATH names for sandboxd's own sake.
    """
    kept = {k: v for k, v in env.items() if not k.startswith(OWN_PREFIXES)}
    kept.pop("PYTHONSAFEPATH", None)  # it would break `python3 -m pytest` in a user's project
    paths = [
        p for p in kept.pop("PYTHONPATH", "").split(os.pathsep) if p and Path(p) != package_root
    ]
    if paths:
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    return {**DEFAULTS, **kept}


def load(env: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment.

    Raises:
        ValueError: a variable that is not valid, named in the message.
    """
    env = os.environ if env is None else env
    raw_port = env.get("SANDBOXD_PORT", "") or "7070"
    if not raw_port.isdecimal() or int(raw_port) > 65535:
        raise ValueError(f"SANDBOXD_PORT={raw_port!r} is not a port number")
    paths = {}
    for name, default in (("SANDBOXD_WORKDIR", "/workspace"), ("SANDBOXD_STATE", "/run/sandboxd")):
        paths[name] = Path(env.get(name, "") or default)
        if not paths[name].is_absolute():
            raise ValueError(f"{name}={str(paths[name])!r} is not an absolute path")
    return Settings(
        port=int(raw_port),
        workdir=paths["SANDBOXD_WORKDIR"],
        state=paths["SANDBOXD_STATE"],
        command_env=command_environment(env, Path(__file__).resolve().parent.parent),
    )
