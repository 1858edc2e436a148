"""The archive's server on loopback with TLS, an in-memory Kubernetes for TokenReview, and clients with tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from cowhand.archive.app import ArchiveServer
from cowhand.archive.layout import Names
from cowhand.archive.objects import FolderObjects
from cowhand.session.remote import HttpArchive
from support.trust import NAMESPACE, OTHER_NAMESPACE, Authority, World

CONTROL = "cowhand-system"
ACCOUNTS = tuple(
    f"system:serviceaccount:{CONTROL}:cowhand-{name}" for name in ("gateway", "operator")
)


@dataclass
class ArchiveRig:
    """See the module."""

    world: World
    authority: Authority
    objects: FolderObjects
    root: Path
    folder: Path
    port: int
    stack: contextlib.AsyncExitStack

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def token_file(self, token: str) -> str:
        path = self.folder / f"{token}.token"
        path.write_text(token + "\n")
        return str(path)

    def client(self, token: str) -> HttpArchive:
        made = HttpArchive(
            self.url, ca_file=str(self.authority.ca_file), token_file=self.token_file(token)
        )
        self.stack.push_async_callback(made.close)
        return made


@contextlib.asynccontextmanager
async def archive_rig(folder: Path) -> AsyncIterator[ArchiveRig]:
    """An archive in `folder`, with tokens `harness`, `rival`, `gateway`, `operator` and some that are wrong."""
    root = folder / "objects"
    root.mkdir()
    world, authority = World(), Authority(folder / "archive-ca")
    audience = "cowhand-archive"
    world.token("harness", "cowhand-harness", uid="pod", audience=audience)
    world.token(
        "rival", "cowhand-harness", namespace=OTHER_NAMESPACE, uid="pod-2", audience=audience
    )
    world.token("unbound", "cowhand-harness", audience=audience)
    world.token("sandbox", "cowhand-sandbox", uid="pod-3", audience=audience)
    world.token("stranger", "cowhand-harness", namespace="elsewhere", uid="p", audience=audience)
    world.token("for-the-broker", "cowhand-harness", uid="pod")
    for name in ("gateway", "operator"):
        world.token(name, f"cowhand-{name}", namespace=CONTROL, uid=name, audience=audience)
    world.token("false-gateway", "cowhand-gateway", uid="p", audience=audience)
    objects = FolderObjects(root)
    names = Names((NAMESPACE, OTHER_NAMESPACE), ACCOUNTS, "cowhand-harness")
    server = ArchiveServer(kube=world.kube, objects=objects, names=names)
    async with contextlib.AsyncExitStack() as stack:
        runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(
            runner, "127.0.0.1", 0, ssl_context=authority.server("localhost", "127.0.0.1")
        )
        await site.start()
        inner = site._server
        assert isinstance(inner, asyncio.Server)
        port = inner.sockets[0].getsockname()[1]
        yield ArchiveRig(world, authority, objects, root, folder, port, stack)
