"""Keys that are made where they stay: what a hospital sends to become a member, and what comes back. Two ends, one file.

    hospital      make_request   client.key, node.key stay in KIT; request.json: public keys, each proven to be held
    coordinator   Request.check, fedmm.sites.provision.Office.admit; NAME.answer.json: certificate, signed federation
    hospital      accept_answer  completes KIT

Nothing in either message is secret. Who sent a request is not proven by it: both ends show its fingerprint, to be compared
by phone; the same goes for the CA's, which the hospital meets in the answer.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from fedmm.config import load_site
from fedmm.errors import ConfigError
from fedmm.privacy.chain import statement_is_signed
from fedmm.privacy.ledger import Ledger
from fedmm.schema import Frozen
from fedmm.sites import authority, kit, papers
from fedmm.sites.authority import PublicKey
from fedmm.sites.description import MAX_BYTES, Proposal
from fedmm.sites.kit import NAME, Federation, explain

REQUEST = "request.json"
PROVEN_AS = b"fedmm request v1\n"  # what the node key signs here can be mistaken for nothing that Flower has it sign
Message = TypeVar("Message", bound=Frozen)


class Request(Frozen):
    """csr: PEM, signed by the client key.  node_proof: the node key's signature over csr, base64.

    ledger_key: of a ledger that the hospital has already, hexadecimal, with its signature over the CSR's digest; or empty.
    """

    version: Literal[1] = 1
    name: str = Field(pattern=NAME)
    csr: str = Field(max_length=20_000)
    node_key: str = Field(max_length=1024)
    node_proof: str = Field(max_length=1024)
    ledger_key: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    ledger_proof: str = Field("", pattern=r"^([0-9a-f]{128})?$")

    def check(self) -> tuple[PublicKey, str]:
        """The client's public key and the node key's line, if the sender holds both private keys and asks for its own name.

        Raises: ConfigError.
        """
        again = f"at the hospital: fedmm provision --csr {self.name} --out KIT"
        try:
            csr = x509.load_pem_x509_csr(self.csr.encode())
            valid = csr.is_signature_valid
        except ValueError:
            raise ConfigError("the request holds no certificate request", fix=again) from None
        key = csr.public_key()
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != authority.CURVE.name:
            raise ConfigError("the request does not prove that its sender has the client key", fix=again)
        names = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if [name.value for name in names] != [self.name]:
            raise ConfigError(f"the request says {self.name}, its certificate request another name", fix=again)
        node = authority.read_ssh_line(self.node_key, where="node_key of the request")
        try:
            proof = base64.b64decode(self.node_proof, validate=True)
        except (binascii.Error, ValueError):
            proof = b""
        if not authority.is_signed(PROVEN_AS + csr.public_bytes(Encoding.DER), proof, node):
            raise ConfigError("the request does not prove that its sender has the node key", fix=again)
        if self.ledger_key and not statement_is_signed(_about(csr), self.ledger_proof, self.ledger_key):
            raise ConfigError("the request does not prove that its sender has the ledger's key", fix=again)
        return key, authority.ssh_line(node, self.name)

    def fingerprint(self) -> str:
        """Of the keys that it asks for: the same for the same keys, however the message was written."""
        digest = hashlib.sha256(f"{self.name}\n{self.csr}\n{' '.join(self.node_key.split()[:2])}".encode()).hexdigest()
        return " ".join(digest[at : at + 8] for at in range(0, 32, 8))


class Answer(Frozen):
    """signature: hexadecimal.  federation: the bytes that it signs, as text."""

    version: Literal[1] = 1
    name: str = Field(pattern=NAME)
    ca: str = Field(max_length=20_000)
    certificate: str = Field(max_length=20_000)
    federation: str
    signature: str = Field(pattern=r"^[0-9a-f]{2,512}$")
    proposal: Proposal = Proposal()


def as_file(message: Frozen) -> bytes:
    return (message.model_dump_json(indent=1) + "\n").encode()


def read_message(path: Path, kind: type[Message]) -> Message:
    """Raises: ConfigError: the file comes from someone else."""
    what = kind.__name__.lower()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is too long for {what}", fix="ask for it again")
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid {what}", why=explain(error), fix="ask for it again") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", fix="check the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no {what} ({type(error).__name__})", fix="ask for it again") from None


# --- at the hospital --------------------------------------------------------------------------------------------------


def make_request(name: str, folder: Path, *, hospital: Path | None = None) -> Request:
    """Private keys in `folder`, if they are not there, and the request for them. The same keys make the same request.

    hospital: a hospital folder whose ledger's public key goes with it.  Raises: ConfigError for a name that is none,
    PolicyRefused and LedgerUnusable for a hospital folder without policy or ledger.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r} is no name of a hospital", fix="letters, digits, '_', '.', '-'; at most 64")
    authority.make_folder(folder)
    for file, form in ((kit.CLIENT_KEY, authority.key_pem), (kit.NODE_KEY, authority.key_ssh)):
        if not (folder / file).exists():
            authority.place(folder / file, form(authority.new_key()), private=True)
    key, node = authority.read_key(folder / kit.CLIENT_KEY), authority.read_key(folder / kit.NODE_KEY)
    csr = _kept_csr(folder / REQUEST, name, key.public_key()) or (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .sign(key, SHA384())
    )
    line = authority.ssh_line(node.public_key(), name)
    ledger_key = ledger_proof = ""
    if hospital is not None:
        with Ledger.open(hospital, load_site(hospital), create=False) as ledger:
            ledger_key, ledger_proof = ledger.public_key(), ledger.sign(_about(csr))
    request = Request(
        name=name,
        csr=csr.public_bytes(Encoding.PEM).decode(),
        node_key=line,
        node_proof=base64.b64encode(node.sign(PROVEN_AS + csr.public_bytes(Encoding.DER), ec.ECDSA(SHA384()))).decode(),
        ledger_key=ledger_key,
        ledger_proof=ledger_proof,
    )
    if not (folder / kit.NODE_PUBLIC).exists():
        authority.place(folder / kit.NODE_PUBLIC, f"{line}\n".encode())
    authority.place(folder / REQUEST, as_file(request))
    return request


def _kept_csr(path: Path, name: str, key: PublicKey) -> x509.CertificateSigningRequest | None:
    """The one that was sent already: its fingerprint may have been read out over the phone."""
    if not path.exists():
        return None
    try:
        request = read_message(path, Request)
        csr = x509.load_pem_x509_csr(request.csr.encode())
    except (ConfigError, ValueError):
        return None
    return csr if request.name == name and csr.public_key() == key else None


def _about(csr: x509.CertificateSigningRequest) -> dict[str, str]:
    return {"request": hashlib.sha256(csr.public_bytes(Encoding.DER)).hexdigest()}


def accept_answer(answer: Answer, folder: Path) -> tuple[Federation, str]:
    """Complete the kit whose keys are in `folder`. Returns the federation and the CA's fingerprint.

    Guarantee: nothing is written unless certificate, federation and keys belong together; the policy stays as it is.
    Raises: ConfigError.
    """
    ask = "ask the coordinator for the answer to the request.json in this folder"
    if not (folder / kit.CLIENT_KEY).exists():
        raise ConfigError(
            f"{folder} holds no {kit.CLIENT_KEY}",
            why="an answer belongs to the keys that asked",
            fix="give the --out of fedmm provision --csr",
        )
    federation, ca, certificate = _verified(answer, folder, fix=ask)
    if certificate.public_key() != authority.read_key(folder / kit.CLIENT_KEY).public_key():
        raise ConfigError(f"the answer is not for the {kit.CLIENT_KEY} in {folder}", fix=ask)
    member, node = federation.member(answer.name), authority.read_key(folder / kit.NODE_KEY)
    if member is None or member.node_key.split()[:2] != authority.ssh_line(node.public_key(), "").split()[:2]:
        raise ConfigError(f"the answer does not name the {kit.NODE_KEY} in {folder}", fix=ask)
    hospital = folder / "hospital"
    for each in (folder, folder / kit.STATE, hospital):
        authority.make_folder(each)
    title = federation.name
    authority.place(folder / kit.CA, answer.ca.encode())
    authority.place(folder / kit.CLIENT_CERT, answer.certificate.encode())
    authority.place(folder / kit.SIGNATURE, bytes.fromhex(answer.signature))
    authority.place(folder / kit.FEDERATION, answer.federation.encode())
    policy = papers.site_text(answer.name, federation.labels, answer.proposal)
    for path, text in (
        (hospital / "site.toml", policy),
        (folder / "README.txt", papers.hospital_readme(answer.name, title)),
        (folder / kit.KIT_FILE, papers.kit_text("hospital", answer.name, title)),  # last: now it is a kit
    ):
        if not path.exists():
            authority.place(path, text.encode())
    return federation, authority.fingerprint(ca)


def _verified(answer: Answer, folder: Path, *, fix: str) -> tuple[Federation, x509.Certificate, x509.Certificate]:
    """What the answer says, if its CA signed all of it and nothing in the kit contradicts. Raises: ConfigError."""
    with TemporaryDirectory() as name:
        aside = Path(name)
        (aside / kit.CA).write_text(answer.ca, encoding="utf-8")
        (aside / kit.CLIENT_CERT).write_text(answer.certificate, encoding="utf-8")
        (aside / kit.FEDERATION).write_text(answer.federation, encoding="utf-8")
        (aside / kit.SIGNATURE).write_bytes(bytes.fromhex(answer.signature))
        try:
            federation = kit.read_federation(aside)
            ca, certificate = (authority.read_certificate(aside / file) for file in (kit.CA, kit.CLIENT_CERT))
        except (ConfigError, ValueError):
            raise ConfigError("the answer is damaged, or was not signed by its CA", fix=fix) from None
    if not authority.is_issued_by(certificate, ca) or authority.common_name(certificate) != answer.name:
        raise ConfigError(f"the answer's certificate is not one of {answer.name} by its CA", fix=fix)
    if (folder / kit.CA).exists() and authority.read_certificate(folder / kit.CA) != ca:
        raise ConfigError(f"the answer comes from another CA than {folder / kit.CA}", fix="make a kit in a new folder")
    if (folder / kit.FEDERATION).exists() and kit.read_federation(folder).serial > federation.serial:
        raise ConfigError("the answer is older than the kit", fix="ask the coordinator for a new one")
    return federation, ca, certificate
