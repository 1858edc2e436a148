"""The file of an export: what goes in comes out byte for byte, and a file that is not whole is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowhand.session.events import Event
from cowhand.session.export import Export, ExportDamaged, Header, decode, encode
from cowhand.session.log import SessionMeta

SID = "sesn_" + "a" * 32
META = SessionMeta(SID, "team", "one", "u", {"base_url": "http://m", "secret": None}, "ab")


def made(*payloads: bytes) -> Export:
    events = tuple(
        Event(seq, "user.message", f"e{seq}", 7 + seq, "1:w:n" if seq % 2 else "", payload)
        for seq, payload in enumerate(payloads, 1)
    )
    header = Header(META, "idle", "running", len(events), 5, 9, 3, {"turns": 1}, {"max_tokens": 2})
    return Export(header, events)


def lines(export: Export) -> list[bytes]:
    return encode(export).splitlines(keepends=True)


PAYLOADS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=20).map(
            lambda text: json.dumps({"d": text}, ensure_ascii=False).encode(
                "utf-8", "surrogatepass"
            )
        ),
        st.sampled_from([b"", b'{"v":1.0, "x":\n1e5}', b"\xff\x00", "\u2028".encode()]),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(PAYLOADS)
def test_what_goes_in_comes_out(payloads: list[bytes]) -> None:
    export = made(*payloads)
    raw = encode(export)
    assert decode(raw.splitlines(keepends=True)) == export
    assert raw.count(b"\n") == len(payloads) + 2
    raw.decode("ascii")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_torn_file_is_noticed(cut: int) -> None:
    whole = lines(made(b"{}", b"{}"))
    with pytest.raises(ExportDamaged, match=r"footer.*export the session again"):
        decode(whole[:-cut])


def test_a_line_that_is_cut_is_named() -> None:
    whole = lines(made(b"{}", b"{}"))
    with pytest.raises(ExportDamaged, match="line 3 of the export"):
        decode([*whole[:2], whole[2][:-9]])


def test_an_edit_is_noticed() -> None:
    whole = lines(made(b'{"x":1}', b"{}"))
    edited = [whole[0], whole[1].replace(b"1}", b"2}"), *whole[2:]]
    assert edited != whole
    with pytest.raises(ExportDamaged, match="SHA-256"):
        decode(edited)
    with pytest.raises(ExportDamaged, match="has 1"):
        decode([whole[0], whole[1], whole[3]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: [b'{"seq":1}\n', *rows[1:]], "not an export of a session"),
        (lambda rows: [rows[0].replace(b'export":1', b'export":2'), *rows[1:]], "format 2"),
        (lambda rows: [rows[0].replace(b'"idle"', b'"asleep"'), *rows[1:]], "not a header"),
        (lambda rows: [rows[0], b'{"seq":"x"}\n', *rows[2:]], "line 2 .*not an event"),
        (lambda rows: [*rows, rows[1]], "behind the end"),
        (lambda rows: [rows[0], b'{"error":{"message":"store gone"}}\n'], "store gone"),
        (lambda rows: [], "ends after line 0"),
        (lambda rows: [b"\n", *rows], "line 1"),
    ],
)
def test_what_is_not_an_export_is_refused_with_the_reason(change, text) -> None:
    with pytest.raises(ExportDamaged, match=text):
        decode(change(lines(made(b"{}", b"{}"))))
