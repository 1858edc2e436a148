"""Every manifest in examples/ is one that the custom resources take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cowhand.api.v1alpha1.agent import Agent
from cowhand.api.v1alpha1.environment import Environment
from cowhand.api.v1alpha1.session import AgentSession

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
KINDS: dict[str, Any] = {"Agent": Agent, "Environment": Environment, "AgentSession": AgentSession}
FILES = sorted(EXAMPLES.rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert {f.parent.name for f in FILES} >= {"fix-the-tests", "one-file", "approvals"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_example_is_valid(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        KINDS[document["kind"]].model_validate(document)
