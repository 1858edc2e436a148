"""`helm uninstall` leaves resources and log, and nothing that runs; installing again goes on where it stopped.

Last in the folder by its name: the tests after it (and a person who looks at the cluster) find it installed.
"""

from __future__ import annotations

import subprocess

import pytest

from e2e.checks import check_log, final_text
from lab import ROOT, SYSTEM, Rig, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.disruptive]


def _install(verb: str) -> None:
    done = subprocess.run(
        [str(ROOT / "hack/install.sh"), verb], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_uninstalled_and_installed_again(rig: Rig) -> None:
    session = rig.session("[[script:counter]] count")
    before = session.wait_turn(1)
    assert session.pods()
    try:
        _install("down")
        for namespace in (SYSTEM, "default", "team-b"):
            eventually(
                f"no pod of ours runs in {namespace}",
                lambda ns=namespace: (
                    not rig.cluster.items("pods", ns, "app.kubernetes.io/name=cowhand")
                ),
            )
            assert not rig.cluster.items("deployments,statefulsets", namespace)
        assert session.resource()["spec"]["message"] == "[[script:counter]] count"
        assert rig.cluster.get("pvc", "data-cowhand-store-0", SYSTEM) is not None
    finally:
        _install("up")
    rig.cluster.kubectl(
        *("-n", "default", "patch", "agentsession", session.name, "--type=merge"),
        *("-p", '{"spec":{"operatingMode":"Running"}}'),
    )
    session.send("and once more")
    assert "lost" in final_text(session.wait_turn(2)), "Claude is told that the old sandbox is gone"
    session.send("and again")
    log = session.wait_turn(3)
    check_log(log)
    assert [e["id"] for e in log[: len(before)]] == [e["id"] for e in before]
    assert final_text(log) == "1", "a new sandbox starts empty"
