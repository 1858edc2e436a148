"""A real sandboxd as a process, and its client. Used by the tests of sandboxd and of the model server."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "sandbox-image" / "src"
_numbers = itertools.count(1)


class Sandboxd:
    """One sandboxd on a free port; `start` again after `kill` keeps its state directory."""

    def __init__(self, directory: Path) -> None:
        self.workdir = directory / "workspace"
        self.state = directory / "state"
        self.workdir.mkdir(parents=True)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **env: str) -> Sandboxd:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sandboxd"],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(SOURCE),
                "PYTHONSAFEPATH": "1",
                "SANDBOXD_PORT": "0",
                "SANDBOXD_WORKDIR": str(self.workdir),
                "SANDBOXD_STATE": str(self.state),
                **env,
            },
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], 30)[0], "sandboxd did not start"
        line = self.process.stderr.readline().decode()
        assert "serving on" in line, line
        self.port = int(line.split("127.0.0.1:")[1].split(",")[0])
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None
        return code

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=50)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def execute(
        self, name: str, given: dict[str, Any], timeout_ms: int = 30_000, call_id: str = ""
    ) -> dict[str, Any]:
        """The result of a call, with an id of its own if none is given."""
        call_id = call_id or f"sesn_test/toolu_{next(_numbers)}"
        body = {"call_id": call_id, "name": name, "input": given, "timeout_ms": timeout_ms}
        status, answer = self.request("POST", "/v1/execute", body)
        assert status == 200, answer
        result: dict[str, Any] = answer["result"]
        return result

    def bash(self, command: str, timeout_ms: int = 30_000) -> dict[str, Any]:
        return self.execute("bash", {"command": command}, timeout_ms)

    def memory_kib(self, field: str = "VmHWM") -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(x for x in status.splitlines() if x.startswith(field)).split()[1])
