"""A renewed certificate is served to new connections; a broken one never takes the old one away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowhand.errors import UserError
from cowhand.wire.tls import ServerCertificate
from support import tls_rig


@dataclass
class Mounted:
    """A Secret as the kubelet mounts it: links into a folder that is swapped as one."""

    folder: Path

    def swap(self, name: str) -> str:
        """Show another version, made now; answers the SHA-256 of its certificate."""
        version = self.folder / name
        version.mkdir()
        made = tls_rig.make(version)
        self.show(made.cert, made.key)
        return made.sha256

    def show(self, cert: Path, key: Path) -> None:
        for name, target in (("tls.crt", cert), ("tls.key", key)):
            link = self.folder / f"new-{name}"
            link.symlink_to(target)
            os.replace(link, self.folder / name)

    @property
    def files(self) -> tuple[str, str]:
        return str(self.folder / "tls.crt"), str(self.folder / "tls.key")


@contextlib.asynccontextmanager
async def served(certificate: ServerCertificate) -> AsyncIterator[int]:
    """A TLS server; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(await reader.readline())
            await writer.drain()
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=certificate.context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def shown(port: int) -> str:
    """SHA-256 of the certificate that a new connection sees, once a byte went through."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"x\n")
    assert await reader.readline() == b"x\n"
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(der).hexdigest()


async def test_new_connections_get_the_renewed_certificate(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path)
    first = mounted.swap("one")
    certificate = ServerCertificate(*mounted.files)
    async with served(certificate) as port:
        assert not certificate.refresh(), "nothing changed"
        second = mounted.swap("two")
        assert await shown(port) == first, "without a look at the files the old one stays"
        assert certificate.refresh()
        assert await shown(port) == second
        assert not certificate.refresh()


async def test_a_pair_that_does_not_fit_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path)
    first = mounted.swap("one")
    certificate = ServerCertificate(*mounted.files)
    async with served(certificate) as port:
        mounted.swap("two")
        mounted.show(tmp_path / "two" / "tls.crt", tmp_path / "one" / "tls.key")
        assert not certificate.refresh()
        assert await shown(port) == first
        os.remove(tmp_path / "tls.key")
        assert not certificate.refresh()
        assert await shown(port) == first
        third = mounted.swap("three")
        assert certificate.refresh()
        assert await shown(port) == third


async def test_it_watches_by_itself(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path)
    mounted.swap("one")
    certificate = ServerCertificate(*mounted.files)
    watch = asyncio.create_task(certificate.watch(0.01))
    async with served(certificate) as port:
        second = mounted.swap("two")
        async with asyncio.timeout(30):
            while await shown(port) != second:
                pass
    watch.cancel()


def test_a_certificate_that_cannot_be_read_at_the_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none"):
        ServerCertificate(str(tmp_path / "none"), str(tmp_path / "none"))
