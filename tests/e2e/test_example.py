"""The demo's session: examples/fix-the-tests as a user applies it, with each of its bugs."""

from __future__ import annotations

import subprocess
import uuid

import pytest
import yaml

from e2e.checks import check_log, check_requests
from lab import ROOT, Rig, Session

pytestmark = pytest.mark.e2e

EXAMPLE = ROOT / "examples" / "fix-the-tests"


@pytest.mark.parametrize("variant", ["pages", "prices", "stock"])
def test_the_failing_tests_are_made_to_pass(rig: Rig, variant: str) -> None:
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    configmap = subprocess.run(
        [str(EXAMPLE / "configmap.sh"), variant],
        env={**rig.cluster.env(), "KUBECTL": rig.cluster.binary},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    repository = yaml.safe_load(configmap)
    repository["metadata"] = {"name": name, "namespace": "default"}
    manifest = yaml.safe_load((EXAMPLE / "session.yaml").read_text())
    manifest["metadata"] = {"name": name, "namespace": "default"}
    manifest["spec"]["resources"][0]["configMap"]["name"] = name
    together = [
        yaml.safe_load((EXAMPLE / f"{one}.yaml").read_text()) for one in ("agent", "environment")
    ]
    for one in together:
        one["metadata"]["namespace"] = "default"
    rig.cluster.apply(repository, *together, manifest)
    session = Session(rig, "default", name)
    try:
        log = session.wait_turn()
        check_log(log)
        check_requests(rig.model.requests(session.id))
        results = [e["data"] for e in log if e["type"] == "tool.result"]
        assert "FAILED (failures=1)" in results[0]["content"]
        assert results[-1]["content"].rstrip().endswith("OK")
        ran = rig.cowhand(
            *("-n", "default", "exec", name, "--"),
            "cd /workspace/repo && python3 -B -m unittest 2>&1 | tail -1",
        )
        assert ran.strip() == "OK", "a person who looks into the sandbox sees it too"
    finally:
        rig.delete(session)
        rig.cluster.kubectl("-n", "default", "delete", "configmap", name)
