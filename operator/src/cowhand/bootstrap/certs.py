"""The internal CA and its leaf certificates, as pure functions of a clock.

Used by `cowhand.bootstrap.run`. Keys are P-256: small, fast and known to every TLS library in use here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cowhand.errors import UserError

CA_LIFE: Final = timedelta(days=3650)
LEAF_LIFE: Final = timedelta(days=730)
RENEW_BEFORE: Final = timedelta(days=30)
"""A certificate with less than this left is made anew."""

_SKEW: Final = timedelta(minutes=5)


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str


def service_names(service: str, namespace: str) -> tuple[str, ...]:
    """Every name and address under which a Service is reached, loopback (port-forward, probes) included."""
    full = f"{service}.{namespace}.svc"
    return (
        full,
        service,
        f"{service}.{namespace}",
        f"{full}.cluster.local",
        "localhost",
        "127.0.0.1",
    )


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def new_ca(namespace: str, now: datetime) -> KeyPair:
    """A CA for the control plane in `namespace`; it may sign leaves only."""
    key = _key()
    name = _name(f"cowhand {namespace}"[:64])
    certificate = (
        _builder(name, name, key.public_key(), now)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key))


def new_leaf(ca: KeyPair, names: Sequence[str], now: datetime) -> KeyPair:
    """A server certificate for `names` (DNS names and IP addresses), signed by `ca`.

    Raises:
        UserError: the CA's certificate or key cannot be read.
    """
    issuer, signer = _load_ca(ca)
    key = _key()
    certificate = (
        _builder(_name(names[0][:64]), issuer.subject, key.public_key(), now)
        .not_valid_after(min(now + LEAF_LIFE, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(_general, names))), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key))


def ca_is_due(ca: KeyPair, now: datetime) -> str:
    """Why a CA has to be made anew, empty if it need not be.

    Raises:
        UserError: it cannot be read; it is left for people to look at.
    """
    certificate, _ = _load_ca(ca)
    return "expires" if certificate.not_valid_after_utc - now < RENEW_BEFORE else ""


def leaf_is_due(leaf: KeyPair, ca: KeyPair, names: Iterable[str], now: datetime) -> str:
    """Why a leaf has to be made anew, empty if it need not be."""
    issuer, _ = _load_ca(ca)
    try:
        certificate = x509.load_pem_x509_certificate(leaf.certificate.encode())
        key = serialization.load_pem_private_key(leaf.key.encode(), password=None)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return "cannot be read, or another CA issued it"
    if certificate.public_key() != key.public_key():
        return "key and certificate do not belong together"
    if not {_general(name) for name in names} <= set(found):
        return "a name is missing"
    if certificate.not_valid_after_utc - now < RENEW_BEFORE:
        return "expires"
    return ""


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load_ca(ca: KeyPair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(ca.certificate.encode())
        key = serialization.load_pem_private_key(ca.key.encode(), password=None)
    except (ValueError, TypeError) as err:
        raise UserError(
            f"the CA in Secret cowhand-ca-key cannot be read: {err}; restore it, or delete the Secret "
            "to get a new CA"
        ) from err
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != (
        key.public_key()
    ):
        raise UserError(
            "certificate and key in Secret cowhand-ca-key do not belong together; restore it, or "
            "delete the Secret to get a new CA"
        )
    return certificate, key
