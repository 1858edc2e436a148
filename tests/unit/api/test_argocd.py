"""The health check in docs/argocd.md, run as Argo CD would (Lua 5.1)."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
LUA = next((path for name in ("lua5.1", "lua5.4", "lua") if (path := shutil.which(name))), None)

needs_lua = pytest.mark.skipif(LUA is None, reason="no Lua interpreter (Debian: lua5.1)")


def scripts() -> dict[str, str]:
    text = (ROOT / "docs/argocd.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert block
    loaded = yaml.safe_load(block.group(1))
    return {
        key.removeprefix("resource.customizations.health."): value
        for key, value in loaded["data"].items()
    }


def as_lua(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{as_lua(k)}] = {as_lua(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(as_lua, value)) + "}"
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    return str(value)


def health(script: str, status: Any) -> tuple[str, str]:
    obj = {"metadata": {"generation": 2}, **({"status": status} if status is not None else {})}
    program = (
        f"obj = {as_lua(obj)}\n"
        f"local function check()\n{script}\nend\n"
        "local hs = check()\nio.write(hs.status, '|', hs.message)\n"
    )
    assert LUA
    done = subprocess.run([LUA, "-"], input=program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, _, message = done.stdout.partition("|")
    return found, message


def conditions(generation: int = 2, **found: str) -> dict[str, Any]:
    return {
        "observedGeneration": generation,
        "conditions": [
            {
                "type": kind,
                "status": value.split("/")[0],
                "reason": value.split("/")[1],
                "message": "m",
            }
            for kind, value in found.items()
        ],
    }


@needs_lua
@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (None, "Progressing"),
        ({"observedGeneration": -1}, "Progressing"),
        (conditions(1, Ready="True/Accepted"), "Progressing"),
        (conditions(Ready="True/Accepted"), "Healthy"),
        (conditions(Ready="True/AlreadyRan", Succeeded="False/Error"), "Healthy"),
        (conditions(Ready="True/Suspended"), "Suspended"),
        (conditions(Ready="False/Suspended"), "Suspended"),
        (conditions(Ready="False/Starting", Reconciling="True/Starting"), "Progressing"),
        (conditions(Ready="False/StoreUnavailable"), "Progressing"),
        (conditions(Ready="False/InvalidSpec", Stalled="True/InvalidSpec"), "Degraded"),
        (conditions(Stalled="True/PodLost", Reconciling="True/Starting"), "Degraded"),
        (conditions(), "Progressing"),
    ],
)
def test_health(status: Any, wanted: str) -> None:
    for script in scripts().values():
        assert health(script, status)[0] == wanted


@needs_lua
def test_the_message_names_the_reason() -> None:
    script = scripts()["cowhand.dev_AgentSession"]
    assert health(script, conditions(Stalled="True/SessionLost")) == ("Degraded", "SessionLost: m")


def test_there_is_a_script_for_each_kind_with_status() -> None:
    assert set(scripts()) == {"cowhand.dev_AgentSession", "cowhand.dev_Sandbox"}
