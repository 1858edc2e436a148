"""Random histories against the reference model on every installed server, and the same without each defence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from cowhand.session import link as link_module
from cowhand.session import scripts as lua
from cowhand.session import worker as worker_module
from support import store
from support.log_machine import LogMachine, World

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(worker_module, "ORPHAN_MS", 0)
    monkeypatch.setattr(worker_module, "BEAT_TTL_MS", 600_000)  # Only the machine kills workers.


@pytest.fixture(scope="module", params=sorted(store.installed()) or [""])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    server = store.Store(store.installed().get(request.param)).start()
    yield server.url
    server.stop()


def histories(
    url: str, scripts: dict[str, lua.Script], *, count: int, steps: int, shrink: bool
) -> None:
    world = World(url, scripts)
    machine = type("Machine", (LogMachine,), {"world": world})
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=count, stateful_step_count=steps, phases=phases, **SETTINGS
            ),
        )
    finally:
        world.close()


def without(script: str, line: str, put: str = "") -> dict[str, lua.Script]:
    """The scripts with one line taken out of one of them."""
    scripts = lua.load()
    source = scripts[script].source
    assert source.count(line) == 1, f"{script}.lua does not hold {line!r} once"
    scripts[script] = lua.Script(script, source.replace(line, put))
    return scripts


def test_histories_keep_every_promise(url: str) -> None:
    histories(url, lua.load(), count=60, steps=50, shrink=True)


CONTROLS: dict[str, Callable[[], dict[str, lua.Script]]] = {
    "fence of append": lambda: without(
        "append", "if m[2] ~= lease then return {'FENCED', m[2]} end\n"
    ),
    "dedupe of append": lambda: without(
        "append",
        "if wseq == last then return {'DUP', tonumber(m[4])} end\nif wseq ~= last + 1 then return {'GAP', last} end\n",
    ),
    "suspension in append": lambda: without("append", "then return {'NOTRUNNING'} end", "then end"),
    "dedupe of ingest": lambda: without(
        "ingest", "if dup then return {'DUP', tonumber(dup)} end\n"
    ),
    "check of park": lambda: without(
        "park", "if m[3] ~= ARGV[4] then return {'NEW', tonumber(m[3])} end\n"
    ),
    "fence of park": lambda: without(
        "park", "if m[2] ~= ARGV[3] then return {'FENCED', m[2]} end\n"
    ),
    "repeatable park": lambda: without(
        "park", "if m[5] == ARGV[3] then return {'OK', tonumber(m[3])} end\n"
    ),
    "suspension in claim": lambda: without(
        "claim", "if mode == 'suspended' then return {'SUSPENDED'} end\n"
    ),
    "repeatable claim": lambda: without(
        "claim", "  return {'OK', lease, tonumber(epoch), tonumber(nxt)}\n"
    ),
    "live holder in claim": lambda: without("claim", "  return {'HELD', lease}\n"),
    "ready entry of a dead worker": lambda: without(
        "claim", "if not beat or tonumber(beat) <= now then return {'DEADWORKER'} end\n"
    ),
    "ready entry of ingest": lambda: without(
        "ingest", "then enqueue(META, READY) end\n", "then end\n"
    ),
    "dirty set of ingest": lambda: without("ingest", "mark(lease)\n"),
    "resume makes ready": lambda: without(
        "set_mode",
        "tonumber(m[5]) >= tonumber(m[6]) then enqueue(META, READY) end\n",
        "false then end\n",
    ),
    "requeue of the dead": lambda: without("requeue", "\nenqueue(META, READY)\n", "\n"),
}


@pytest.mark.parametrize("defence", CONTROLS)
def test_histories_find_a_missing_defence(store_url: str, defence: str) -> None:
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        histories(store_url, CONTROLS[defence](), count=1500, steps=50, shrink=False)
