"""The HTTP application: the Messages API, and the control API of tests. Built by `__main__` and by tests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import Any

from aiohttp import web

from model_server.cache import PromptCache
from model_server.context import cut, edited, fits, summary
from model_server.control import Control, Recorded
from model_server.errors import ApiError, invalid
from model_server.scenarios import BUILT_IN, by_text, held
from model_server.scripts import (
    Conversation,
    Turn,
    conversation,
    parse_script,
    script_name,
    scripted,
    stop_reason,
)
from model_server.settings import Settings
from model_server.stream import encode, events, finish, message, new_id
from model_server.validate import validate

Json = dict[str, Any]
MAX_BODY = 32 * 1024 * 1024
VERSIONS = ("2023-06-01", "2026-10-21")
_log = logging.getLogger("model_server")
_STATUS_FAULTS = {
    "429": ApiError(
        429, "rate_limit_error", "This request would exceed your rate limit.", {"retry-after": "1"}
    ),
    "529": ApiError(529, "overloaded_error", "Overloaded"),
}


class ModelServer:
    """The server; `app` is the aiohttp application.

    Args:
        settings: see `Settings`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.control = Control(settings.record_mb * 1024 * 1024)
        self.cache = PromptCache(settings.cache_minimum)
        self.app = web.Application(client_max_size=MAX_BODY + 1, middlewares=[self._errors])
        self.app.add_routes(
            [
                web.get("/healthz", self._health),
                web.post("/v1/messages", self._messages),
                web.put("/_control/scripts/{name}", self._put_script),
                web.post("/_control/release/{gate}", self._release),
                web.get("/_control/requests", self._requests),
                web.get("/_control/gates", self._gates),
                web.delete("/_control", self._reset),
            ]
        )

    # -- the Messages API ---------------------------------------------------------------------

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        entry = await self._receive(request)
        try:
            body = self._checked(request, entry)
            seen, applied = edited(body)
            talk = conversation(seen)
            entry.turn = talk.turn
            room = fits(seen, int(talk.options.get("window") or self.settings.window))
            turn = self._turn(body, talk)
            fault = self.control.fault(
                entry.session, script_name(talk.text) or "", talk.turn, turn.fault
            )
            await self._before_first_byte(turn, entry)
            if fault in _STATUS_FAULTS:
                entry.outcome = f"fault:{fault}"
                raise _STATUS_FAULTS[fault]
            blocks, short = cut(finish(turn.content, body), room)
            reason = "model_context_window_exceeded" if short else stop_reason(turn)
            if fault == "refusal":
                reason, blocks = "refusal", []
            usage = self.cache.use(seen, time.monotonic())
            edits = applied if "context_management" in body else None
            whole = message(body, blocks, reason, usage, edits)
            stream = bool(body.get("stream"))
            response = await self._answer(request, whole, stream, turn, fault, entry)
        except ApiError as err:
            entry.status = err.status
            entry.outcome = "refused" if entry.outcome == "running" else entry.outcome
            raise
        except (asyncio.CancelledError, ConnectionError):
            entry.outcome = "gone" if entry.outcome == "running" else entry.outcome
            raise
        _log.info(
            "session=%s turn=%s status=%s outcome=%s",
            entry.session,
            entry.turn,
            entry.status,
            entry.outcome,
        )
        return response

    async def _receive(self, request: web.Request) -> Recorded:
        if request.content_length is not None and request.content_length > MAX_BODY:
            raise _too_large()
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large() from None
        if len(raw) > MAX_BODY:
            raise _too_large()
        kept = {
            k.lower(): v
            for k, v in request.headers.items()
            if k.lower().startswith("anthropic-") or k.lower() == "user-agent"
        }
        entry = Recorded("", time.time(), raw, kept)
        try:
            entry.session = str(json.loads(raw)["metadata"]["user_id"] or "")
        except (ValueError, KeyError, TypeError, RecursionError):
            entry.session = ""
        self.control.record(entry)
        return entry

    def _checked(self, request: web.Request, entry: Recorded) -> Json:
        version = request.headers.get("anthropic-version")
        if not version:
            raise invalid("anthropic-version", "header is required")
        if version not in VERSIONS:
            raise invalid("anthropic-version", f"{version!r} is not a valid version")
        if request.content_type != "application/json":
            raise invalid("content-type", "must be application/json")
        try:
            body = json.loads(entry.body)
        except (ValueError, RecursionError):
            raise invalid("", "The request body is not valid JSON") from None
        betas = ",".join(request.headers.getall("anthropic-beta", []))
        return validate(body, frozenset(item.strip() for item in betas.split(",")))

    def _turn(self, body: Json, talk: Conversation) -> Turn:
        if "compaction" in body:
            return held(Turn([summary(body, talk)], stop_reason="compaction"), talk)
        name = script_name(talk.text)
        if name is None:
            return by_text(talk)(talk)
        if name in self.control.scripts:
            return scripted(self.control.scripts[name], name, talk)
        if name in BUILT_IN:
            return BUILT_IN[name](talk)
        return Turn(
            [{"type": "text", "text": f"There is no script {name!r} on this model server."}]
        )

    async def _before_first_byte(self, turn: Turn, entry: Recorded) -> None:
        await self.control.wait(
            turn.gate, "first_byte", entry.session, entry.turn or 0, time.time()
        )
        await _pause(self.settings.delay_ms if turn.delay_ms is None else turn.delay_ms)

    async def _answer(
        self,
        request: web.Request,
        whole: Json,
        stream: bool,
        turn: Turn,
        fault: str | None,
        entry: Recorded,
    ) -> web.StreamResponse:
        if fault == "refusal":
            entry.outcome = "fault:refusal"
        entry.status = 200
        headers = {"request-id": new_id("req")}
        if stream:
            return await self._stream(request, whole, turn, fault, entry, headers)
        await self.control.wait(
            turn.gate_mid, "mid_stream", entry.session, entry.turn or 0, time.time()
        )
        if fault == "error_in_stream":
            entry.outcome = "fault:error_in_stream"
            raise _STATUS_FAULTS["529"]
        if fault in ("cut", "eof"):
            entry.outcome = f"fault:{fault}"
            await _cut(request)
        entry.outcome = "ok" if fault is None else entry.outcome
        return web.json_response(whole, headers=headers)

    async def _stream(
        self,
        request: web.Request,
        whole: Json,
        turn: Turn,
        fault: str | None,
        entry: Recorded,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        headers = {
            **headers,
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
        }
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        pause = self.settings.delta_ms if turn.delta_ms is None else turn.delta_ms
        wire = list(events(whole))
        deltas = [i for i, (name, _) in enumerate(wire) if name == "content_block_delta"]
        middle = deltas[len(deltas) // 2] if deltas else len(wire) - 2
        for i, (name, data) in enumerate(wire):
            if i == middle:
                await self.control.wait(
                    turn.gate_mid, "mid_stream", entry.session, entry.turn or 0, time.time()
                )
                if fault in ("error_in_stream", "cut", "eof"):
                    entry.outcome = f"fault:{fault}"
                    return await _break(request, response, fault)
            if name == "content_block_delta":
                await _pause(pause)
            await response.write(encode(name, data))
        await response.write_eof()
        entry.outcome = "ok" if fault is None else entry.outcome
        return response

    # -- control ------------------------------------------------------------------------------

    async def _put_script(self, request: web.Request) -> web.Response:
        try:
            value = json.loads(await request.read())
        except ValueError:
            raise invalid("", "the script is not valid JSON") from None
        name = request.match_info["name"]
        if name in BUILT_IN:
            raise invalid("", f"{name} is a built-in scenario; choose another name")
        turns = self.control.scripts[name] = parse_script(value)
        return web.json_response({"name": name, "turns": len(turns)})

    async def _release(self, request: web.Request) -> web.Response:
        gate, once = request.match_info["gate"], request.query.get("once") in ("1", "true")
        return web.json_response(
            {"gate": gate, "released": await self.control.release(gate, once=once)}
        )

    async def _requests(self, request: web.Request) -> web.Response:
        session, bodies = request.query.get("session"), request.query.get("bodies") != "0"
        found = [
            r.as_json(body=bodies) for r in self.control.records if session in (None, r.session)
        ]
        return web.json_response({"requests": found, "dropped": self.control.dropped})

    async def _gates(self, request: web.Request) -> web.Response:
        return web.json_response(self.control.gates())

    async def _reset(self, request: web.Request) -> web.Response:
        await self.control.reset()
        self.cache.clear()
        return web.json_response({})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    # -- errors and the key -------------------------------------------------------------------

    @web.middleware
    async def _errors(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            if request.path != "/healthz":
                self._authenticate(request)
            response: web.StreamResponse = await handler(request)
            return response
        except ApiError as err:
            return _error(err)
        except web.HTTPException as err:
            kind = "not_found_error" if err.status == 404 else "invalid_request_error"
            return _error(
                ApiError(err.status, kind, f"{request.method} {request.path}: {err.reason}")
            )
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("failed to answer %s %s", request.method, request.path)
            return _error(ApiError(500, "api_error", "Internal server error"))

    def _authenticate(self, request: web.Request) -> None:
        given = request.headers.get("x-api-key", "")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        if not given:
            raise ApiError(
                401, "authentication_error", "x-api-key header or Bearer token is required"
            )
        if not hmac.compare_digest(given.encode(), self.settings.api_key.encode()):
            raise ApiError(401, "authentication_error", "invalid x-api-key")


def _error(err: ApiError) -> web.Response:
    request_id = new_id("req")
    headers = {**err.headers, "request-id": request_id}
    return web.json_response(err.envelope(request_id), status=err.status, headers=headers)


def _too_large() -> ApiError:
    return ApiError(
        413, "request_too_large", f"Request exceeds the maximum size of {MAX_BODY} bytes"
    )


async def _break(
    request: web.Request, response: web.StreamResponse, fault: str
) -> web.StreamResponse:
    """End a stream in its middle, as the fault says."""
    if fault == "error_in_stream":
        error = {"type": "overloaded_error", "message": "Overloaded"}
        await response.write(
            encode("error", {"type": "error", "error": error, "request_id": new_id("req")})
        )
    if fault == "cut":
        await _cut(request)
    await response.write_eof()
    return response


async def _cut(request: web.Request) -> None:
    """Close the connection. What was written is flushed; the body stays without its end."""
    if request.transport is not None:
        request.transport.close()
    await asyncio.Event().wait()  # ended by the cancellation that the lost connection brings


async def _pause(milliseconds: int) -> None:
    if milliseconds > 0:
        await asyncio.sleep(milliseconds / 1000)
