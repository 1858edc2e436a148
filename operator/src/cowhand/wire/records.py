"""Signatures over hand records: the broker signs what it checked, the harness checks before it dials.

A tenant's harness can write the tenant's keys in the store, so the store's word for "this address
with this certificate is sandbox X" is not enough. The record type itself stands in
`cowhand.session.log`, above this layer: here a record is any mapping or dataclass with its fields.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature

from cowhand.errors import Denied
from cowhand.wire.keys import PublicKeys, SigningKey, b64url_decode, b64url_encode

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = Mapping[str, Any] | DataclassInstance

_DOMAIN: Final = b"cowhand-hand-record/1\n"


class UnknownRecordKey(Denied):
    """The record is signed with a key that the caller does not have: fetch the broker's keys again.

    Attributes:
        kid: the key id that the signature names.
    """

    def __init__(self, kid: str) -> None:
        super().__init__(f"The hand record is signed with the unknown key {kid!r}.")
        self.kid = kid


def canonical_record(record: Record, namespace: str) -> bytes:
    """The bytes that are signed: domain line, then `{"namespace", "record"}` without `signature`.

    JSON with sorted keys, no white space, UTF-8. The namespace is part of it, so that a record
    copied into another tenant's keys is not valid there.
    """
    fields = dict(record) if isinstance(record, Mapping) else dataclasses.asdict(record)
    fields.pop("signature", None)
    body = {"namespace": namespace, "record": fields}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _DOMAIN + text.encode()


def sign_record(record: Record, key: SigningKey, *, namespace: str) -> str:
    """The signature `<kid>.<base64url>` for the field `signature` of a record."""
    return f"{key.kid}.{b64url_encode(key.private.sign(canonical_record(record, namespace)))}"


def verify_record(record: Record, keys: PublicKeys, *, namespace: str) -> None:
    """Check that the broker signed exactly this record for this namespace.

    Args:
        record: mapping or dataclass with the fields of a HandRecord, `signature` among them.
        keys: the broker's public keys by id (`wire.keys.load_keys`).
        namespace: the reader's own tenant, never one that the record names.

    Raises:
        UnknownRecordKey: signed with a key that is not in `keys`.
        Denied: no signature, or a wrong one.
    """
    signature = record["signature"] if isinstance(record, Mapping) else _signature(record)
    kid, dot, encoded = str(signature).partition(".")
    if not dot:
        raise Denied("The hand record carries no signature of the broker.")
    key = keys.get(kid)
    if key is None:
        raise UnknownRecordKey(kid[:64])
    try:
        key.verify(b64url_decode(encoded), canonical_record(record, namespace))
    except (InvalidSignature, ValueError, TypeError) as err:
        raise Denied("The signature of the hand record is wrong.") from err


def _signature(record: object) -> str:
    return str(getattr(record, "signature", ""))
