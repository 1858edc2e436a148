"""read, write, edit, glob, and the search that grep falls back to."""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path

import pytest

from sandboxd import files
from sandboxd.grep import search
from sandboxd.inputs import ToolError

GO = threading.Event()


def test_write_makes_directories_and_read_returns_it(tmp_path: Path) -> None:
    assert files.write(tmp_path, "a/b/c.txt", "é\n\0") == "wrote 4 bytes to a/b/c.txt"
    assert files.read(tmp_path, "a/b/c.txt", None) == "é\n\0"
    assert files.read(tmp_path, str(tmp_path / "a/b/c.txt"), None) == "é\n\0"
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["c.txt"]


def test_write_keeps_mode_and_links(tmp_path: Path) -> None:
    real = tmp_path / "real.sh"
    real.write_text("old")
    real.chmod(0o755)
    (tmp_path / "link").symlink_to(real)
    os.link(real, tmp_path / "hard")
    files.write(tmp_path, "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "hard").read_text() == "new"
    (tmp_path / "hard").unlink()
    files.write(tmp_path, "real.sh", "newer")
    assert stat.S_IMODE(real.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("given", "expected"),
    [([1, 2], "1\n2\n"), ([3, -1], "3\n4"), ([3, 0], "3\n4"), ([2, 2], "2\n"), ([4, 99], "4")],
)
def test_read_of_lines(tmp_path: Path, given: list[int], expected: str) -> None:
    (tmp_path / "f").write_text("1\n2\n3\n4")
    assert files.read(tmp_path, "f", given) == expected


def test_read_of_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"line\n" * 100_000)
    with pytest.raises(ToolError, match=r"500000 bytes.*view_range"):
        files.read(tmp_path, "f", None)
    assert files.read(tmp_path, "f", [99_999, -1]) == "line\nline\n"
    (tmp_path / "one-line").write_bytes(b"x" * 3_000_000)
    text = files.read(tmp_path, "one-line", [1, 1])
    assert len(text) < 1_100_000
    assert "truncated" in text


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("missing", None, "does not exist"),
        ("directory", None, "is a directory"),
        ("fifo", None, "not a regular file"),
        ("picture", None, "a PNG image"),
        ("f", [0, 1], "counted from 1"),
        ("f", [3, 2], "ends before it starts"),
        ("f", [9, 10], "has 1 lines"),
        ("f/g", None, "Not a directory"),
    ],
)
def test_read_errors(tmp_path: Path, path: str, given: list[int] | None, message: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "f").write_text("one\n")
    with pytest.raises(ToolError, match=message) as caught:
        files.read(tmp_path, path, given)
    assert path in str(caught.value) or given


def test_edit_needs_exactly_one_occurrence(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\r\nb\r\na\r\n\xff")
    for old, message in (("x", "does not occur"), ("a", "occurs 2 times"), ("", "empty")):
        with pytest.raises(ToolError, match=message):
            files.edit(tmp_path, "f", old, "new", replace_all=False)
    with pytest.raises(ToolError, match="the same"):
        files.edit(tmp_path, "f", "b", "b", replace_all=False)
    assert (tmp_path / "f").read_bytes() == b"a\r\nb\r\na\r\n\xff"
    assert files.edit(tmp_path, "f", "b\r\n", "c\n", replace_all=False) == "edited f: 1 replacement"
    assert files.edit(tmp_path, "f", "a", "z", replace_all=True) == "edited f: 2 replacements"
    assert (tmp_path / "f").read_bytes() == b"z\r\nc\nz\r\n\xff"


def tree(root: Path) -> None:
    for i, name in enumerate(
        ["a.py", "b.txt", "d/c.py", "d/e/f.py", "d/e/g.pyc", ".git/x.py", "{odd}.py"]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("needle\n")
        os.utime(path, (i, i))
    (root / "loop").symlink_to(root)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.py", ["{odd}.py", "a.py"]),
        ("**/*.py", ["{odd}.py", "d/e/f.py", "d/c.py", "a.py"]),
        ("d/**", ["d/e/g.pyc", "d/e/f.py", "d/c.py"]),
        ("*.{py,txt}", ["{odd}.py", "b.txt", "a.py"]),
        ("[ab].*", ["b.txt", "a.py"]),
        ("[!a].txt", ["b.txt"]),
        ("?.py", ["a.py"]),
        ("{odd*", ["{odd}.py"]),
        ("nothing", []),
    ],
)
def test_glob(tmp_path: Path, pattern: str, names: list[str]) -> None:
    tree(tmp_path)
    found = files.glob(tmp_path, pattern, None, GO)
    assert found == ("\n".join(str(tmp_path / n) for n in names) or "no matches")


def test_glob_is_limited_and_refuses_what_leaves_its_root(tmp_path: Path) -> None:
    for i in range(210):
        (tmp_path / f"{i}").touch()
    lines = files.glob(tmp_path, "*", None, GO).splitlines()
    assert len(lines) == 201
    assert lines[-1] == "[the 200 newest of 210 matches]"
    for pattern in ("/etc/*", "../*"):
        with pytest.raises(ToolError, match="path"):
            files.glob(tmp_path, pattern, None, GO)
    with pytest.raises(ToolError, match="missing"):
        files.glob(tmp_path, "*", "nowhere", GO)


def test_search_without_ripgrep(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "binary").write_bytes(b"needle\0")
    found = list(search(re.compile("n.edle"), tmp_path))
    names = ["a.py", "b.txt", "{odd}.py", "d/c.py", "d/e/f.py", "d/e/g.pyc"]
    assert found == [f"{tmp_path}/{n}:1:needle" for n in names]
