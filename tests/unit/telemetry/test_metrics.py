"""The catalogue, the port, and who counts."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cowhand.errors import UserError
from cowhand.harness.metering import MeteredModel
from cowhand.harness.model import Response
from cowhand.harness.stream import ModelError
from cowhand.telemetry import metrics
from support.store import free_port

ROOT = Path(__file__).resolve().parents[3]


async def get(port: int, request: bytes = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n") -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer.decode()


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


async def test_the_port_answers_what_prometheus_reads():
    metrics.SESSIONS_HELD.set(3)
    async with metrics.serving(free_port(), "127.0.0.1") as port:
        head, _, body = (await get(port)).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK\r\ncontent-type: text/plain")
        families = {family.name: family for family in text_string_to_metric_families(body)}
        assert families["cowhand_harness_sessions_held"].samples[0].value == 3
        assert "process_resident_memory_bytes" in families
        for other in (b"GET / HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n"):
            assert (await get(port, other)).startswith("HTTP/1.1 404")


async def test_a_reader_that_sends_too_much_is_cut_off():
    async with metrics.serving(free_port(), "127.0.0.1") as port:
        answer = ""
        with contextlib.suppress(ConnectionError):  # a reset, unless the end comes first
            answer = await get(port, b"x" * (metrics.MAX_REQUEST * 8))
        assert answer == ""
        assert "cowhand_" in await get(port)


async def test_a_reader_that_says_nothing_loses_its_connection(monkeypatch):
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 0.01)
    async with metrics.serving(free_port(), "127.0.0.1") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()


async def test_readers_beyond_the_limit_are_turned_away(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_READERS", 1)
    async with metrics.serving(free_port(), "127.0.0.1") as port:
        _, waiting = await asyncio.open_connection("127.0.0.1", port)
        waiting.write(b"GET")
        await waiting.drain()
        reader, second = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        for writer in (waiting, second):
            writer.close()


async def test_no_port_is_opened_for_0_and_a_taken_one_is_an_error_that_says_what_to_do():
    async with metrics.serving(0) as port:
        assert port == 0
    async with metrics.serving(free_port(), "127.0.0.1") as port:
        with pytest.raises(UserError, match="COWHAND_METRICS_PORT"):
            async with metrics.serving(port, "127.0.0.1"):
                pass


def test_the_catalogue_is_complete_and_its_names_follow_the_rules():
    listed = {id(metric) for _, found in metrics.CATALOGUE for metric in found}
    made = {
        id(item) for item in vars(metrics).values() if isinstance(item, metrics.MetricWrapperBase)
    }
    assert listed == made
    for _, found in metrics.CATALOGUE:
        for metric in found:
            (family,) = metric.describe()
            assert re.fullmatch(r"cowhand_[a-z_]+", family.name)
            if family.type == "histogram":
                assert family.name.endswith("_seconds")


def test_the_page_names_every_metric():
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == metrics.document()
    assert "`cowhand_store_scripts_total` | counter | `script`, `outcome`" in page


class OneAnswer:
    def __init__(self, answer: Response | Exception) -> None:
        self.answer = answer

    async def stream(self, body, *, session_id, lease, on_text, on_start, betas):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def ask(answer: Response | Exception) -> None:
    model = MeteredModel(OneAnswer(answer))
    await model.stream(b"{}", session_id="s", lease="l", on_text=lambda *_: None)


async def test_model_requests_and_tokens_are_counted():
    ok = value("cowhand_model_requests_total", outcome="ok")
    read = value("cowhand_model_tokens_total", kind="cache_read")
    usage = {"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": "many"}
    await ask(Response({"usage": usage}, "r", 10, 20))
    await ask(Response({"usage": None}, "r", 10, 20))
    assert value("cowhand_model_requests_total", outcome="ok") == ok + 2
    assert value("cowhand_model_tokens_total", kind="cache_read") == read + 7


async def test_an_invented_error_type_does_not_become_a_label():
    before = value("cowhand_model_requests_total", outcome="other")
    for kind in ("surprise_1", "surprise_2"):
        with pytest.raises(ModelError):
            await ask(ModelError(kind, "x"))
    with pytest.raises(ModelError):
        await ask(ModelError("rate_limit_error", "x"))
    assert value("cowhand_model_requests_total", outcome="other") == before + 2
    assert value("cowhand_model_requests_total", outcome="surprise_1") == 0
