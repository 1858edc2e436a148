"""The archive's HTTPS API (docs/interfaces.md): who asks, may they, and the bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from cowhand.api import labels
from cowhand.archive import layout
from cowhand.archive.layout import Names
from cowhand.archive.objects import Exists, Missing, Objects
from cowhand.errors import Denied, Retryable
from cowhand.kube.client import Kube
from cowhand.kube.review import STATUS, Refusal, Reviewer
from cowhand.session import archive
from cowhand.session.blobs import Span, sha256
from cowhand.session.events import EVENT_LIMIT
from cowhand.telemetry import metrics

log = logging.getLogger(__name__)

TRANSFERS: Final = 6
"""Bodies that are held in memory at the same time; the others wait."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """Carries a Refusal out of a handler; `status` where it is not that of its type."""

    def __init__(self, refusal: Refusal, status: int = 0) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.status = status or STATUS[refusal.type]


class ArchiveServer:
    """The handlers.

    Args:
        kube: the Kubernetes API, for TokenReview.
        objects: where the bytes are.
        names: whom to serve.
    """

    def __init__(self, *, kube: Kube, objects: Objects, names: Names) -> None:
        self._objects = objects
        self._names = names
        self._reviewer = Reviewer(kube, labels.AUDIENCE_ARCHIVE)
        self._transfers = asyncio.Semaphore(TRANSFERS)

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=EVENT_LIMIT)
        session = "{namespace}/{session}"
        blob = f"/v1/blobs/{session}/{{sha256}}"
        app.router.add_put(blob, self._route(self._put_blob))
        app.router.add_get(blob, self._route(self._get_blob))
        app.router.add_get(f"/v1/segments/{session}", self._route(self._segments))
        app.router.add_get(f"/v1/segments/{session}/{{span}}", self._route(self._segment))
        app.router.add_get("/healthz", self._health)
        return app

    async def _put_blob(self, request: web.Request) -> web.StreamResponse:
        path = _path(layout.blob_path, request, "sha256")
        length = request.content_length
        if length is None:
            raise Refused(Refusal("invalid", "Say the length of the body (content-length)."), 411)
        if length > EVENT_LIMIT:
            text = f"The body has {length} bytes, the limit is {EVENT_LIMIT}."
            raise Refused(Refusal("invalid", text), 413)
        async with self._transfers:
            body = await request.read()
            if await asyncio.to_thread(sha256, body) != request.match_info["sha256"]:
                raise Refused(Refusal("invalid", "The body does not have this SHA-256."))
            try:
                await self._objects.create(path, body)
            except Exists:
                if await self._objects.get(path) != body:
                    log.error("a stored blob is damaged", extra={"path": path})
                    text = f"There is an object {path} with other content: it is damaged."
                    raise Refused(Refusal("invalid", text), 409) from None
                return web.json_response({"status": "exists"})
        return web.json_response({"status": "created"}, status=201)

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        return await self._bytes(_path(layout.blob_path, request, "sha256"))

    async def _segments(self, request: web.Request) -> web.StreamResponse:
        spans = await self.manifest(request.match_info["namespace"], request.match_info["session"])
        found = [{"first": span.first, "last": span.last, "size": span.size} for span in spans]
        return web.json_response({"segments": found, "last": spans[-1].last if spans else 0})

    async def manifest(self, namespace: str, session_id: str) -> list[Span]:
        """Segments that cover the most from position 1 on, in order.

        Raises:
            Refused: these are not the names of a session.
        """
        try:
            folder = layout.segments_folder(namespace, session_id)
        except ValueError as err:
            raise Refused(Refusal("invalid", str(err))) from err
        listed = await self._objects.entries(folder)
        spans = (archive.span_of(item.path.rpartition("/")[2], item.size) for item in listed)
        return archive.chain([span for span in spans if span is not None])

    async def _segment(self, request: web.Request) -> web.StreamResponse:
        match = layout.SPAN.fullmatch(request.match_info["span"])
        if match is None:
            raise Refused(Refusal("invalid", "Name a segment by its positions: <first>-<last>."))
        span = Span(int(match[1]), int(match[2]))
        names = request.match_info["namespace"], request.match_info["session"]
        try:
            return await self._bytes(layout.segment_path(*names, span))
        except ValueError as err:
            raise Refused(Refusal("invalid", str(err))) from err

    async def _bytes(self, path: str) -> web.StreamResponse:
        async with self._transfers:
            return web.Response(
                body=await self._objects.get(path), content_type="application/octet-stream"
            )

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def _route(self, handler: Handler) -> Handler:
        """Authenticate, authorise, run a handler, and turn what it raises into our answers."""

        async def handle(request: web.Request) -> web.StreamResponse:
            answer = await self._answer(request, handler)
            resource = request.match_info.route.resource
            metrics.count_request(resource.canonical if resource else None, answer.status)
            return answer

        return handle

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            # Before the body is read: a stranger's bytes are not worth our memory.
            await self._admit(request)
            return await handler(request)
        except Refused as err:
            refusal, status = err.refusal, err.status
        except Missing as err:
            refusal, status = Refusal("not_found", str(err)), 404
        except Retryable as err:
            refusal, status = Refusal("unavailable", str(err)), 503
        except Denied as err:
            # Of the API server, against us.
            refusal, status = Refusal("unavailable", f"The archive lacks a right: {err}"), 503
        except web.HTTPRequestEntityTooLarge:
            text = f"The body is longer than {EVENT_LIMIT} bytes."
            refusal, status = Refusal("invalid", text), 413
        log.info("refused", extra={"path": request.path, "status": status, "why": refusal.message})
        headers = {"retry-after": "2"} if status == 503 else {}
        error = {"error": {"type": refusal.type, "message": refusal.message}}
        return web.json_response(error, status=status, headers=headers)

    async def _admit(self, request: web.Request) -> None:
        header = request.headers.getall("Authorization", [])
        caller = await self._reviewer.caller(header[0] if len(header) == 1 else "")
        if isinstance(caller, Refusal):
            raise Refused(caller)
        refusal = layout.check_caller(caller, request.match_info["namespace"], self._names)
        if refusal is not None:
            raise Refused(refusal)


def _path(of: Callable[[str, str, str], str], request: web.Request, last: str) -> str:
    info = request.match_info
    try:
        return of(info["namespace"], info["session"], info[last])
    except ValueError as err:
        raise Refused(Refusal("invalid", str(err))) from err
