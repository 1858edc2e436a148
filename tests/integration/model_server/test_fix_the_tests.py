"""The example with a real sandboxd: three bugs, one repair each, and nothing without execute()."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.model_rig import TOOLS, ModelRig
from support.sandboxd_rig import Sandboxd

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "fix-the-tests"
Execute = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandboxd]:
    daemon = Sandboxd(tmp_path).start()
    yield daemon
    daemon.stop()


def lay_out(variant: str, directory: Path) -> None:
    """The repository of a variant as the session gets it: keys of the ConfigMap, paths of session.yaml."""
    session = yaml.safe_load((EXAMPLE / "session.yaml").read_text())
    data = configmap(variant)["data"]
    items = session["spec"]["resources"][0]["configMap"]["items"]
    assert {item["key"] for item in items} == set(data)
    for item in items:
        path = directory / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data[item["key"]])


def configmap(variant: str) -> dict[str, Any]:
    """What configmap.sh makes; a stand-in reads the files where there is no kubectl."""
    env = dict(os.environ)
    if shutil.which(env.get("KUBECTL", "kubectl")) is None:
        env["KUBECTL"] = str(Path(__file__).parent / "create_configmap.py")
    out = subprocess.run(
        [EXAMPLE / "configmap.sh", variant], env=env, capture_output=True, check=True
    )
    found: dict[str, Any] = yaml.safe_load(out.stdout)
    return found


async def run(execute: Execute) -> tuple[str, list[str]]:
    """Play the harness: the final text and the names of the tools that were called."""
    message = yaml.safe_load((EXAMPLE / "session.yaml").read_text())["spec"]["message"]
    messages: list[Any] = [{"role": "user", "content": message}]
    used: list[str] = []
    async with ModelRig() as model:
        while True:
            answer = await model.answer(messages, tools=TOOLS)
            messages.append({"role": "assistant", "content": [b.to_dict() for b in answer.content]})
            if answer.stop_reason != "tool_use":
                return answer.content[-1].text, used
            results = []
            for block in answer.content:
                if block.type == "tool_use":
                    used.append(block.name)
                    result = await asyncio.to_thread(execute, block.name, block.input)
                    results.append({"type": "tool_result", "tool_use_id": block.id, **result})
            messages.append({"role": "user", "content": results})


def in_box(box: Sandboxd) -> Execute:
    """execute() with the workspace of the box in place of /workspace."""
    here = str(box.workdir)

    def execute(name: str, given: dict[str, Any]) -> dict[str, Any]:
        moved = {
            k: v.replace("/workspace", here) if isinstance(v, str) else v for k, v in given.items()
        }
        result = box.execute(name, moved)
        return {
            "content": result["content"].replace(here, "/workspace"),
            "is_error": result["is_error"],
        }

    return execute


@pytest.mark.parametrize("variant", ["prices", "stock", "pages"])
async def test_each_bug_is_repaired_with_one_edit(box: Sandboxd, variant: str) -> None:
    repo = box.workdir / "repo"
    lay_out(variant, repo)
    assert "FAILED (failures=1)" in box.bash(f"cd {repo} && python3 -B -m unittest")["content"]
    text, used = await run(in_box(box))
    assert used == ["bash", "read", "glob", "read", "edit", "bash"]
    assert text.startswith(f"All 10 tests pass now. The bug was in `shop/{variant}.py`")
    assert box.bash(f"cd {repo} && python3 -B -m unittest")["exit_code"] == 0
    assert not list(repo.rglob("*.pyc")), (
        "byte code of the bug can hide an edit made in the same second"
    )
    good = EXAMPLE / "repo"
    for file in good.rglob("*.py"):
        assert (repo / file.relative_to(good)).read_text() == file.read_text()


async def test_nothing_to_fix(box: Sandboxd) -> None:
    lay_out("none", box.workdir / "repo")
    text, used = await run(in_box(box))
    assert (text, used) == ("All 10 tests pass already; there is nothing to fix.", ["bash"])


@pytest.mark.parametrize("constant", ["", "ok", "All tests pass", "Error: sandbox is gone"])
async def test_control_without_execute_it_claims_nothing(constant: str) -> None:
    text, _ = await run(lambda name, given: {"content": constant, "is_error": False})
    assert "tests pass" not in text.replace(constant, "") if constant else "tests pass" not in text
    assert "I stop here" in text
