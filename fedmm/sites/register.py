"""What the CA remembers: who is a member, every certificate that was issued, which are withdrawn. KITS/ca/register.json.

One file, written whole: it is what happened. Everything else in KITS is made from it and can be made again.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import Field, ValidationError, field_validator

from fedmm.errors import ConfigError
from fedmm.schema import Frozen
from fedmm.sites import authority
from fedmm.sites.kit import NAME, Member

REGISTER = "register.json"


class Issued(Frozen):
    """name: of a hospital, or `coordinator`.  revoked: since when; None: it is not."""

    name: str = Field(pattern=NAME)
    certificate: str = Field(max_length=20_000)
    revoked: datetime | None = None

    @field_validator("certificate")
    @classmethod
    def _is_one(cls, text: str) -> str:
        x509.load_pem_x509_certificate(text.encode())
        return text

    @property
    def read(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate.encode())


class Register(Frozen):
    """serial: of the last description of the federation that was signed.  ledgers: ledger key, hexadecimal, by hospital."""

    version: Literal[1] = 1
    serial: int = Field(0, ge=0)
    list_number: int = Field(0, ge=0)
    members: tuple[Member, ...] = ()
    issued: tuple[Issued, ...] = ()
    ledgers: dict[str, str] = Field(default_factory=dict)

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def last(self, name: str) -> x509.Certificate | None:
        """The certificate that was issued last to this name, withdrawn or not."""
        return next((issued.read for issued in reversed(self.issued) if issued.name == name), None)

    def revoked(self) -> dict[int, datetime]:
        return {issued.read.serial_number: issued.revoked for issued in self.issued if issued.revoked}

    def with_member(self, member: Member) -> Register:
        """Its place is kept; a new one comes last."""
        names = [each.name for each in self.members]
        members = (
            tuple(member if each.name == member.name else each for each in self.members)
            if member.name in names
            else (*self.members, member)
        )
        return self.model_copy(update={"members": members})

    def with_issued(self, name: str, certificate: x509.Certificate) -> Register:
        issued = Issued(name=name, certificate=authority.certificate_pem(certificate).decode())
        return self.model_copy(update={"issued": (*self.issued, issued)})

    def without(self, name: str) -> Register:
        """Every certificate of this name is withdrawn, from now on; a next number for the list."""
        now = datetime.now(UTC).replace(microsecond=0)
        issued = tuple(
            each.model_copy(update={"revoked": now}) if each.name == name and each.revoked is None else each
            for each in self.issued
        )
        return self.model_copy(update={"issued": issued, "list_number": self.list_number + 1})


def read_register(path: Path) -> Register:
    """Raises: ConfigError."""
    fix = "restore KITS/ca from the latest backup: key and register belong together"
    try:
        return Register.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        kind = "not valid" if isinstance(error, ValidationError) else f"missing or damaged ({type(error).__name__})"
        raise ConfigError(f"{path} is {kind}", fix=fix) from None


def write_register(path: Path, register: Register) -> None:
    authority.place(path, (register.model_dump_json(indent=1) + "\n").encode(), private=True)
