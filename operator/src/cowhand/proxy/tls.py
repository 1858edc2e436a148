"""The sandbox proxy's own certificate: made at start, pinned by its hash, its key never in a file system.

A forked child makes it and ends: what is needed only once (`cryptography.x509`, about 8 MiB) does not
stay in the memory of a process that runs beside every sandbox.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from typing import Final

from cowhand.errors import CowhandError

LIFETIME: Final = timedelta(days=3650)
"""Longer than any pod: clients pin the hash, nobody checks the date."""


def self_signed() -> tuple[ssl.SSLContext, str]:
    """A server context with a new self-signed P-256 certificate, and the hex SHA-256 of its DER form.

    Call it before the process has threads.

    Raises:
        CowhandError: the certificate could not be made.
    """
    pem = _in_child()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    # OpenSSL loads from a path only: an anonymous memory file has one, and no other process sees it.
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    certificate = pem[: pem.index(b"-----BEGIN PRIVATE")].decode("ascii")
    return context, hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()


def make_pem() -> bytes:
    """Certificate and private key as PEM, in this order."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cowhand-sandbox")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("cowhand-sandbox")]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _in_child() -> bytes:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of the parent may run here: no exception handler, no exit hook, no flush.
        code = 1
        try:
            os.close(reader)
            os.write(writer, make_pem())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as handle:
        pem = handle.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or b"-----BEGIN PRIVATE KEY" not in pem:
        raise CowhandError("The proxy's certificate could not be made.")
    return pem
