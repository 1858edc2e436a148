"""The model server in the test's own event loop. Import it only where `model_server` is on the path."""

from __future__ import annotations

from typing import Any

import anthropic
from aiohttp import ClientSession, web

from model_server.app import ModelServer
from model_server.settings import Settings

KEY = "test-key"
TOOLS: list[Any] = [
    {"name": name, "description": name, "input_schema": {"type": "object"}}
    for name in ("bash", "read", "write", "edit", "glob", "grep")
]


class ModelRig:
    """A running model server, the SDK's client for it, and its control API."""

    def __init__(self, **settings: Any) -> None:
        self.server = ModelServer(Settings(**{"api_key": KEY, "delta_ms": 0, **settings}))
        self.url = ""

    async def __aenter__(self) -> ModelRig:
        self._runner = web.AppRunner(self.server.app, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.client = anthropic.AsyncAnthropic(base_url=self.url, api_key=KEY, max_retries=0)
        self.http = ClientSession(
            self.url, headers={"x-api-key": KEY, "anthropic-version": "2023-06-01"}
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()
        await self.http.close()
        await self._runner.cleanup()

    async def script(self, name: str, *turns: dict[str, Any]) -> None:
        """Put a script."""
        answer = await self.http.put(f"/_control/scripts/{name}", json={"turns": list(turns)})
        assert answer.status == 200, await answer.text()

    async def control(self, method: str, path: str) -> Any:
        """One control request."""
        async with self.http.request(method, f"/_control{path}") as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    def stream(self, text: str | list[Any], session: str = "sesn_1", **more: Any) -> Any:
        """`client.messages.stream` for a message or a list of messages."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self.client.messages.stream(
            model="claude-x",
            max_tokens=1000,
            messages=messages,
            metadata={"user_id": session},
            **more,
        )

    async def answer(self, text: str | list[Any], session: str = "sesn_1", **more: Any) -> Any:
        """The final message of a stream."""
        async with self.stream(text, session, **more) as stream:
            return await stream.get_final_message()
