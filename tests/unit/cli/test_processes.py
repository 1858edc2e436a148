"""Process commands: dispatch, exit codes, clean SIGTERM, and what each process imports."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import types

import pytest

from cowhand import __version__
from cowhand.cli import processes
from cowhand.cli.main import main
from cowhand.errors import StoreUnavailable, UserError

HEAVY = {"pydantic", "kopf", "kubernetes", "redis", "anthropic", "aiohttp"}


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.split(".")[0] for name in done.stderr.split()}


def test_starting_the_proxy_loads_nothing_heavy():
    code = (
        "from cowhand.cli.main import main\n"
        "try: main(['proxy', '--help'])\n"
        "except SystemExit: pass\n"
    )
    assert not loaded_by(code) & HEAVY


@pytest.mark.skipif(
    importlib.util.find_spec("cowhand.proxy.run") is None, reason="the proxy has no run module"
)
def test_the_proxy_process_loads_nothing_heavy():
    assert not loaded_by("import cowhand.cli.main, cowhand.proxy.run, cowhand.proxy.egress") & HEAVY


def test_the_import_probe_sees_a_heavy_import():
    assert "aiohttp" in loaded_by("import cowhand.cli.main, aiohttp")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cowhand {__version__}\n"


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "cowhand", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"cowhand {__version__}\n")


def test_missing_setting_is_a_message_and_exit_2(capsys, monkeypatch):
    monkeypatch.delenv("COWHAND_STORE_URL", raising=False)
    assert main(["gateway"]) == 2
    assert "COWHAND_STORE_URL must be set" in capsys.readouterr().err


def fake_process(monkeypatch, run, name="gateway"):
    module = types.ModuleType("cowhand.fake.run")
    module.run = run
    monkeypatch.setitem(sys.modules, "cowhand.fake", types.ModuleType("cowhand.fake"))
    monkeypatch.setitem(sys.modules, "cowhand.fake.run", module)
    monkeypatch.setitem(
        processes.PROCESSES, name, processes.Process("fake", lambda: "settings", "help")
    )


def test_a_process_gets_its_settings(monkeypatch):
    seen = []

    async def run(settings):
        seen.append(settings)

    fake_process(monkeypatch, run)
    assert main(["gateway"]) == 0
    assert seen == ["settings"]


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("bad value"), 2), (StoreUnavailable("store down"), 1)]
)
def test_errors_of_a_process_end_with_their_message(monkeypatch, capsys, error, code):
    async def run(settings):
        raise error

    fake_process(monkeypatch, run)
    assert main(["gateway"]) == code
    assert capsys.readouterr().err == f"cowhand: {error}\n"


def test_sigterm_ends_a_process_cleanly_and_runs_its_cleanup(monkeypatch):
    cleaned = []

    async def run(settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    fake_process(monkeypatch, run)
    assert main(["gateway"]) == 0
    assert cleaned == [True]


def test_egress_commands_pass_their_exit_code(monkeypatch):
    module = types.ModuleType("cowhand.proxy.egress")
    module.run_rules = lambda: 0
    module.run_verify = lambda: 3
    monkeypatch.setitem(sys.modules, "cowhand.proxy.egress", module)
    assert main(["egress-rules"]) == 0
    assert main(["egress-verify"]) == 3
