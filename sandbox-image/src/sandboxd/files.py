"""The file tools read, write, edit and glob. Plain blocking functions; `tools` runs them in threads.

Errors are `ToolError` with the path as it was given, written for Claude.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from sandboxd.inputs import ToolError
from sandboxd.output import CAP

READ_LIMIT = 256 * 1024
"""Bytes that `read` returns of a file without a range."""
EDIT_LIMIT = 64 * 1024 * 1024
GLOB_LIMIT = 200
WALK_LIMIT = 500_000
"""Directory entries that one glob looks at."""

_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "an executable",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
}


def read(workdir: Path, file_path: str, view_range: list[int] | None) -> str:
    """The text of a file, or of its lines start to end (1-based, inclusive; an end below 1 is the last line)."""
    path = workdir / file_path
    size = _regular(path, "read", file_path).st_size
    if view_range is not None:
        return _read_lines(path, file_path, *view_range)
    if size > READ_LIMIT:
        raise ToolError(
            f"read: {file_path} has {size} bytes, more than the {READ_LIMIT} that are returned at once;"
            " read it in parts with view_range, for example [1, 500]"
        )
    with _errors("read", file_path), open(path, "rb") as handle:
        data = handle.read(READ_LIMIT + 1)
    _refuse_binary(data, file_path)
    return data.decode("utf-8", "replace")


def _read_lines(path: Path, file_path: str, start: int, end: int) -> str:
    if start < 1:
        raise ToolError(f"read: view_range starts at line {start}; lines are counted from 1")
    if 1 <= end < start:
        raise ToolError(f"read: view_range [{start}, {end}] ends before it starts")
    taken, number, room = [], 0, CAP
    with _errors("read", file_path), open(path, "rb") as handle:
        _refuse_binary(handle.read(16), file_path)
        handle.seek(0)
        at_start = True
        # Lines are read in pieces, so that a file without line ends costs no more memory than the limit.
        while piece := handle.readline(READ_LIMIT):
            number += at_start
            at_start = piece.endswith(b"\n")
            if end >= 1 and number > end:
                break
            if number >= start:
                taken.append(piece[:room])
                room -= len(piece)
                if room <= 0:
                    taken.append(b"\n[... output truncated: ask for fewer lines ...]\n")
                    break
    if not taken:
        raise ToolError(f"read: {file_path} has {number} lines; view_range starts at line {start}")
    return b"".join(taken).decode("utf-8", "replace")


def write(workdir: Path, file_path: str, content: str) -> str:
    """Write a file, making its directories."""
    path, data = workdir / file_path, content.encode("utf-8")
    with _errors("write", file_path):
        if path.is_dir():
            raise ToolError(f"write: {file_path} is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    return f"wrote {len(data)} bytes to {file_path}"


def edit(workdir: Path, file_path: str, old: str, new: str, *, replace_all: bool) -> str:
    """Replace text that occurs exactly once, or everywhere."""
    path = workdir / file_path
    if not old:
        raise ToolError("edit: old_string is empty; use write to make a file")
    if old == new:
        raise ToolError("edit: old_string and new_string are the same; nothing to do")
    size = _regular(path, "edit", file_path).st_size
    if size > EDIT_LIMIT:
        raise ToolError(f"edit: {file_path} has {size} bytes, too large to edit; use sed in bash")
    with _errors("edit", file_path):
        data = path.read_bytes()
        count = data.count(old.encode())
        if count == 0:
            raise ToolError(
                f"edit: old_string does not occur in {file_path}; read the file and copy the text exactly"
            )
        if count > 1 and not replace_all:
            raise ToolError(
                f"edit: old_string occurs {count} times in {file_path}, it must occur exactly once;"
                " give more of the text around it, or set replace_all"
            )
        _replace(path, data.replace(old.encode(), new.encode()))
    return f"edited {file_path}: {count} {'replacement' if count == 1 else 'replacements'}"


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new text; what is special is written in place."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and (not stat.S_ISREG(mode) or target.stat().st_nlink > 1):
        if not stat.S_ISREG(mode):
            raise ToolError(f"{path} is not a regular file")
        target.write_bytes(data)
        return
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except PermissionError:
        target.write_bytes(data)  # the directory is not ours, the file may be
        return
    try:
        with open(fd, "wb") as handle:
            handle.write(data)
        os.chmod(name, _default_mode() if mode is None else stat.S_IMODE(mode))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _default_mode() -> int:
    # /proc and not os.umask: setting the umask to read it would race with other threads.
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 0o666 & ~int(next(x for x in lines if x.startswith("Umask:")).split()[1], 8)
    return 0o644


def glob(workdir: Path, pattern: str, path: str | None, stop: threading.Event) -> str:
    """Paths of files that match, newest first, at most 200. Symlinked directories and .git are not entered."""
    if pattern.startswith("/"):
        raise ToolError("glob: the pattern must be relative; give the directory as path")
    if ".." in pattern.split("/"):
        raise ToolError("glob: '..' is not allowed in the pattern; give the directory as path")
    root = workdir / path if path else workdir
    with _errors("glob", path or str(root)):
        if not root.is_dir():
            raise ToolError(
                f"glob: {path or root} is {'not a directory' if root.exists() else 'missing'}"
            )
    try:
        matcher = re.compile(translate(pattern))
    except re.error as err:
        raise ToolError(f"glob: the pattern is not valid: {err}") from None
    found: list[tuple[float, str]] = []
    for seen, (relative, entry) in enumerate(_walk(root)):
        if stop.is_set() or seen >= WALK_LIMIT:
            break
        if matcher.fullmatch(relative):
            with contextlib.suppress(OSError):
                found.append((entry.stat(follow_symlinks=False).st_mtime, str(root / relative)))
    if not found:
        return "no matches"
    found.sort(key=lambda item: (-item[0], item[1]))
    lines = [name for _, name in found[:GLOB_LIMIT]]
    if len(found) > GLOB_LIMIT:
        lines.append(f"[the {GLOB_LIMIT} newest of {len(found)} matches]")
    return "\n".join(lines)


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    todo = [""]
    while todo:
        below = todo.pop()
        try:
            entries = list(os.scandir(root / below))
        except OSError:
            continue
        for entry in entries:
            relative = f"{below}/{entry.name}" if below else entry.name
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != ".git":
                        todo.append(relative)
                    continue
            yield relative, entry


def translate(pattern: str) -> str:
    """A regular expression for a glob with `*`, `?`, `[...]`, `{a,b}` and `**` for any directories."""
    out, i, depth = [], 0, 0
    while i < len(pattern):
        char = pattern[i]
        end = pattern.find("]", i + 2) if char == "[" else -1
        if end > 0:
            body = pattern[i + 1 : end].replace("\\", "\\\\")
            out.append(f"[^{body[1:]}]" if body.startswith("!") else f"[{body}]")
            i = end
        elif pattern.startswith("**", i):
            slash = pattern.startswith("**/", i)
            out.append("(?:.*/)?" if slash else ".*")
            i += 2 if slash else 1
        elif char == "{" and "}" in pattern[i:]:
            depth += 1
            out.append("(?:")
        elif char in ",}" and depth:
            depth -= char == "}"
            out.append("|" if char == "," else ")")
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char))
        i += 1
    return "".join(out)


def _regular(path: Path, tool: str, given: str) -> os.stat_result:
    """Stat of a regular file; a FIFO or a device could block a thread for ever."""
    with _errors(tool, given):
        info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise ToolError(f"{tool}: {given} is a directory; list it with bash (ls) or glob")
    if not stat.S_ISREG(info.st_mode):
        raise ToolError(f"{tool}: {given} is not a regular file")
    return info


def _refuse_binary(data: bytes, file_path: str) -> None:
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise ToolError(
                f"read: {file_path} is {what}, and read returns text; look at it with bash"
            )


@contextlib.contextmanager
def _errors(tool: str, given: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ToolError(f"{tool}: {given} does not exist") from None
    except OSError as err:
        raise ToolError(f"{tool}: {given}: {err.strerror or err}") from None
    except ValueError as err:
        raise ToolError(f"{tool}: {given}: {err}") from None
