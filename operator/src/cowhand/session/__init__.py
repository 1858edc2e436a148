"""The session log: events, interfaces and the implementation on Redis Streams (the only importer of `redis`).

```python
async with session.connect(config, namespace="default") as store:
    log = store.session_log()               # SessionLog: gateway, operator, harness
    worker = store.worker_log(pod_uid)      # WorkerLog: harness
    control = store.control_log()           # ControlLog: operator, broker
    archive = store.archive_log()           # ArchiveLog: archive
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowhand.session.blobs import Archive
    from cowhand.session.identity import IdentityKeeper
    from cowhand.session.log import StoreConfig
    from cowhand.session.store import Store


def connect(
    config: StoreConfig,
    *,
    namespace: str = "",
    archive: Archive | None = None,
    keeper: IdentityKeeper | None = None,
) -> Store:
    """A process's access to the store; nothing is opened before the first call (or `await store.check()`).

    Args:
        config: how to reach the store.
        namespace: tenant of `session_log()` and `worker_log()` unless they name one.
        archive: where large payloads and old events are; None: payloads stand inline, and what was archived
            cannot be read.
        keeper: remembers which store it must be; None: the first one that answers is the right one.

    Raises:
        UserError: the URL is not valid.
    """
    # Here, not above: whoever needs only the types of this package does not load the store's client.
    from cowhand.session.store import Store

    return Store(config, namespace, archive=archive, keeper=keeper)
