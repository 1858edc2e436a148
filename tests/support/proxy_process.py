"""The proxy of a harness pod as a process of its own, with the stub broker in it: something that can be killed.

python -m support.proxy_process PORT KEY MODEL_URL        # KEY: hex of the broker's private key
"""

from __future__ import annotations

import asyncio
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cowhand.proxy import harness as harness_proxy
from cowhand.proxy.server import Server
from cowhand.wire.keys import SigningKey
from support.harness_stack import StubBroker


async def main(port: int, key: str, model_url: str) -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key))
    broker = StubBroker(SigningKey.of(private), model_url=model_url)
    proxy = harness_proxy.HarnessProxy(broker)  # type: ignore[arg-type]
    await Server(proxy.app, harness_proxy.render).start("127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.stdin.readline()
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
