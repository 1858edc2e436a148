"""Ed25519 keys that travel between our processes, and their names.

The broker publishes its public keys (`GET /v1/keys`); proxies and harnesses load them to check hand
tokens and hand records. A key's id is derived from the key itself, so that nobody can publish
another key under a known id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cowhand.errors import UserError

ALGORITHM: Final = "EdDSA"
"""The only signature algorithm of the wire."""

PublicKeys = Mapping[str, Ed25519PublicKey]
"""Public keys by key id."""


def b64url_encode(raw: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def b64url_decode(text: str) -> bytes:
    """Inverse of `b64url_encode`; refuses padding, foreign characters and non-canonical endings.

    Raises:
        ValueError: the text is not what `b64url_encode` would have made.
    """
    try:
        raw = base64.b64decode(
            text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (UnicodeEncodeError, binascii.Error) as err:
        raise ValueError("not base64url") from err
    if b64url_encode(raw) != text:
        raise ValueError("not canonical base64url")
    return raw


def key_id(public: Ed25519PublicKey) -> str:
    """Name of a key: the first 16 characters of base64url(SHA-256(raw public key))."""
    return b64url_encode(hashlib.sha256(public.public_bytes_raw()).digest())[:16]


@dataclass(frozen=True)
class SigningKey:
    """A private key with its id; only the broker has one.

    Attributes:
        private: the Ed25519 key; never shown by repr.
        kid: its id, see `key_id`.
    """

    private: Ed25519PrivateKey = field(repr=False)
    kid: str

    @classmethod
    def of(cls, private: Ed25519PrivateKey) -> SigningKey:
        """A signing key with the id that follows from it."""
        return cls(private, key_id(private.public_key()))

    @classmethod
    def generate(cls) -> SigningKey:
        """A new random key."""
        return cls.of(Ed25519PrivateKey.generate())

    @property
    def public(self) -> Ed25519PublicKey:
        """The public half."""
        return self.private.public_key()


def dump_keys(keys: Iterable[Ed25519PublicKey]) -> dict[str, Any]:
    """The document of `GET /v1/keys`: `{"keys": [{"kid", "alg", "public"}]}`."""
    return {
        "keys": [
            {"kid": key_id(k), "alg": ALGORITHM, "public": b64url_encode(k.public_bytes_raw())}
            for k in keys
        ]
    }


def load_keys(document: Any) -> dict[str, Ed25519PublicKey]:
    """Public keys by id from the document of `GET /v1/keys`.

    Keys of other algorithms are skipped (a newer broker may publish them).

    Raises:
        UserError: the document has another shape, or a key's id does not follow from the key.
    """
    try:
        entries = document["keys"]
        found: dict[str, Ed25519PublicKey] = {}
        for entry in entries:
            if entry["alg"] != ALGORITHM:
                continue
            key = Ed25519PublicKey.from_public_bytes(b64url_decode(entry["public"]))
            if entry["kid"] != key_id(key):
                raise ValueError(f"key id {entry['kid']!r} does not belong to its key")
            found[key_id(key)] = key
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"The broker's key document is not valid: {err}", field="keys") from err
    return found
