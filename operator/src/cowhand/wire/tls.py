"""The certificate of our own TLS servers (broker, gateway), loaded again when its files are renewed.

`cowhand bootstrap` renews a certificate by writing the Secret; the kubelet then swaps the mounted files. A process that
read them only at its start would serve the old one until it expires.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import Final

from cowhand.errors import UserError

log = logging.getLogger(__name__)

RELOAD_S: Final = 60.0
"""How often the files are looked at."""


class ServerCertificate:
    """A server's SSL context and the files that it comes from.

    Attributes:
        context: TLS 1.2 or newer; new connections get the certificate that was loaded last.

    Args:
        cert: PEM file of the certificate chain.
        key: PEM file of its private key.

    Raises:
        UserError: a file cannot be read, or the two do not belong together.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._cert = cert
        self._key = key
        try:
            self._seen = self._stamp()
            self.context = self._load()
        except (OSError, ssl.SSLError) as err:
            raise UserError(f"The certificate {cert} or key {key} cannot be read: {err}") from err

    def refresh(self) -> bool:
        """Load the files again if they changed; answers whether there is a new certificate.

        What cannot be loaded is logged and tried again with the next call; the old certificate goes on.
        """
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            # First into a context of its own: one that fails halfway has no usable key any more.
            self._load()
            self.context.load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as err:
            log.error("renewed certificate not loaded", extra={"file": self._cert, "why": str(err)})
            return False
        self._seen = stamp
        log.info("renewed certificate loaded", extra={"file": self._cert})
        return True

    async def watch(self, every_s: float = RELOAD_S) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.refresh()

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key)
        return context

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        """What tells versions of the files apart; mounted files are links that are swapped together."""
        found = (os.stat(name) for name in (self._cert, self._key))
        return tuple((one.st_mtime_ns, one.st_ino, one.st_size) for one in found)
