"""Settings, and what commands do not get to see. sandboxd imports the standard library only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import sandboxd
from sandboxd.settings import command_environment, load


def test_environment_of_commands() -> None:
    given = {
        "SANDBOXD_PORT": "1",
        "COWHAND_X": "1",
        "KUBERNETES_PORT": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/sandboxd:/mine",
        "TERM": "xterm",
    }
    env = command_environment(given, Path("/opt/sandboxd"))
    assert env["PYTHONPATH"] == "/mine"
    assert env["TERM"] == "xterm"
    assert env["GIT_TERMINAL_PROMPT"] == "0"
    assert not {"SANDBOXD_PORT", "COWHAND_X", "KUBERNETES_PORT", "PYTHONSAFEPATH"} & set(env)


@pytest.mark.parametrize("port", ["x", "-1", "65536", "7070 "])
def test_bad_port_is_named(port: str) -> None:
    with pytest.raises(ValueError, match="SANDBOXD_PORT"):
        load({"SANDBOXD_PORT": port})


def test_relative_directory_is_named() -> None:
    with pytest.raises(ValueError, match="SANDBOXD_WORKDIR"):
        load({"SANDBOXD_WORKDIR": "here"})


def test_imports_only_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "sandboxd"}
    for file in Path(sandboxd.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {n.split(".")[0] for n in names} <= allowed, file
