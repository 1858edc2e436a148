from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowhand.session import rawjson
from cowhand.session.events import NewEvent
from cowhand.session.rawjson import RawObject

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), VALUES), st.sampled_from([None, 2]), st.booleans())
def test_members_are_slices_of_the_text(value: dict[str, Any], indent: int, escaped: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    parts = rawjson.members(text)
    assert {key: json.loads(part) for key, part in parts.items()} == value
    assert list(parts) == list(value)
    assert all(part in text for part in parts.values())
    assert json.loads(rawjson.join(parts)) == value


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES), st.sampled_from([None, 2]))
def test_items_are_slices_of_the_text(value: list[Any], indent: int) -> None:
    text = json.dumps(value, indent=indent)
    assert [json.loads(item) for item in rawjson.items(text)] == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[1]", "{", '{"a"}', '{"a":}', '{"a":1', '{"a":1 "b":2}', "{a:1}", '{"a":NaN}'),
        *(
            '{"a":1,}',
            '{"a":1]',
            '{"a\n":1}',
            '{"a' + chr(1) + '":1}',
            '{"a":1,"b\\q":2}',
            '{,"a":1}',
        ),
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rawjson.members(text)
    with pytest.raises(ValueError):
        RawObject(text.encode())


@pytest.mark.parametrize(
    "text", ["", "{}", "[", "[1", "[1,]", "[1 2]", "[1}", "[,1]", "[Infinity]"]
)
def test_what_is_no_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        list(rawjson.items(text))


def test_names_with_escapes_and_spaces_between() -> None:
    text = ' { "a\\u00e9\\"" : 1 ,\n"" :\t[ 2 ] } '
    assert rawjson.members(text) == {'a\u00e9"': "1", "": "[ 2 ]"}


def test_of_two_members_of_one_name_the_later_counts_as_for_every_reader() -> None:
    assert rawjson.members('{"a":1,"b":2,"a":3}') == {"a": "3", "b": "2"}


ODD = '{"z":1.0,"a":1e5,"n":12345678901234567890123,"e":"\\u00e9\\/é","d":0.10, "k":[ ]}'


def test_a_raw_object_is_written_as_it_came_and_reads_like_a_dict() -> None:
    raw = RawObject(ODD.encode())
    assert raw == json.loads(ODD)
    payload = NewEvent("model.response", {"message": raw, "ttft_ms": 1}).payload()
    assert (
        payload == b'{"v":1,"th":"main","c":"","d":{"message":' + ODD.encode() + b',"ttft_ms":1}}'
    )


def test_control_a_decoded_object_is_not() -> None:
    payload = NewEvent("model.response", {"message": json.loads(ODD)}).payload()
    assert ODD.encode() not in payload
