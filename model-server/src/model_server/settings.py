"""Settings from `MODEL_SERVER_*`; the only reader of the environment, called by `__main__`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """What one model server needs to know."""

    api_key: str = field(repr=False)
    """The key that clients must send (`MODEL_SERVER_API_KEY`, required)."""
    host: str = "0.0.0.0"  # noqa: S104  a server in a pod of its own
    """`MODEL_SERVER_HOST`."""
    port: int = 8080
    """`MODEL_SERVER_PORT`."""
    delta_ms: int = 15
    """Pause between two deltas of a stream, milliseconds (`MODEL_SERVER_DELTA_MS`)."""
    delay_ms: int = 0
    """Time to the first byte, milliseconds (`MODEL_SERVER_DELAY_MS`)."""
    cache_minimum: int = 512
    """Shortest prefix that the simulated prompt cache keeps, tokens (`MODEL_SERVER_CACHE_MINIMUM`)."""
    window: int = 0
    """Size of the context window, tokens; 0: none (`MODEL_SERVER_WINDOW`). `window=N` in a mark goes before it."""
    record_mb: int = 128
    """Megabytes of request bodies that are kept; then the oldest go (`MODEL_SERVER_RECORD_MB`)."""


def load(env: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment.

    Raises:
        ValueError: a variable is missing or not valid; the message names it.
    """
    env = os.environ if env is None else env
    key = env.get("MODEL_SERVER_API_KEY", "").strip()
    if not key:
        raise ValueError("MODEL_SERVER_API_KEY must be set: the key that clients have to send")
    numbers = {}
    for name in ("port", "delta_ms", "delay_ms", "cache_minimum", "window", "record_mb"):
        variable = f"MODEL_SERVER_{name.upper()}"
        if raw := env.get(variable, ""):
            if not raw.isdecimal():
                raise ValueError(f"{variable}={raw!r} is not a number")
            numbers[name] = int(raw)
    return Settings(api_key=key, host=env.get("MODEL_SERVER_HOST", "") or Settings.host, **numbers)
