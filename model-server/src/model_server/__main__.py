"""`python3 -m model_server`: serve until SIGTERM."""

from __future__ import annotations

import logging
import sys

from aiohttp import web

from model_server import settings as settings_module
from model_server.app import ModelServer


def main() -> int:
    """Start with the settings of the environment; 2 for settings that are not valid."""
    try:
        settings = settings_module.load()
    except ValueError as err:
        sys.stderr.write(f"model_server: {err}\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    web.run_app(
        ModelServer(settings).app,
        host=settings.host,
        port=settings.port,
        access_log=None,
        handler_cancellation=True,  # a harness that died must not stay in the list of a gate
        shutdown_timeout=1,
        print=None,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
