"""Tokens, records and keys: what is accepted, and everything that is not."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowhand.errors import Denied, Unauthenticated, UserError
from cowhand.session.log import HandRecord
from cowhand.wire.keys import SigningKey, b64url_decode, b64url_encode, dump_keys, load_keys
from cowhand.wire.records import UnknownRecordKey, sign_record, verify_record
from cowhand.wire.tokens import HandClaims, UnknownKey, sign, verify

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
KEYS = {KEY.kid: KEY.public}
NOW = 1_800_000_000
CLAIMS = HandClaims("sbx-1", "sesn_" + "0" * 32, 1, 7, NOW, NOW + 300)


def forge(payload: dict[str, Any], header: dict[str, Any] | None = None, key: Any = KEY) -> str:
    """A token that is signed rightly but says what the test wants."""
    head = {"alg": "EdDSA", "kid": KEY.kid} if header is None else header
    signed = ".".join(b64url_encode(json.dumps(p).encode()) for p in (head, payload))
    return f"{signed}.{b64url_encode(key.private.sign(signed.encode()))}"


def payload(**changes: Any) -> dict[str, Any]:
    body = {
        "aud": "cowhand-hand",
        "sbx": "sbx-1",
        "ses": CLAIMS.session_id,
        "own": 1,
        "epo": 7,
        "typ": "hand",
        "act": "",
        "iat": NOW,
        "exp": NOW + 300,
    }
    body.update(changes)
    return {k: v for k, v in body.items() if v is not ...}


def test_a_signed_token_says_what_was_signed() -> None:
    assert verify(sign(CLAIMS, KEY), KEYS, NOW) == CLAIMS
    assert verify(forge(payload()), KEYS, NOW) == CLAIMS


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "cowhand-broker"},
        {"aud": ["cowhand-hand"]},
        {"aud": ...},
        {"sbx": ""},
        {"sbx": 5},
        {"ses": ""},
        {"ses": "x" * 513},
        {"own": "1"},
        {"own": True},
        {"own": -1},
        {"own": 1.0},
        {"epo": None},
        {"epo": 2**53},
        {"typ": "admin"},
        {"act": None},
        {"exp": NOW + 301},
        {"exp": NOW},
        {"exp": NOW - 1},
        {"iat": float(NOW)},
        {"iat": NOW - 1},
        {"iat": ..., "nbf": NOW},
        {"extra": 1},
    ],
    ids=str,
)
def test_wrong_claims_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        verify(forge(payload(**changes)), KEYS, NOW)


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none", "kid": KEY.kid},
        {"alg": "HS256", "kid": KEY.kid},
        {"alg": "EdDSA"},
        {"alg": "EdDSA", "kid": 3},
        {"alg": "EdDSA", "kid": KEY.kid, "jwk": {}},
        {"alg": "EdDSA", "kid": KEY.kid, "crit": []},
        {"alg": "eddsa", "kid": KEY.kid},
        [],
    ],
    ids=range(8),
)
def test_a_header_may_only_name_the_key(header: Any) -> None:
    with pytest.raises(Unauthenticated):
        verify(forge(payload(), header), KEYS, NOW)


@pytest.mark.parametrize(
    ("now", "fits"),
    [
        (NOW - 6, False),
        (NOW - 5, True),
        (NOW + 299, True),
        (NOW + 304, True),
        (NOW + 305, False),
        (NOW + 3600, False),
    ],
)
def test_times_have_five_seconds_of_leeway(now: int, fits: bool) -> None:
    if fits:
        assert verify(sign(CLAIMS, KEY), KEYS, now) == CLAIMS
    else:
        with pytest.raises(Unauthenticated):
            verify(sign(CLAIMS, KEY), KEYS, now)


def test_another_key_is_refused_and_an_unknown_one_named() -> None:
    with pytest.raises(Unauthenticated, match="signature"):
        verify(forge(payload(), key=OTHER), KEYS, NOW)
    with pytest.raises(UnknownKey) as caught:
        verify(sign(CLAIMS, OTHER), KEYS, NOW)
    assert caught.value.kid == OTHER.kid


def test_a_name_that_stands_twice_is_refused() -> None:
    body = json.dumps(payload())[:-1] + ', "sbx": "sbx-2"}'
    head = b64url_encode(json.dumps({"alg": "EdDSA", "kid": KEY.kid}).encode())
    signed = f"{head}.{b64url_encode(body.encode())}"
    token = f"{signed}.{b64url_encode(KEY.private.sign(signed.encode()))}"
    with pytest.raises(Unauthenticated):
        verify(token, KEYS, NOW)


@given(position=st.integers(min_value=0), character=st.characters())
def test_no_other_token_passes(position: int, character: str) -> None:
    token = sign(CLAIMS, KEY)
    at = position % len(token)
    changed = token[:at] + character + token[at + 1 :]
    if changed != token:
        with pytest.raises(Unauthenticated):
            verify(changed, KEYS, NOW)


@given(st.text(max_size=200))
def test_any_text_is_refused_with_our_error(text: str) -> None:
    with pytest.raises(Unauthenticated):
        verify(text, KEYS, NOW)
    with pytest.raises(Unauthenticated):
        verify("x" * 5000, KEYS, NOW)


def test_sign_refuses_what_verify_would_refuse() -> None:
    with pytest.raises(ValueError):
        sign(dataclasses.replace(CLAIMS, expires_at=NOW + 301), KEY)


@given(st.binary(max_size=50))
def test_base64url_round_trip(raw: bytes) -> None:
    assert b64url_decode(b64url_encode(raw)) == raw


@pytest.mark.parametrize("text", ["YQ==", "YR", "Y", "a+b/", "é", "Y Q", "YQ\n"])
def test_base64url_refuses_second_spellings(text: str) -> None:
    with pytest.raises(ValueError):
        b64url_decode(text)


RECORD = HandRecord(
    session_id=CLAIMS.session_id,
    hand="main",
    instance=1,
    state="Ready",
    sandbox="s",
    sandbox_uid="sbx-1",
    pod_uid="pod-1",
    address="10.0.0.5:8443",
    cert_sha256="ab" * 32,
    owner=CLAIMS.session_id,
    owner_epoch=1,
)


def test_a_signed_record_is_accepted_as_dataclass_and_as_mapping() -> None:
    signed = dataclasses.replace(RECORD, signature=sign_record(RECORD, KEY, namespace="team"))
    verify_record(signed, KEYS, namespace="team")
    verify_record(dataclasses.asdict(signed), KEYS, namespace="team")


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(HandRecord) if f.name != "signature"]
)
def test_every_field_of_a_record_is_signed(field: str) -> None:
    signature = sign_record(RECORD, KEY, namespace="team")
    value = getattr(RECORD, field)
    change: dict[str, Any] = {field: value + (1 if isinstance(value, int) else "x")}
    with pytest.raises(Denied):
        verify_record(
            dataclasses.replace(RECORD, signature=signature, **change), KEYS, namespace="team"
        )


def test_a_record_is_worth_nothing_in_another_namespace_or_with_another_key() -> None:
    signed = dataclasses.replace(RECORD, signature=sign_record(RECORD, KEY, namespace="team"))
    with pytest.raises(Denied):
        verify_record(signed, KEYS, namespace="other")
    with pytest.raises(UnknownRecordKey):
        verify_record(signed, {OTHER.kid: OTHER.public}, namespace="team")
    with pytest.raises(Denied):
        verify_record(signed, {KEY.kid: OTHER.public}, namespace="team")
    for signature in ("", KEY.kid, f"{KEY.kid}.", f"{KEY.kid}.AAAA"):
        bad = dataclasses.replace(RECORD, signature=signature)
        with pytest.raises(Denied):
            verify_record(bad, KEYS, namespace="team")


def test_key_documents_round_trip_and_foreign_algorithms_are_skipped() -> None:
    document = dump_keys([KEY.public, OTHER.public])
    document["keys"].append({"kid": "x", "alg": "ES256", "public": "?"})
    loaded = load_keys(json.loads(json.dumps(document)))
    assert set(loaded) == {KEY.kid, OTHER.kid}
    assert verify(sign(CLAIMS, KEY), loaded, NOW) == CLAIMS


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"keys": 3},
        {"keys": [{"kid": KEY.kid}]},
        {"keys": [{"kid": KEY.kid, "alg": "EdDSA", "public": "AAAA"}]},
        {"keys": [{**dump_keys([OTHER.public])["keys"][0], "kid": KEY.kid}]},
        {"keys": [{"kid": KEY.kid, "alg": "EdDSA", "public": 7}]},
    ],
    ids=range(8),
)
def test_bad_key_documents_are_refused(document: Any) -> None:
    with pytest.raises(UserError):
        load_keys(document)


def test_a_private_key_is_not_shown() -> None:
    raw = KEY.private.private_bytes_raw()
    assert base64.b64encode(raw).decode() not in repr(KEY)
    assert "private" not in repr(KEY)
