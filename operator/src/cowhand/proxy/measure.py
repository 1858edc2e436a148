"""Memory of an idle proxy process, for the benchmark and the test that watches what it imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Final, Literal

FORBIDDEN: Final = ("pydantic", "kopf", "kubernetes", "redis", "anthropic", "aiohttp")
"""Packages that the proxy must never load."""

_SCRIPT: Final = """
import sys
from cowhand.cli.main import main
import cowhand.proxy.run
from cowhand.proxy.client import client_tls
if sys.argv[1] == "sandbox":
    import cowhand.proxy.sandbox
    from cowhand.proxy.tls import self_signed
    keep = self_signed()
else:
    import cowhand.proxy.harness
    keep = client_tls()
with open("/proc/self/status") as status:
    rss = next(line.split()[1] for line in status if line.startswith("VmRSS"))
print(rss, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def measure_rss(mode: Literal["harness", "sandbox"] = "sandbox") -> tuple[float, set[str]]:
    """Start a process that has loaded all of a proxy, as `python -m cowhand proxy` does.

    Args:
        mode: `sandbox` has made its certificate, `harness` has loaded the system's roots.

    Returns:
        Resident memory in MiB, and the names of the top-level packages that are loaded.
    """
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _SCRIPT, mode],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    rss, *packages = done.stdout.split()
    return int(rss) / 1024, set(packages)
