"""The federation's certificate authority: keys, certificates, revocation list, signatures.

ECDSA on P-384 with SHA-384 throughout: Flower's SuperNode keys are of that kind, so one curve is to be trusted, not two.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmm.errors import ConfigError
from fedmm.privacy.vault import sync_folder

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
CURVE = ec.SECP384R1()
CA_DAYS = 3650
SKEW = timedelta(hours=1)  # certificates hold from a little before they were made: clocks of members differ
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the coordinator's own programs reach it there


@dataclass(frozen=True)
class Authority:
    """Whoever has `key` decides who takes part: it stays in the coordinator's `ca` folder, offline."""

    key: Key
    certificate: x509.Certificate

    def server(self, names: Iterable[str], key: PublicKey, *, days: int) -> x509.Certificate:
        """For the coordinator, under each of these host names and addresses and on loopback."""
        unique = dict.fromkeys([*names, *LOOPBACK])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
        builder = self._leaf(subject, key, days, ExtendedKeyUsageOID.SERVER_AUTH).add_extension(
            x509.SubjectAlternativeName([general_name(name) for name in unique]), critical=False
        )
        return builder.sign(self.key, SHA384())

    def client(self, name: str, key: PublicKey, *, days: int) -> x509.Certificate:
        """For a hospital; its common name is the hospital's."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return self._leaf(subject, key, days, ExtendedKeyUsageOID.CLIENT_AUTH).sign(self.key, SHA384())

    def _leaf(
        self, subject: x509.Name, key: PublicKey, days: int, use: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.certificate.public_key())  # type: ignore[arg-type]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(min(now + timedelta(days=days), self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority, critical=False)
        )

    def revocations(self, revoked: Mapping[int, datetime], *, number: int) -> bytes:
        """The revocation list, PEM. revoked: serial numbers and since when.  number: grows.

        It holds as long as the CA itself. OpenSSL refuses everybody once a list has run out, and a short life would not
        make withdrawals faster: whoever revokes copies the new list to the one coordinator anyway.
        """
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - SKEW)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.certificate.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
        )
        for serial, since in revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, SHA384()).public_bytes(Encoding.PEM)

    def sign(self, text: bytes) -> bytes:
        return self.key.sign(text, ec.ECDSA(SHA384()))


def make_authority(federation: str, key: Key) -> x509.Certificate:
    """The CA's own certificate: ten years, signs members only (path length 0)."""
    now = datetime.now(UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "fedmm CA"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# --- keys and certificates as files -----------------------------------------------------------------------------------


def new_key() -> Key:
    return ec.generate_private_key(CURVE)


def key_pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_ssh(key: Key) -> bytes:
    """OpenSSH's format, the one that flower-supernode reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def ssh_line(key: PublicKey, name: str) -> str:
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}"


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256, in groups that can be read over the phone."""
    text = certificate.fingerprint(SHA256()).hex()
    return " ".join(text[at : at + 8] for at in range(0, len(text), 8))


def read_key(path: Path) -> Key:
    """PEM or OpenSSH. Raises: ConfigError if it is missing or no P-384 key."""
    try:
        content = path.read_bytes()
        read = load_ssh_private_key if b"OPENSSH" in content[:64] else load_pem_private_key
        key = read(content, None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", fix="take it from the backup") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is no private key without a password", fix="take it from the backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != CURVE.name:
        raise ConfigError(f"{path} is no P-384 key", fix="use the one that fedmm provision made")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Raises: ConfigError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", fix="take it from the kit again") from None
    except ValueError:
        raise ConfigError(f"{path} is no certificate", fix="take it from the kit again") from None


def read_ssh_line(line: str, *, where: str) -> PublicKey:
    """Raises: ConfigError if it is not the OpenSSH line of a P-384 key."""
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE.name:
        raise ConfigError(
            f"{where} is not the OpenSSH line of a P-384 key", fix="use the one that fedmm provision made"
        )
    return key


def is_signed(text: bytes, signature: bytes, key: object) -> bool:
    """key: from anywhere; only an elliptic curve key can have signed."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, text, ec.ECDSA(SHA384()))
            return True
    except InvalidSignature:
        pass
    return False


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


# --- files ------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Readable by its owner only, if it is new; one that is there may be anybody's home and stays as it is."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def place(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file whole or not at all; a private one is never readable by others, not even for a moment."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # of a run that was killed
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, path)
    sync_folder(path.parent)
