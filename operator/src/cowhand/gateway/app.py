"""The HTTP API: routes, and what every request goes through (identity, tenant, right, errors).

`build` makes the aiohttp application from its dependencies; `gateway.run` serves it over TLS, tests serve
it on loopback. Nothing here outlives a request except caches that may be lost at any time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from cowhand import __version__
from cowhand.errors import CowhandError, LogIncompatible, SessionNotFound, UserError
from cowhand.gateway import answers, backup, health, incoming, messages, paging, previews
from cowhand.gateway import exec as sandbox_exec
from cowhand.gateway import log as rawlog
from cowhand.gateway.auth import Authority, Caller, Clock, Expiring, Right
from cowhand.gateway.broker import Broker
from cowhand.gateway.errors import Answer, Conflict, Forbidden, NotFound, answer, envelope
from cowhand.gateway.pump import Follower
from cowhand.gateway.sessions import session_object
from cowhand.gateway.sse import PING, Renderer, error_frame, resume_position
from cowhand.gateway.window import chunks, context_at
from cowhand.session import events as ev
from cowhand.session.log import SessionLog, SessionState, from_end
from cowhand.session.preview import Preview, Previews
from cowhand.session.remote import HttpArchive
from cowhand.telemetry.metrics import count_request

MAX_BODY: Final = 4 * 1024 * 1024
"""Bytes of a request body: one event of the largest size, however its JSON escapes it, or several."""
UNSEEN_TTL_S: Final = 60.0
HEALTH_TTL_S: Final = 5.0
# Also keeps keys of the store apart: nothing else of a path becomes part of a key.
SESSION_ID: Final = re.compile(r"sesn_[0-9a-f]{32}")

logger = logging.getLogger(__name__)


@dataclass
class Gateway:
    """Dependencies and caches of the application.

    Attributes:
        authority: identity and rights.
        logs: session logs by namespace (tenant).
        executor: runs commands in sandboxes.
        broker: for `/healthz`.
        archive: for `/healthz`, None where there is none.
        event_limit: bytes of one event.
        clock: monotonic seconds.
        stopping: set when the process goes down; ends the streams.
        ids: ids of recent requests.
        unseen: session -> position of a message that came while nobody was streaming. Official
            quickstarts send first and open the stream second: their stream begins here.
        previews: namespace -> text that is still written; none where it is not served.
        streams: session -> number of open streams.
        durability: what the store was last seen to keep, for `/healthz`; None: not known.
    """

    authority: Authority
    logs: Mapping[str, SessionLog]
    executor: sandbox_exec.Executor
    broker: Broker
    archive: HttpArchive | None = None
    event_limit: int = ev.INLINE_LIMIT
    clock: Clock = time.monotonic
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    ids: messages.Ids = field(default_factory=messages.Ids)
    unseen: Expiring[int] = field(init=False)
    health: Expiring[dict[str, Any]] = field(init=False)
    previews: Mapping[str, Previews] = field(default_factory=dict)
    streams: dict[str, int] = field(default_factory=dict)
    durability: Callable[[], dict[str, Any] | None] = lambda: None

    def __post_init__(self) -> None:
        self.unseen = Expiring(self.clock)
        self.health = Expiring(self.clock)


GATEWAY: Final = web.AppKey("gateway", Gateway)
REQUEST_ID: Final = web.RequestKey("request_id", str)


def build(gateway: Gateway) -> web.Application:
    """The application."""
    app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY)
    app[GATEWAY] = gateway
    app.on_response_prepare.append(_count)
    app.add_routes(
        [
            web.get("/healthz", healthz, allow_head=False),
            web.get("/v1/sessions/{id}", get_session, allow_head=False),
            web.get("/v1/sessions/{id}/events", list_events, allow_head=False),
            web.post("/v1/sessions/{id}/events", send_events),
            web.get("/v1/sessions/{id}/events/stream", stream_events, allow_head=False),
            web.get("/v1/sessions/{id}/log", read_log, allow_head=False),
            web.get("/v1/sessions/{id}/export", export_session, allow_head=False),
            web.post("/v1/sessions/{id}/restore", restore_session),
            web.get("/v1/namespaces/{namespace}/backup", backup_namespace, allow_head=False),
            web.post("/v1/namespaces/{namespace}/sandboxes/{name}/exec", execute),
        ]
    )
    return app


async def _count(request: web.Request, response: web.StreamResponse) -> None:
    resource = request.match_info.route.resource
    count_request(resource.canonical if resource is not None else None, response.status)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id, and each error the envelope of the API."""
    request_id = request[REQUEST_ID] = f"req_{secrets.token_hex(12)}"
    try:
        response = await handler(request)
    except web.HTTPException as err:
        response = _json(envelope(err.status, _http_message(request, err), request_id), err.status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as err:
        failed = _answer(request, err)
        response = _json(failed.body, failed.status, failed.headers)
    if not response.prepared:
        response.headers["request-id"] = request_id
    return response


def _answer(request: web.Request, err: Exception) -> Answer:
    """The answer for an error. One whose text the caller does not see is logged under the request's id."""
    failed = answer(err, request[REQUEST_ID])
    if failed.status == 500:
        logger.error(
            "request failed",
            extra={"request_id": request[REQUEST_ID], "path": request.path},
            exc_info=err,
        )
    return failed


def _http_message(request: web.Request, err: web.HTTPException) -> str:
    if err.status == 413:
        return f"the body is larger than {MAX_BODY} bytes"
    if err.status == 404:
        return f"{request.method} {request.path}: no such resource here"
    if err.status == 405:
        return f"{request.method} is not allowed on {request.path}"
    return err.reason


def _json(
    body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    raw = json.dumps(body, ensure_ascii=False).encode()
    return web.Response(
        body=raw, status=status, headers=headers, content_type="application/json", charset="utf-8"
    )


@dataclass(frozen=True)
class Target:
    """A session that a caller wants something of."""

    caller: Caller
    log: SessionLog
    state: SessionState

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.state.meta.session_id

    def right(self, verb: str, subresource: str) -> Right:
        """A right on this session; one without an AgentSession has its id for a name."""
        meta = self.state.meta
        return Right(verb, subresource, meta.namespace, meta.name or meta.session_id)


async def _caller(request: web.Request) -> Caller:
    headers = request.headers
    authority = request.app[GATEWAY].authority
    return await authority.authenticate(headers.get("Authorization"), headers.get("X-Api-Key"))


async def _target(request: web.Request, *rights: tuple[str, str]) -> Target:
    """Who asks, and for which session; every right of `rights` (verb, subresource) is checked.

    Somebody without the right gets 403 in a namespace that they named, whether the session is there
    or not; without a namespace the session's own is asked, and an unknown session is 404.
    """
    gateway = request.app[GATEWAY]
    caller = await _caller(request)
    session_id = request.match_info["id"]
    if not SESSION_ID.fullmatch(session_id):
        raise SessionNotFound(f"{session_id!r} is not a session id (sesn_ and 32 hex digits)")
    named = request.headers.get("anthropic-workspace-id") or request.query.get("namespace") or ""
    if named:
        _served(request, named)
    found = await _found(gateway, session_id, named)
    targets = [Target(caller, gateway.logs[state.meta.namespace], state) for state in found]
    refused: Forbidden | None = None
    may: list[Target] = []
    for target in targets:
        try:
            for verb, subresource in rights:
                await gateway.authority.authorize(caller, target.right(verb, subresource))
            may.append(target)
        except Forbidden as err:
            refused = err
    if len(may) > 1:
        listed = ", ".join(sorted(target.state.meta.namespace for target in may))
        raise Conflict(
            f"session {session_id} stands in more than one namespace ({listed}), and one of them is "
            "forged: name yours in the header anthropic-workspace-id"
        )
    if may:
        return may[0]
    if refused is not None:
        raise refused
    if named:
        for verb, subresource in rights:
            await gateway.authority.authorize(caller, Right(verb, subresource, named))
    where = f" in namespace {named}" if named else ""
    raise SessionNotFound(f"there is no session {session_id}{where}")


async def _found(gateway: Gateway, session_id: str, named: str) -> list[SessionState]:
    """The session in the named namespace, else wherever it stands.

    A tenant's harness, taken over, can write the id of another tenant's session into its own keys: the
    first one found need not be the right one.
    """
    found = []
    broken: LogIncompatible | None = None
    for namespace in (named,) if named else tuple(gateway.logs):
        try:
            found.append(await gateway.logs[namespace].get_session(session_id))
        except SessionNotFound:
            continue
        except LogIncompatible as err:
            broken = err
    if not found and broken is not None:
        raise broken
    return found


READ: Final = ("get", "events")

_SUBRESOURCE: Final = {
    ev.USER_TOOL_CONFIRMATION: "approvals",
    ev.SYSTEM_MESSAGE: "systemmessages",
}
"""What a caller must be allowed to create to send an event; everything else is `messages`."""


async def healthz(request: web.Request) -> web.Response:
    """200 while the process serves; says whether store, broker and archive answer (`cowhand doctor`)."""
    gateway = request.app[GATEWAY]
    found = gateway.health.get("health")
    if found is None:
        found = dict[str, Any](
            status="ok",
            version=__version__,
            **await health.examine(gateway.logs, gateway.broker, gateway.archive),
        )
        verdict = gateway.durability()
        if verdict is not None:
            found["store_profile"] = verdict
        gateway.health.put("health", found, HEALTH_TTL_S)
    return _json(found)


async def get_session(request: web.Request) -> web.Response:
    """`GET /v1/sessions/{id}`."""
    target = await _target(request, READ)
    last = target.state.next_seq - 1
    created = await target.log.get_events(target.session_id, 1, 1)
    newest = await target.log.get_events(target.session_id, last, last)
    if not created or not newest:
        raise SessionNotFound(f"the log of session {target.session_id} is gone")
    return _json(session_object(target.state, created[0], newest[0]))


async def list_events(request: web.Request) -> web.Response:
    """`GET /v1/sessions/{id}/events`."""
    query = paging.parse(request.query)
    target = await _target(request, READ)
    return _json(await paging.page(target.log, target.session_id, query))


async def send_events(request: web.Request) -> web.Response:
    """`POST /v1/sessions/{id}/events`."""
    gateway = request.app[GATEWAY]
    await _caller(request)  # before the body is read: strangers do not make us parse a megabyte
    session_id = request.match_info["id"]
    body = await request.read()
    sent = incoming.parse(body, session_id)
    parts = {_SUBRESOURCE.get(item.type, "messages") for item in sent}
    target = await _target(request, *(("create", part) for part in sorted(parts)))
    await answers.check(target.log, target.state, sent)
    retry = request.headers.get("x-stainless-retry-count", "0")
    ids = gateway.ids.of(
        target.caller, session_id, body, len(sent), int(retry) if retry.isdecimal() else 0
    )
    events = messages.compose(sent, target.caller, ids, gateway.event_limit)
    echoes, first = await messages.write(target.log, session_id, events)
    if not gateway.streams.get(session_id):
        gateway.unseen.put(session_id, first, UNSEEN_TTL_S)
    return _json({"data": echoes})


def _stream_response(content_type: str) -> web.StreamResponse:
    return web.StreamResponse(
        headers={
            "Content-Type": content_type,
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )


async def stream_events(request: web.Request) -> web.StreamResponse:
    """`GET /v1/sessions/{id}/events/stream`."""
    gateway = request.app[GATEWAY]
    resume = resume_position(request.headers.get("Last-Event-ID"), request.query)
    kinds = previews.wanted(request.query)
    target = await _target(request, READ)
    session_id = target.session_id
    unseen = None if resume else gateway.unseen.pop(session_id)
    start = max(1, resume[0]) if resume else unseen or target.state.next_seq
    context = await context_at(target.log, session_id, start)
    renderer = Renderer(context, after=resume or (0, 0))
    shown = previews.Frames(session_id, kinds) if kinds else None
    response = _stream_response("text/event-stream")
    response.headers["request-id"] = request[REQUEST_ID]
    await response.prepare(request)
    gateway.streams[session_id] = gateway.streams.get(session_id, 0) + 1
    try:
        await _follow(request, response, target, start, renderer, PING, error_frame, shown)
    finally:
        gateway.streams[session_id] -= 1
        if not gateway.streams[session_id]:
            del gateway.streams[session_id]
    return response


async def read_log(request: web.Request) -> web.StreamResponse:
    """`GET /v1/sessions/{id}/log`."""
    query = rawlog.parse(request.query)
    target = await _target(request, READ)
    start, end = from_end(query.start, query.end, target.state.next_seq)
    response = _stream_response("application/x-ndjson")
    response.headers["request-id"] = request[REQUEST_ID]
    await response.prepare(request)
    if query.follow:
        render = previews.line if query.thinking else previews.text_line
        shown = render if query.previews else None
        await _follow(
            request, response, target, start, query.render, b"\n", rawlog.error_line, shown
        )
        return response
    try:
        async for found in chunks(target.log, target.session_id, start, end):
            for event in found:
                if line := query.render(event):
                    await response.write(line)
    except CowhandError as err:
        await response.write(rawlog.error_line(_answer(request, err).body))
    return response


async def export_session(request: web.Request) -> web.StreamResponse:
    """`GET /v1/sessions/{id}/export`."""
    target = await _target(request, READ)
    response = _stream_response("application/x-ndjson")
    response.headers["request-id"] = request[REQUEST_ID]
    await response.prepare(request)
    try:
        async for line in rawlog.export_lines(target.log, target.state, _wall_ms()):
            await response.write(line)
    except CowhandError as err:
        await response.write(rawlog.error_line(_answer(request, err).body))
    return response


async def backup_namespace(request: web.Request) -> web.StreamResponse:
    """`GET /v1/namespaces/{ns}/backup`."""
    caller = await _caller(request)
    namespace = _served(request, request.match_info["namespace"])
    await request.app[GATEWAY].authority.authorize(caller, Right(*READ, namespace))
    response = _stream_response("application/x-ndjson")
    response.headers["request-id"] = request[REQUEST_ID]
    await response.prepare(request)
    log = request.app[GATEWAY].logs[namespace]
    try:
        async for line in backup.backup_lines(log, namespace, _wall_ms()):
            await response.write(line)
    except CowhandError as err:
        await response.write(rawlog.error_line(_answer(request, err).body))
    return response


async def restore_session(request: web.Request) -> web.Response:
    """`POST /v1/sessions/{id}/restore`."""
    gateway = request.app[GATEWAY]
    caller = await _caller(request)
    session_id = request.match_info["id"]
    named = request.headers.get("anthropic-workspace-id") or request.query.get("namespace") or ""
    if not named:
        raise UserError("name the namespace in the header anthropic-workspace-id")
    namespace = _served(request, named)
    await gateway.authority.authorize(caller, Right("create", "restore", namespace))
    dry_run = request.query.get("dry_run", "false")
    if dry_run not in ("true", "false"):
        raise UserError(f"dry_run: {dry_run!r} is not true or false", field="dry_run")
    only_look = dry_run == "true"
    body = request.content.iter_any()
    done = await backup.restore(gateway.logs[namespace], session_id, body, dry_run=only_look)
    logger.warning(
        "session %s of %s: %s from a backup by %s%s",
        *(session_id, namespace, done.outcome, caller.user, " (dry run)" * only_look),
    )
    return _json(backup.as_json(session_id, done, dry_run=only_look))


def _served(request: web.Request, namespace: str) -> str:
    """The namespace, if it is a tenant. Raises NotFound."""
    if namespace not in request.app[GATEWAY].logs:
        raise NotFound(f"namespace {namespace} is not served here (chart value `tenants`)")
    return namespace


def _wall_ms() -> int:
    return round(time.time() * 1000)


async def _follow(
    request: web.Request,
    response: web.StreamResponse,
    target: Target,
    start: int,
    render: Callable[[Any], bytes],
    ping: bytes,
    failed: Callable[[dict[str, Any]], bytes],
    shown: Callable[[Preview], bytes] | None = None,
) -> None:
    """Send what comes from a position on; `shown` renders previews, None leaves them out."""
    gateway = request.app[GATEWAY]
    if target.state.state in ("terminated", "closed") and start >= target.state.next_seq:
        return  # nothing will ever come

    async def check() -> None:
        await gateway.authority.authorize(target.caller, target.right(*READ))

    source: AsyncIterator[Any] = target.log.follow(target.session_id, start)
    channel = gateway.previews.get(target.state.meta.namespace)
    if shown is not None and channel is not None:
        source = previews.merged(source, channel.follow(target.session_id))
        render = previews.renderer(render, shown, start)
    follower = Follower(response, request.transport, render, ping, check, gateway.stopping)
    try:
        await follower.run(source)
    except CowhandError as err:
        # The status line is gone: the error travels as the last thing of the stream.
        await response.write(failed(_answer(request, err).body))


async def execute(request: web.Request) -> web.Response:
    """`POST /v1/namespaces/{namespace}/sandboxes/{name}/exec`."""
    gateway = request.app[GATEWAY]
    caller = await _caller(request)
    namespace, name = request.match_info["namespace"], request.match_info["name"]
    _served(request, namespace)
    await gateway.authority.authorize(caller, Right("create", "exec", namespace))
    command = sandbox_exec.parse(await request.read())
    return _json(await gateway.executor.run(caller, namespace, name, command))
