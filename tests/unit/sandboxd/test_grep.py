"""The grep tool gives the same answers with ripgrep and without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandboxd.grep import grep
from sandboxd.inputs import ToolError
from sandboxd.procs import Reaper

RG = shutil.which("rg")
ENGINES = [
    pytest.param(True, marks=pytest.mark.skipif(RG is None, reason="ripgrep is not installed")),
    False,
]


@pytest.fixture
async def reaper() -> AsyncIterator[Reaper]:
    found = Reaper()
    found.install()
    yield found
    found.close()


@pytest.fixture(params=ENGINES, ids=lambda real: "ripgrep" if real else "fallback")
def env(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH with ripgrep alone, or with nothing."""
    folder = tmp_path_factory.mktemp("bin")
    if request.param:
        assert RG is not None
        os.symlink(RG, folder / "rg")
    return {"PATH": str(folder)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.py", "d/b.txt", ".hidden"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("hay\nthe needle\n")
    (tmp_path / "binary").write_bytes(b"\0\nneedle\n")
    (tmp_path / "link").symlink_to(tmp_path / "a.py")
    return tmp_path


async def test_matches_by_path_and_line(reaper: Reaper, env: dict[str, str], tree: Path) -> None:
    text, truncated = await grep(reaper, tree, env, "n.edle", None)
    assert text.splitlines() == [f"{tree}/a.py:2:the needle", f"{tree}/d/b.txt:2:the needle"]
    assert truncated is False


async def test_in_one_file(reaper: Reaper, env: dict[str, str], tree: Path) -> None:
    text, _ = await grep(reaper, tree, env, "^hay$", "d/b.txt")
    assert text.splitlines() == [f"{tree}/d/b.txt:1:hay"]


async def test_no_match_is_an_answer(reaper: Reaper, env: dict[str, str], tree: Path) -> None:
    assert await grep(reaper, tree, env, "nowhere", None) == ("no matches", False)


async def test_a_pattern_that_begins_with_a_dash(
    reaper: Reaper, env: dict[str, str], tree: Path
) -> None:
    (tree / "a.py").write_text("--files\n")
    text, _ = await grep(reaper, tree, env, "--files", None)
    assert text.splitlines() == [f"{tree}/a.py:1:--files"]


async def test_an_invalid_pattern_is_an_error(
    reaper: Reaper, env: dict[str, str], tree: Path
) -> None:
    with pytest.raises(ToolError, match="grep: "):
        await grep(reaper, tree, env, "(", None)
