"""The grep tool: ripgrep where the image has it, else this module as a process of its own.

A process in both cases, because a regular expression can take for ever and a thread cannot be stopped.
`python3 -m sandboxd.grep PATTERN PATH` prints `path:line:text` like `rg -n`, exit code 1 without a match.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from sandboxd.inputs import ToolError
from sandboxd.output import Collector
from sandboxd.procs import Child, Reaper

_LINE_LIMIT = 10_000
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


async def grep(
    reaper: Reaper, workdir: Path, env: Mapping[str, str], pattern: str, path: str | None
) -> tuple[str, bool]:
    """Search files; returns the matches and whether some were left out. Kills its process when it is cancelled.

    Raises:
        ToolError: the path does not exist, or the pattern is not valid.
    """
    where = workdir / path if path else workdir
    if not where.exists():
        raise ToolError(f"grep: {path or where} does not exist")
    rg = shutil.which("rg", path=env.get("PATH"))
    if rg:
        argv = [
            rg,
            "--no-config",
            "--no-heading",
            "--with-filename",
            "--line-number",
            "--color=never",
        ]
        argv += [
            "--max-columns=10000",
            "--max-columns-preview",
            "--sort=path",
            "-e",
            pattern,
            "--",
            str(where),
        ]
    else:
        argv = [sys.executable, "-m", "sandboxd.grep", pattern, str(where)]
        env = {
            **env,
            "PYTHONPATH": str(_PACKAGE_ROOT),
            "PYTHONSAFEPATH": "1",
        }
    code, out, err = await _run(reaper, argv, workdir, env)
    text, truncated = out.render()
    if code == 0 or (code == 2 and out.total):
        return text, truncated  # 2 with matches: some file could not be read
    if code == 1:
        return "no matches", False
    raise ToolError(f"grep: {err.render()[0].strip() or f'exit code {code}'}")


async def _run(
    reaper: Reaper, argv: list[str], cwd: Path, env: Mapping[str, str]
) -> tuple[int, Collector, Collector]:
    out, err = Collector(), Collector(16 * 1024)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    child: Child | None = None
    try:
        try:
            child = reaper.spawn(argv, cwd=cwd, env=env, stdout=out_write, stderr=err_write)
        finally:
            os.close(out_write)
            os.close(err_write)
        await asyncio.gather(_pump(out_read, out), _pump(err_read, err))
        return await asyncio.shield(child.exit), out, err
    finally:
        if child is not None and not child.exit.done():
            await reaper.kill(child)
        os.close(out_read)
        os.close(err_read)


async def _pump(fd: int, into: Collector) -> None:
    """Read a pipe to its end."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    os.set_blocking(fd, False)

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            if data := os.read(fd, 1 << 16):
                into.add(data)
            elif not ended.done():
                ended.set_result(None)

    loop.add_reader(fd, read)
    try:
        await ended
    finally:
        loop.remove_reader(fd)


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for directory, names, files in os.walk(root):
        # As ripgrep does: hidden files and links are left out.
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "node_modules")
        for name in sorted(files):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def search(pattern: re.Pattern[str], root: Path) -> Iterator[str]:
    """Matching lines of text files below `root` as `path:line:text`."""
    for path in _files(root):
        with contextlib.suppress(OSError), open(path, "rb") as handle:
            if b"\0" in handle.read(8192):
                continue
            handle.seek(0)
            for number, raw in enumerate(handle, 1):
                line = raw[:_LINE_LIMIT].decode("utf-8", "replace").rstrip("\r\n")
                if pattern.search(line):
                    yield f"{path}:{number}:{line}"


def main(argv: list[str]) -> int:
    """Entry point of the fallback process."""
    try:
        pattern = re.compile(argv[0])
    except re.error as err:
        sys.stderr.write(f"the pattern is not a valid regular expression: {err}\n")
        return 2
    found = False
    for line in search(pattern, Path(argv[1])):
        found = True
        sys.stdout.buffer.write(line.encode("utf-8", "replace") + b"\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
