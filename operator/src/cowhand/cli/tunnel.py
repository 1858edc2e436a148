"""`kubectl port-forward` to the gateway's Service, on a random port of loopback, for the life of a command."""

from __future__ import annotations

import contextlib
import re
import selectors
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, Final

from cowhand.cli.kubectl import Kubectl
from cowhand.errors import Retryable

WAIT_S: Final = 20.0
_FORWARDING: Final = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) -> ")


class TunnelFailed(Retryable):
    """The port-forward did not come up, or broke."""


@contextlib.contextmanager
def port_forward(kubectl: Kubectl, namespace: str, target: str, port: int) -> Iterator[int]:
    """Forward a random local port; yields it. The subprocess ends with the block.

    Args:
        kubectl: with the user's flags.
        namespace: of the target.
        target: for example `svc/cowhand-gateway`.
        port: port of the target.

    Raises:
        TunnelFailed: it is not up within 20 s; the text is what kubectl wrote.
    """
    command = kubectl.command(
        "port-forward", "--address=127.0.0.1", target, f":{port}", namespace=namespace
    )
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        try:
            local = _await_port(process.stdout, f"{target} in namespace {namespace}")
        except TunnelFailed:
            process.stdout.close()
            raise
        # kubectl writes a line for each connection: a pipe that nobody reads would stop it one day.
        threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
        yield local
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _drain(output: IO[bytes]) -> None:
    with output:
        while output.read1(4096):  # type: ignore[attr-defined]
            pass


def _await_port(output: IO[bytes], what: str) -> int:
    deadline = time.monotonic() + WAIT_S
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            part = output.read1(4096)  # type: ignore[attr-defined]
            if not part:
                break
            said += part
            if match := _FORWARDING.search(said):
                return int(match[1])
    text = said.decode(errors="replace").strip()
    why = text or f"no answer within {WAIT_S:.0f} s"
    raise TunnelFailed(
        f"cannot reach {what}: {why}\nIs Cowhand installed? `cowhand doctor` checks."
    )
