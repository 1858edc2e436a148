"""An archive in memory: `session.blobs.Archive`, with switches for what can go wrong."""

from __future__ import annotations

from cowhand.errors import ArchiveUnavailable, BlobMissing
from cowhand.session.archive import chain, encode
from cowhand.session.blobs import Span, sha256
from cowhand.session.events import Event


class MemoryArchive:
    """Blobs and segments by (namespace, session id).

    Attributes:
        down: every call raises ArchiveUnavailable.
        blobs: the payloads by hash.
        files: the segments.
        reads: calls that fetched something.
    """

    def __init__(self) -> None:
        self.down = False
        self.blobs: dict[tuple[str, str], dict[str, bytes]] = {}
        self.files: dict[tuple[str, str], dict[Span, bytes]] = {}
        self.reads: list[str] = []

    def _enter(self, what: str) -> None:
        if self.down:
            raise ArchiveUnavailable("the archive does not answer")
        self.reads.append(what)

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        self._enter("put_blob")
        digest = sha256(payload)
        self.blobs.setdefault((namespace, session_id), {})[digest] = payload
        return digest

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        self._enter("get_blob")
        try:
            return self.blobs[namespace, session_id][sha256]
        except KeyError:
            raise BlobMissing(f"the blob {sha256} is gone") from None

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        self._enter("segments")
        return chain(list(self.files.get((namespace, session_id), {})))

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        self._enter("segment")
        return self.files[namespace, session_id][span]

    def put(self, namespace: str, session_id: str, events: list[Event]) -> Span:
        """Archive these entries."""
        span = Span(events[0].seq, events[-1].seq)
        self.files.setdefault((namespace, session_id), {})[span] = encode(events)
        return span
