"""The journal: what a new process knows of the calls of the old one, and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandboxd import journal as journal_module
from sandboxd.journal import DROPPED, RESTARTED, Journal


def result(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "is_error": False,
        "exit_code": 0,
        "truncated": False,
        "duration_ms": 1,
    }


def ended(journal: Journal, call_id: str, content: str = "out") -> None:
    journal.begin(call_id, "digest", durable=True)
    journal.finish(call_id, result(content))


def test_results_are_found_again(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    ended(first, "a", 'line\n"quoted" \0 é \udcff')
    first.close()
    second = Journal(tmp_path)
    assert second.digest("a") == "digest"
    found = second.result("a")
    assert found is not None
    assert found["content"].startswith('line\n"quoted" \0 é ')
    assert second.digest("b") is None
    assert second.result("b") is None
    second.close()


def test_running_call_of_a_dead_process(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.begin("a", "digest", durable=True)
    assert first.result("a") is None
    first.close()
    for _ in range(2):  # and it stays so
        journal = Journal(tmp_path)
        found = journal.result("a")
        assert found is not None
        assert (found["content"], found["is_error"]) == (RESTARTED, True)
        journal.close()


@pytest.mark.parametrize(
    "junk", [b'{"t":"done","id":"a","dig', b"\xff\xfe\n", b"[]\n", b'{"t":"call"}\n', b"null\n"]
)
def test_damaged_lines_are_skipped(tmp_path: Path, junk: bytes) -> None:
    first = Journal(tmp_path)
    ended(first, "a")
    first.close()
    file = max(tmp_path.glob("journal-*"))
    file.write_bytes(file.read_bytes() + junk)
    second = Journal(tmp_path)
    ended(second, "b")
    assert second.result("a") == result("out")
    assert second.result("b") == result("out")
    second.close()


def test_size_is_bounded_and_dropped_calls_stay_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=10_000, segments=3)
    journal.begin("running", "digest", durable=True)
    for i in range(100):
        ended(journal, f"call-{i}", "x" * 1000)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 60_000
    assert journal.result("call-99") == result("x" * 1000)
    old = journal.result("call-0")
    assert old is not None
    assert old["content"] == DROPPED
    assert journal.digest("call-0") == "digest"
    journal.close()
    again = Journal(tmp_path, segment_bytes=10_000, segments=3)
    assert again.digest("call-0") == "digest"
    found = again.result("running")
    assert found is not None
    assert found["content"] == RESTARTED
    again.close()


def test_forgotten_ids_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "FORGOTTEN", 5)
    journal = Journal(tmp_path, segment_bytes=500, segments=2)
    for i in range(60):
        ended(journal, f"call-{i}", "x" * 200)
    assert journal.digest("call-0") is None
    assert journal.digest("call-56") == "digest"
    journal.close()


def test_result_damaged_behind_our_back_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ended(journal, "a", "secret")
    file = max(tmp_path.glob("journal-*"))
    file.write_bytes(b"x" * file.stat().st_size)
    found = journal.result("a")
    assert found is not None
    assert found["is_error"]
    assert "damaged" in found["content"]
    journal.close()
