"""The real API server of `make cluster`, for tests with the marker `apiserver`."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kubeconfig() -> str | None:
    """Path of the cluster's kubeconfig, None where there is no cluster."""
    script = ROOT / "hack" / "cluster.sh"
    done = subprocess.run([str(script), "kubeconfig"], capture_output=True, text=True, timeout=20)
    path = done.stdout.strip()
    return path if done.returncode == 0 and path and Path(path).exists() else None
