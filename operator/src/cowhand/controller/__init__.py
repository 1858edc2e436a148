"""The operator process: kopf handlers, keyed queue, leader election and wiring; the only importer of `kopf`."""

import sys


def _import_kopf() -> None:
    """Import kopf without the official client, which is optional there and costs the process 10 MiB and more.

    kopf wants no more of it than the classes of objects and credentials; we hand it dicts, and log in by its own
    functions (`handlers.registry`). None in `sys.modules` makes an import fail as if the package were not installed.
    """
    absent = "kubernetes" not in sys.modules
    if absent:
        sys.modules["kubernetes"] = None  # type: ignore[assignment]
    try:
        import kopf  # noqa: F401
    finally:
        if absent:
            del sys.modules["kubernetes"]


_import_kopf()
