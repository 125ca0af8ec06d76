"""A coordinator's kit with two hospitals and one that was withdrawn, made here: tests of deploy/ need no other command."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from fedmm.schema import Labels
from fedmm.sites.kit import (
    CA,
    CRL,
    FEDERATION,
    KIT_FILE,
    SERVER_CERT,
    SERVER_KEY,
    SIGNATURE,
    Address,
    Federation,
    Member,
)
from fedmm.sites.kit import to_json as federation_json

Key = ec.EllipticCurvePrivateKey
MEMBERS = ("north", "south", "gone")
START, DAYS = datetime.now(UTC) - timedelta(hours=1), timedelta(days=7)


def private_pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def issue(key: Key, name: str, signer: Key, issuer: str, *, authority: bool = False) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(START + DAYS)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
    )
    if not authority:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, SHA384())


def make_kit(folder: Path, *, port: int, link: int) -> Path:
    """The kit in `folder`/coordinator; beside it NAME.crt, NAME.key and NAME.pub of each of MEMBERS, and of a stranger."""
    folder.mkdir(parents=True, exist_ok=True)
    kit = folder / "coordinator"
    kit.mkdir()
    ca, other, node = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
    root = issue(ca, "test CA", ca, "test CA", authority=True)
    members, serials = [], {}
    for name in MEMBERS:
        key, node = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        certificate = issue(key, name, ca, "test CA")
        serials[name] = certificate.serial_number
        line = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        write_pair(folder, name, certificate, key)
        (folder / f"{name}.pub").write_bytes(
            node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        members.append(Member(name=name, node_key=line, revoked=name == "gone"))
    write_pair(folder, "stranger", issue(other, "north", other, "another CA"), other)
    server = ec.generate_private_key(ec.SECP384R1())
    revoked = x509.RevokedCertificateBuilder().serial_number(serials["gone"]).revocation_date(START).build()
    crl = x509.CertificateRevocationListBuilder().issuer_name(root.subject).last_update(START).next_update(START + DAYS)
    description = federation_json(
        Federation(
            name="test", serial=1, coordinator=Address(host="localhost", port=port),
            labels=Labels(findings=("effusion",)), hospitals=tuple(members),
        )
    )  # fmt: skip
    files = {
        CA: root.public_bytes(Encoding.PEM),
        CRL: crl.add_revoked_certificate(revoked).sign(ca, SHA384()).public_bytes(Encoding.PEM),
        SERVER_CERT: issue(server, "localhost", ca, "test CA").public_bytes(Encoding.PEM),
        SERVER_KEY: private_pem(server),
        FEDERATION: description,
        SIGNATURE: ca.sign(description, ec.ECDSA(SHA384())),
        KIT_FILE: f'[kit]\nrole = "coordinator"\nname = "coordinator"\nfederation = "test"\n[ports]\nlink = {link}\n'.encode(),
    }
    for name, content in files.items():
        (kit / name).write_bytes(content)
        (kit / name).chmod(0o600)
    return kit


def write_pair(folder: Path, name: str, certificate: x509.Certificate, key: Key) -> None:
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(private_pem(key))
