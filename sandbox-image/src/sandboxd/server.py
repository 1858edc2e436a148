"""The HTTP/1.1 server of the wire protocol, on loopback.

Its client is the proxy of the sandbox pod, and, because they share the loopback, whatever a command sends: it must not
fall over any input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import traceback
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from sandboxd import WIRE_VERSION
from sandboxd.calls import Calls, Mismatch
from sandboxd.tools import DEFAULT_TIMEOUT_MS

MAX_BODY = 16 * 1024 * 1024
MAX_HEAD = 32 * 1024
MAX_WAIT_MS = 600_000
_IDLE_S = 600
_BODY_S = 60
_CONNECTIONS = 256
_CALL_ID = re.compile(r"[\x21-\x7e]{1,256}")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


class HttpError(Exception):
    """An error answer: status, type and message."""

    def __init__(self, status: int, kind: str, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.close = close


@dataclass(frozen=True)
class Request:
    """One parsed request."""

    method: str
    path: str
    query: str
    body: bytes
    keep_alive: bool


class Server:
    """Listens on 127.0.0.1 and answers for `Calls`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=MAX_HEAD)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Cancelled only by `close`; asyncio's own callback would report it as a failure.
        ends = (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            try:
                if len(self._tasks) > _CONNECTIONS:
                    error = HttpError(503, "unavailable", "too many connections", close=True)
                    await _send(writer, 503, _error_body(error), keep_alive=False)
                    return
                while await self._one(reader, writer):
                    pass
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False when the connection must end."""
        keep_alive = False
        try:
            request = await read_request(reader, writer)
            if request is None:
                return False
            keep_alive = request.keep_alive
            status, answer = await self._route(request)
        except HttpError as err:
            status, answer = err.status, _error_body(err)
            keep_alive = keep_alive and not err.close
        except OSError as err:
            error = HttpError(503, "unavailable", f"the journal cannot be written: {err.strerror}")
            status, answer = 503, _error_body(error)
        except (asyncio.IncompleteReadError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            status, answer = (
                500,
                _error_body(HttpError(500, "internal", "sandboxd failed; see its log")),
            )
        await _send(writer, status, answer, keep_alive=keep_alive)
        return keep_alive

    async def _route(self, request: Request) -> tuple[int, dict[str, Any]]:
        if request.path == "/v1/health":
            _need(request, "GET")
            return 200, {"status": "ok", "version": WIRE_VERSION}
        if request.path == "/v1/execute":
            _need(request, "POST")
            return await self._execute(request)
        if request.path.startswith("/v1/calls/"):
            _need(request, "GET", "DELETE")
            call_id = _call_id(unquote(request.path.removeprefix("/v1/calls/")))
            if request.method == "DELETE":
                status, result = await self._calls.interrupt(call_id)
            else:
                status, result = await self._calls.look(call_id, _wait_ms(request.query))
            if status == "unknown":
                return 404, {"status": "unknown"}
            answer: dict[str, Any] = {"call_id": call_id, "status": status}
            return 200, answer if result is None else {**answer, "result": result}
        raise HttpError(404, "not_found", f"no such path: {request.path[:200]}")

    async def _execute(self, request: Request) -> tuple[int, dict[str, Any]]:
        try:
            body = json.loads(request.body)
        except (ValueError, RecursionError):
            raise HttpError(400, "invalid_request", "the body is not JSON") from None
        if not isinstance(body, dict):
            raise HttpError(400, "invalid_request", "the body is not a JSON object")
        if unknown := set(body) - {"call_id", "name", "input", "timeout_ms"}:
            raise HttpError(400, "invalid_request", f"unknown field {sorted(unknown)[0]!r}")
        call_id = _call_id(body.get("call_id"))
        name, given = body.get("name"), body.get("input")
        timeout_ms = body.get("timeout_ms", DEFAULT_TIMEOUT_MS)
        if not isinstance(name, str):
            raise HttpError(400, "invalid_request", "name must be a string")
        if not isinstance(given, dict):
            raise HttpError(400, "invalid_request", "input must be an object")
        if not isinstance(timeout_ms, int) or isinstance(timeout_ms, bool) or timeout_ms <= 0:
            raise HttpError(400, "invalid_request", "timeout_ms must be a positive integer")
        try:
            result = await self._calls.execute(call_id, name, given, timeout_ms)
        except Mismatch as err:
            raise HttpError(409, "conflict", str(err)) from None
        return 200, {"call_id": call_id, "status": "done", "result": result}


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """Read one request; None when the client has closed the connection between two.

    Raises:
        HttpError: the request is not one that this server takes.
    """
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _IDLE_S)
    except asyncio.LimitOverrunError:
        raise HttpError(431, "invalid_request", "the header is too long", close=True) from None
    except asyncio.IncompleteReadError as err:
        if err.partial:
            raise
        return None
    line, *rest = head[:-4].split(b"\r\n")
    match = re.fullmatch(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.1", line)
    if match is None:
        raise HttpError(
            400, "invalid_request", "the request line is not valid HTTP/1.1", close=True
        )
    headers = _headers(rest)
    if "transfer-encoding" in headers:
        raise HttpError(501, "invalid_request", "send the body with content-length", close=True)
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,12}", length):
        raise HttpError(400, "invalid_request", "content-length is not a number", close=True)
    if int(length) > MAX_BODY:
        raise HttpError(413, "too_large", f"the body is larger than {MAX_BODY} bytes", close=True)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await asyncio.wait_for(reader.readexactly(int(length)), _BODY_S) if int(length) else b""
    path, _, query = match.group(2).decode("ascii").partition("?")
    keep_alive = "close" not in headers.get("connection", "").lower()
    return Request(match.group(1).decode("ascii"), path, query, body, keep_alive)


def _headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(
            rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*", line
        )
        if match is None:
            raise HttpError(400, "invalid_request", "a header line is not valid", close=True)
        name = match.group(1).decode("ascii").lower()
        # Two lengths are how a request is smuggled past a proxy.
        if name in headers and name in ("content-length", "transfer-encoding", "host"):
            raise HttpError(400, "invalid_request", f"{name} is given twice", close=True)
        headers[name] = match.group(2).decode("latin-1")
    return headers


async def _send(
    writer: asyncio.StreamWriter, status: int, answer: dict[str, Any], *, keep_alive: bool
) -> None:
    body = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        f"connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    writer.write(head.encode("ascii") + body)
    await writer.drain()


def _error_body(error: HttpError) -> dict[str, Any]:
    return {"error": {"type": error.kind, "message": str(error)}}


def _need(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise HttpError(
            405, "invalid_request", f"{request.path[:200]} takes {' or '.join(methods)}"
        )


def _call_id(value: object) -> str:
    if not isinstance(value, str) or not _CALL_ID.fullmatch(value):
        raise HttpError(
            400, "invalid_request", "call_id must be 1 to 256 printable ASCII characters"
        )
    return value


def _wait_ms(query: str) -> int:
    raw = parse_qs(query).get("wait_ms", ["0"])[-1]
    if not re.fullmatch(r"[0-9]{1,9}", raw):
        raise HttpError(400, "invalid_request", "wait_ms must be a number of milliseconds")
    return min(int(raw), MAX_WAIT_MS)
