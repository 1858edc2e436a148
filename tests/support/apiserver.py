"""The real API server of `make cluster`, for tests with the marker `apiserver`."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kubeconfig() -> str | None:
    """Path of the cluster's kubeconfig, None where there is no cluster (or only the rest of one)."""
    script = ROOT / "hack" / "cluster.sh"
    done = subprocess.run([str(script), "kubeconfig"], capture_output=True, text=True, timeout=20)
    path = done.stdout.strip()
    if done.returncode != 0 or not path or not Path(path).exists():
        return None
    return path if "server: http" in Path(path).read_text() else None
