"""Hand tokens: compact JWS, signed by the broker, checked by the proxy of a sandbox.

Written out instead of taken from a JWT library: the proxy needs one algorithm and one set of
claims, and everything that a general library would also accept is an attack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidSignature

from cowhand.errors import Unauthenticated
from cowhand.wire.keys import ALGORITHM, PublicKeys, SigningKey, b64url_decode, b64url_encode

AUDIENCE: Final = "cowhand-hand"
"""The only audience of a hand token."""

MAX_LIFETIME_S: Final = 300
"""Longest life of a token in seconds; a longer one is refused even if its signature is right."""

LEEWAY_S: Final = 5
"""Clock difference between broker and proxy that is tolerated, in seconds, on both ends."""

MAX_TOKEN_CHARS: Final = 4096
"""Longest token that is looked at."""

TokenType = Literal["hand", "exec"]


class UnknownKey(Unauthenticated):
    """The token names a key that the caller does not have: fetch the broker's keys again.

    Attributes:
        kid: the key id that the token names.
    """

    def __init__(self, kid: str) -> None:
        super().__init__(f"The token is signed with the unknown key {kid!r}; ask for a new token.")
        self.kid = kid


@dataclass(frozen=True)
class HandClaims:
    """What a hand token says.

    Attributes:
        sandbox_uid: uid of the Sandbox that it opens (`sbx`).
        session_id: session that calls; empty only in an exec token for a free sandbox (`ses`).
        owner_epoch: epoch of the sandbox's owner record, from 1; 0 for a free sandbox (`own`).
        epoch: epoch of the session's lease; 0 in exec tokens (`epo`).
        issued_at: seconds since the epoch, broker's clock (`iat`).
        expires_at: seconds since the epoch, at most `MAX_LIFETIME_S` after `issued_at` (`exp`).
        type: `hand` for tool calls of a session, `exec` for a person's command (`typ`).
        actor: who asked for an exec token, else empty (`act`).
    """

    sandbox_uid: str
    session_id: str
    owner_epoch: int
    epoch: int
    issued_at: int
    expires_at: int
    type: TokenType = "hand"
    actor: str = ""


def sign(claims: HandClaims, key: SigningKey) -> str:
    """The token for these claims.

    Raises:
        ValueError: the claims would be refused by `verify` (a bug of the caller).
    """
    payload: dict[str, Any] = {
        "aud": AUDIENCE,
        "sbx": claims.sandbox_uid,
        "ses": claims.session_id,
        "own": claims.owner_epoch,
        "epo": claims.epoch,
        "typ": claims.type,
        "act": claims.actor,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
    }
    try:
        _claims(payload)
    except Unauthenticated as err:
        raise ValueError(str(err)) from err
    head = b64url_encode(_compact({"alg": ALGORITHM, "kid": key.kid}))
    signed = f"{head}.{b64url_encode(_compact(payload))}"
    return f"{signed}.{b64url_encode(key.private.sign(signed.encode()))}"


def verify(token: str, keys: PublicKeys, now: float) -> HandClaims:
    """Check form, signature, audience and times of a token; answers its claims.

    The algorithm is fixed: the header is only asked for the key id, and may hold nothing else.

    Args:
        token: the compact JWS.
        keys: the broker's public keys by id.
        now: seconds since the epoch.

    Raises:
        UnknownKey: signed with a key that is not in `keys`.
        Unauthenticated: anything else that is wrong; the text says what, never the token.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated("The token is too long.")
    parts = token.split(".")
    if len(parts) != 3:
        raise Unauthenticated("The token is not a compact JWS of three parts.")
    try:
        signature = b64url_decode(parts[2])
    except ValueError as err:
        raise Unauthenticated("The token's signature is not base64url.") from err
    header = _object(parts[0], "header")
    kid = header.get("kid")
    if set(header) != {"alg", "kid"} or header["alg"] != ALGORITHM or not isinstance(kid, str):
        raise Unauthenticated(f"The token's header must be exactly alg {ALGORITHM} and a kid.")
    key = keys.get(kid)
    if key is None:
        raise UnknownKey(kid[:64])
    try:
        key.verify(signature, f"{parts[0]}.{parts[1]}".encode("ascii"))
    except (InvalidSignature, UnicodeEncodeError) as err:
        raise Unauthenticated("The token's signature is wrong.") from err
    claims = _claims(_object(parts[1], "payload"))
    if now >= claims.expires_at + LEEWAY_S:
        raise Unauthenticated("The token has expired; ask for a new one.")
    if claims.issued_at > now + LEEWAY_S:
        raise Unauthenticated("The token is not valid yet; compare the nodes' clocks.")
    return claims


def _compact(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _object(part: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(b64url_decode(part), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        raise Unauthenticated(f"The token's {what} is not JSON in base64url.") from err
    if not isinstance(value, dict):
        raise Unauthenticated(f"The token's {what} is not a JSON object.")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 512


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


_SHAPE: Final[dict[str, Callable[[Any], bool]]] = {
    "aud": lambda value: bool(value == AUDIENCE),
    "sbx": lambda value: _is_text(value) and value != "",
    "ses": _is_text,
    "own": _is_count,
    "epo": _is_count,
    "typ": lambda value: value in ("hand", "exec"),
    "act": _is_text,
    "iat": _is_count,
    "exp": _is_count,
}


def _claims(payload: dict[str, Any]) -> HandClaims:
    for name, fits in _SHAPE.items():
        if name not in payload or not fits(payload[name]):
            raise Unauthenticated(f"The token's claim {name!r} is missing or not valid.")
    if set(payload) != set(_SHAPE):
        raise Unauthenticated("The token has claims that do not belong to a hand token.")
    if payload["typ"] == "hand" and payload["ses"] == "":
        raise Unauthenticated("The token's claim 'ses' is empty.")
    if not 0 < payload["exp"] - payload["iat"] <= MAX_LIFETIME_S:
        raise Unauthenticated(f"The token lives longer than {MAX_LIFETIME_S} s or not at all.")
    return HandClaims(
        sandbox_uid=payload["sbx"],
        session_id=payload["ses"],
        owner_epoch=payload["own"],
        epoch=payload["epo"],
        issued_at=payload["iat"],
        expires_at=payload["exp"],
        type=payload["typ"],
        actor=payload["act"],
    )
