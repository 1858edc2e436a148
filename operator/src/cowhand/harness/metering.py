"""Counts model requests and tokens: a `Model` around the one that asks, put there by `run`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cowhand.harness.model import Model, OnStart, OnText, Response, nothing
from cowhand.harness.stream import ModelError
from cowhand.telemetry import metrics

_OUTCOMES: Final[Mapping[str, str]] = {
    "rate_limit_error": "rate_limit",
    "overloaded_error": "overloaded",
    "proxy_refused": "refused",
    "proxy_unavailable": "refused",
    "invalid_request_error": "invalid",
    "request_too_large": "invalid",
    "connection_error": "unreachable",
    "stream_cut": "unreachable",
    "timeout_error": "unreachable",
}
"""Error type -> label; an endpoint can invent types, and a label must not be invented."""

_TOKENS: Final[Mapping[str, str]] = {
    "input_tokens": "input",
    "output_tokens": "output",
    "cache_read_input_tokens": "cache_read",
    "cache_creation_input_tokens": "cache_creation",
}


def kind(error_type: str) -> str:
    """The label of an error type."""
    return _OUTCOMES.get(error_type, "other")


class MeteredModel:
    """See `model.Model`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def stream(
        self,
        body: bytes,
        *,
        session_id: str,
        lease: str,
        on_text: OnText,
        on_start: OnStart = nothing,
        betas: Sequence[str] = (),
    ) -> Response:
        """As the model inside."""
        outcome = "other"
        answer = self._model.stream(
            body,
            session_id=session_id,
            lease=lease,
            on_text=on_text,
            on_start=on_start,
            betas=betas,
        )
        del body  # as in the model inside: nobody keeps a request that was sent
        try:
            response = await answer
            outcome = "ok"
        except ModelError as err:
            outcome = kind(err.type)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            metrics.MODEL_REQUESTS.labels(outcome).inc()
        metrics.MODEL_SECONDS.observe(response.duration_ms / 1000)
        metrics.MODEL_TTFT_SECONDS.observe(response.ttft_ms / 1000)
        _count_tokens(response.message.get("usage"))
        return response


def _count_tokens(usage: Any) -> None:
    for field, kind in _TOKENS.items():
        count = usage.get(field) if isinstance(usage, Mapping) else None
        if type(count) is int and count > 0:
            metrics.TOKENS.labels(kind).inc(count)
