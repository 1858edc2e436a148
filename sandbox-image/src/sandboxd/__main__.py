"""`python3 -m sandboxd`: serve until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys

from sandboxd import settings as settings_module
from sandboxd.calls import Calls
from sandboxd.journal import Journal
from sandboxd.procs import Reaper
from sandboxd.server import Server
from sandboxd.tools import Tools


async def serve(settings: settings_module.Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    # As PID 1 a signal without a handler is ignored by the kernel.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reaper = Reaper()
    reaper.install()
    for old in settings.state.glob("out-*"):
        old.unlink(missing_ok=True)
    journal = Journal(settings.state)
    tools = Tools(settings, reaper)
    calls = Calls(tools, journal)
    server = Server(calls)
    try:
        tools.shell.start()
        port = await server.start(settings.port)
        sys.stderr.write(
            f"sandboxd: serving on 127.0.0.1:{port}, working directory {settings.workdir}\n"
        )
        sys.stderr.flush()
        await stop.wait()
    finally:
        await server.close()
        await calls.close()
        tools.shell.close()
        reaper.close()
        journal.close()


def main() -> int:
    """Start with the settings of the environment; 2 for settings that are not valid."""
    try:
        settings = settings_module.load()
        settings.state.mkdir(parents=True, exist_ok=True)
        if not settings.workdir.is_dir():
            raise ValueError(f"SANDBOXD_WORKDIR={str(settings.workdir)!r} is not a directory")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"sandboxd: {err}\n")
        return 2
    asyncio.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
