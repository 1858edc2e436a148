"""One cluster and one install serve all e2e tests; each test makes its own sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Rig


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Delete the sessions that a test made; on failure print their logs first."""
    if "rig" not in request.fixturenames:
        yield
        return
    rig: Rig = request.getfixturevalue("rig")
    made = []
    make = rig.session

    def session(*args: object, **kwargs: object) -> object:
        new = make(*args, **kwargs)  # type: ignore[arg-type]
        made.append(new)
        return new

    rig.session = session  # type: ignore[method-assign,assignment]
    yield
    rig.session = make  # type: ignore[method-assign]
    failed = getattr(request.node, "failed", False)
    for one in made:
        if failed:
            print(f"--- {one.name}")
            print(rig.cowhand("-n", one.namespace, "events", one.name, check=False))
            print(
                rig.cluster.kubectl(
                    "-n", one.namespace, "describe", "agentsession", one.name, check=False
                )
            )
        rig.delete(one)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.when == "call" and report.failed:
        item.failed = True  # type: ignore[attr-defined]
    return report
