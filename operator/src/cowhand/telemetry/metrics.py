"""Metrics of every process: the one catalogue of names, and the port that Prometheus reads them from.

Only this module knows the client library. Whoever counts imports a metric from here; the `run` of a process
opens the port with `serving`. Labels have few values that we choose ourselves: nothing that a tenant's user,
Claude or an endpoint can invent becomes one. docs/metrics.md is generated from the catalogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import MetricWrapperBase

from cowhand.errors import UserError

LOG = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 5.0
"""How long a reader may take to send its request, and to take the answer."""

MAX_REQUEST: Final = 16 * 1024
MAX_READERS: Final = 16
"""Connections that are served at the same time; more are closed at once."""

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Buckets of what the store does, seconds."""

SLOW: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Buckets of what a model or a tool does, seconds."""

# The store, in every process that uses it.

STORE_SCRIPTS: Final = Counter(
    "cowhand_store_scripts_total",
    "Scripts of the log that were run (append, ingest, create, claim, park and so on), by outcome:"
    " ok, dup, gap, fenced, closed, nosession, toobig, quota, other, unavailable, error",
    ("script", "outcome"),
    registry=REGISTRY,
)
STORE_SCRIPT_SECONDS: Final = Histogram(
    "cowhand_store_script_seconds",
    "Time from asking for a script to its answer, tries again included",
    ("script",),
    buckets=FAST,
    registry=REGISTRY,
)
STORE_BARRIER_SECONDS: Final = Histogram(
    "cowhand_store_barrier_seconds",
    "Time that a barrier waited for the durability of its profile, by outcome: ok, unavailable, weaker"
    " (nobody confirmed, and store.allowWeaker lets it pass)",
    ("outcome",),
    buckets=FAST,
    registry=REGISTRY,
)
STORE_PROFILE: Final = Gauge(
    "cowhand_store_profile",
    "1 for what the store was last seen to keep (operator, broker, gateway, archive): the profile that was"
    " demanded, the one that it comes to (dev, standard, strict, managed, none), the server and its version",
    ("demanded", "effective", "server"),
    registry=REGISTRY,
)

# Harness.

SESSIONS_HELD: Final = Gauge(
    "cowhand_harness_sessions_held", "Sessions that this worker holds now", registry=REGISTRY
)
CLAIMS: Final = Counter(
    "cowhand_harness_claims_total",
    "Claims of sessions, by outcome: ok, held, suspended, closed, nosession, deadworker",
    ("outcome",),
    registry=REGISTRY,
)
TAKEOVERS: Final = Counter(
    "cowhand_session_takeovers_total",
    "Sessions that were taken from a dead or stuck holder and queued again (harness and operator)",
    registry=REGISTRY,
)
TIMERS: Final = Counter(
    "cowhand_session_timers_total",
    "Sessions that waited for a time (a retry, a rate limit) and were queued again when it came (harness and operator)",
    registry=REGISTRY,
)
GATE_ENTRIES: Final = Counter(
    "cowhand_gate_entries_total",
    "Questions to the rate gate before a model request, by answer: go, probe (its answer opens the gate), wait",
    ("answer",),
    registry=REGISTRY,
)
GATE_SHUT: Final = Counter(
    "cowhand_gate_shut_total",
    "Refusals of the model endpoint that shut the rate gate of a workspace and model, by error type",
    ("reason",),
    registry=REGISTRY,
)
SLOT_WAIT_SECONDS: Final = Histogram(
    "cowhand_slot_wait_seconds",
    "How long sessions waited for their turn at a workspace that tenants share (limits.maxConcurrentRequests)",
    registry=REGISTRY,
    buckets=(0.05, 0.25, 1, 5, 15, 60, 300),
)
PREVIEWS: Final = Counter(
    "cowhand_previews_total",
    "Pieces of text that were published while a response streams, by whether anybody listens: heard, unheard",
    ("outcome",),
    registry=REGISTRY,
)
RESCHEDULED: Final = Counter(
    "cowhand_sessions_rescheduled_total",
    "Sessions that a harness gave back until a later time instead of waiting with them, by what they wait for",
    ("reason",),
    registry=REGISTRY,
)
MODEL_REQUESTS: Final = Counter(
    "cowhand_model_requests_total",
    "Model requests, by outcome: ok, cancelled (interrupt or drain), rate_limit, overloaded, refused (by our"
    " proxy), invalid, unreachable (no connection, or one that broke), other",
    ("outcome",),
    registry=REGISTRY,
)
MODEL_SECONDS: Final = Histogram(
    "cowhand_model_request_seconds",
    "Time from sending a request to the end of its answer, complete answers only",
    buckets=SLOW,
    registry=REGISTRY,
)
MODEL_TTFT_SECONDS: Final = Histogram(
    "cowhand_model_first_token_seconds",
    "Time from sending a request to the first content block, complete answers only",
    buckets=SLOW,
    registry=REGISTRY,
)
TOKENS: Final = Counter(
    "cowhand_model_tokens_total",
    "Tokens as the endpoint counted them, by kind: input, output, cache_read, cache_creation",
    ("kind",),
    registry=REGISTRY,
)
TOOL_CALLS: Final = Counter(
    "cowhand_tool_calls_total",
    "Tool calls that came to an end, by outcome: ok, error (the tool said so), synthesized (no answer of a hand)",
    ("outcome",),
    registry=REGISTRY,
)
TOOL_SECONDS: Final = Histogram(
    "cowhand_tool_call_seconds",
    "Time of a tool call, waiting for its sandbox included",
    buckets=SLOW,
    registry=REGISTRY,
)

# Broker, gateway and archive.

HTTP_REQUESTS: Final = Counter(
    "cowhand_http_requests_total",
    "Requests that were answered by broker, gateway or archive, by route (its pattern) and status code; a stream"
    " counts when it begins",
    ("route", "code"),
    registry=REGISTRY,
)

# Archive.

ARCHIVE_SEGMENTS: Final = Counter(
    "cowhand_archive_segments_total",
    "Segments of logs, by outcome: written, adopted (another archiver had written it), conflict (the log differs"
    " from what is archived: nothing was taken out of the store)",
    ("outcome",),
    registry=REGISTRY,
)
ARCHIVE_DELETED: Final = Counter(
    "cowhand_archive_deleted_total",
    "Objects that were deleted, by why: session (its policy says so), orphan (a blob that no event refers to)",
    ("why",),
    registry=REGISTRY,
)

# Operator: one leads, the figures of tenants come from that one.

LEADING: Final = Gauge(
    "cowhand_operator_leading", "1 if this replica leads, else 0", registry=REGISTRY
)
TENANT_SESSIONS: Final = Gauge(
    "cowhand_tenant_sessions",
    "Sessions of a tenant in work, by state: ready (nobody has taken them), leased",
    ("namespace", "state"),
    registry=REGISTRY,
)
TENANT_WORKERS: Final = Gauge(
    "cowhand_tenant_workers", "Live harness workers of a tenant", ("namespace",), registry=REGISTRY
)
TENANT_OLDEST_READY: Final = Gauge(
    "cowhand_tenant_oldest_ready_seconds",
    "Age of the oldest session that nobody has taken, 0 if none waits",
    ("namespace",),
    registry=REGISTRY,
)

STORE_MEMORY: Final = Gauge(
    "cowhand_store_memory_bytes",
    "Memory of the store, by kind: used, limit (0: none)",
    ("kind",),
    registry=REGISTRY,
)
TENANT_STORE_BYTES: Final = Gauge(
    "cowhand_tenant_store_bytes",
    "Bytes of all keys of a tenant in the store, as last measured",
    ("namespace",),
    registry=REGISTRY,
)
TENANT_STORE_QUOTA_BYTES: Final = Gauge(
    "cowhand_tenant_store_quota_bytes",
    "Bytes that a tenant may have in the store; 0: no limit",
    ("namespace",),
    registry=REGISTRY,
)


def count_request(resource: str | None, status: int) -> None:
    """Count an answer of broker or gateway; `resource` is the pattern of its route, None if none matched."""
    HTTP_REQUESTS.labels(resource or "none", str(status)).inc()


CATALOGUE: Final[tuple[tuple[str, tuple[MetricWrapperBase, ...]], ...]] = (
    (
        "Every process that uses the store",
        (STORE_SCRIPTS, STORE_SCRIPT_SECONDS, STORE_BARRIER_SECONDS, STORE_PROFILE),
    ),
    (
        "Harness",
        (
            *(
                SESSIONS_HELD,
                CLAIMS,
                TAKEOVERS,
                TIMERS,
                RESCHEDULED,
                GATE_ENTRIES,
                GATE_SHUT,
                SLOT_WAIT_SECONDS,
                PREVIEWS,
                MODEL_REQUESTS,
                MODEL_SECONDS,
                MODEL_TTFT_SECONDS,
            ),
            *(TOKENS, TOOL_CALLS, TOOL_SECONDS),
        ),
    ),
    ("Broker, gateway and archive", (HTTP_REQUESTS,)),
    ("Archive", (ARCHIVE_SEGMENTS, ARCHIVE_DELETED)),
    (
        "Operator",
        (
            *(LEADING, TENANT_SESSIONS, TENANT_WORKERS, TENANT_OLDEST_READY),
            *(STORE_MEMORY, TENANT_STORE_BYTES, TENANT_STORE_QUOTA_BYTES),
        ),
    ),
)
"""Every metric of ours, under the process that counts it; the order is that of docs/metrics.md."""


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "<!-- Generated by `make generate` from operator/src/cowhand/telemetry/metrics.py. DO NOT EDIT. -->",
        "",
        "# Metrics",
        "",
        "Operator, harness, broker, gateway and archive serve their metrics in Prometheus' text format over plain",
        "HTTP, path `/metrics`, container port `metrics` (9090; `COWHAND_METRICS_PORT`, 0 turns it off). Closed to",
        "everybody outside the release's namespace until `metrics.from` opens it; `metrics.podMonitor.enabled` makes a",
        "PodMonitor for the Prometheus operator. Credential proxies serve none. Besides these every process has",
        "`process_*` (CPU, memory, open files).",
    ]
    for process, found in CATALOGUE:
        lines += ["", f"## {process}", "", "| name | type | labels | what |", "|---|---|---|---|"]
        for metric in found:
            (family,) = metric.describe()
            suffix = "_total" if family.type == "counter" else ""
            labels = ", ".join(f"`{name}`" for name in metric._labelnames) or "-"
            lines.append(
                f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |"
            )
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def serving(port: int, host: str = "") -> AsyncIterator[int]:
    """Serve `/metrics` for the length of the block; answers the port (0: none was opened).

    Args:
        port: TCP port, 0 for none.
        host: address to listen on, default all.

    Raises:
        UserError: the port is not to be had.
    """
    if port == 0:
        yield 0
        return
    readers = _Readers()
    try:
        server = await asyncio.start_server(readers.serve, host or None, port, limit=MAX_REQUEST)
    except (OSError, OverflowError) as err:
        raise UserError(
            f"the metrics port {port} cannot be opened ({err}): set COWHAND_METRICS_PORT to a free one, or 0",
            field="METRICS_PORT",
        ) from err
    try:
        LOG.info("metrics", extra={"port": port})
        yield port
    finally:
        server.close()


class _Readers:
    """Answers GET requests one by one; a slow or greedy reader loses its connection."""

    def __init__(self) -> None:
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._open < MAX_READERS:
                self._open += 1
                try:
                    async with asyncio.timeout(REQUEST_SECONDS):
                        writer.write(_answer(await reader.readuntil(b"\r\n\r\n")))
                        await writer.drain()
                finally:
                    self._open -= 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # its loss
        finally:
            writer.close()


def _answer(request: bytes) -> bytes:
    words = request.split(b"\r\n", 1)[0].split(b" ")
    if len(words) == 3 and words[0] == b"GET" and words[1].split(b"?")[0] == b"/metrics":
        status, kind, body = "200 OK", CONTENT_TYPE_LATEST, generate_latest(REGISTRY)
    else:
        status, kind, body = "404 Not Found", "text/plain", b"GET /metrics is all there is\n"
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body
