"""`fedmm provision` at the coordinator: kits out of federation.toml, withdrawn hospitals, renewed certificates.

    KITS/ca/           ca.key ca.crt crl.pem register.json, federation.json and .sig as last signed: kept offline
    KITS/coordinator/  KITS/HOSPITAL/         kits (fedmm.sites.kit), to be handed over and then removed here
    KITS/HOSPITAL.answer.json                 for a hospital that made its own keys (fedmm.sites.request)

The register is written before what follows from it, each file whole or not at all, and a file that is there stays. So a
run that was killed is finished by the same command, and running again adds what is new in federation.toml.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedmm.errors import ConfigError
from fedmm.privacy.vault import alone_in
from fedmm.sites import authority, kit, papers
from fedmm.sites.authority import Authority, Key, PublicKey
from fedmm.sites.description import AUTHORITY, COORDINATOR, Description
from fedmm.sites.kit import Federation, Member
from fedmm.sites.register import REGISTER, Register, read_register, write_register
from fedmm.sites.request import Answer, Request, as_file

CA_KEY, README, SITE = "ca.key", "README.txt", "site.toml"
SECRET_BYTES = 48  # of chance; flwr takes the file's bytes as they are, so it is written as text without a newline
SHARED = (kit.FEDERATION, kit.SIGNATURE)


@dataclass
class Office:
    """The coordinator's folder of kits, open for one command. `news`: what was done; `todo`: what a person must do now."""

    out: Path
    description: Description
    register: Register
    authority: Authority
    news: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    # --- commands -----------------------------------------------------------------------------------------------------

    def provision(self) -> None:
        """Make what is not there yet: coordinator, hospitals that are new in federation.toml."""
        self._coordinator()
        for entry in self.description.hospitals:
            if self.register.member(entry.name):
                continue
            if entry.own_keys:
                self.todo.append(f"{entry.name}: waits for its request (at the hospital: fedmm provision --csr)")
            else:
                self._hospital(entry.name)
        for member in self.register.members:
            if self.description.entry(member.name) is None and not member.revoked:
                self.todo.append(
                    f"{member.name} is a member and no longer in federation.toml: it stays one; --revoke {member.name} ends it"
                )
        self._publish()

    def revoke(self, name: str) -> None:
        """A hospital takes no part any more. Raises: ConfigError if it never did."""
        member = self._member(name)
        if not member.revoked:
            without = self.register.without(name)
            self._remember(without.with_member(member.model_copy(update={"revoked": True})))
            self.news.append(f"{name}: withdrawn")
        self._publish()

    def renew(self, name: str, *, new_keys: bool) -> None:
        """A new certificate for the keys that are there, or new keys, and then the old certificates are withdrawn."""
        if name == COORDINATOR:
            self._renew_coordinator(new_keys=new_keys)
        else:
            self._renew_hospital(name, new_keys=new_keys)
        self._publish()

    def admit(self, request: Request, *, again: bool) -> None:
        """Take the keys that a hospital made itself, and write the answer. again: it is a member already (--renew).

        Raises: ConfigError for a hospital that is not in federation.toml, or whose keys are another hospital's.
        """
        name = request.name
        self._makes_own_keys(name)
        key, line = request.check()
        known = self.register.member(name)
        if known and not again and (known.node_key != line or not self._is_last(name, key)):
            raise ConfigError(
                f"{name} is a member already, with other keys",
                why="a stranger could send a request in its name",
                fix=f"ask {name} by phone, compare the request's fingerprint, then add --renew {name}",
            )
        self._foreign(name, line)
        if known and known.revoked and (known.node_key == line or self._is_withdrawn(name, key)):
            raise ConfigError(
                f"{name} was withdrawn and asks with the same keys", fix="make new ones there: --csr into a new folder"
            )
        register = self.register
        if known and again and not self._is_last(name, key):
            register = register.without(name)
        if known is None or again:
            register = register.with_issued(name, self._client(name, key)).with_member(Member(name=name, node_key=line))
            ledger = {name: request.ledger_key} if request.ledger_key else {}
            self._remember(register.model_copy(update={"ledgers": {**register.ledgers, **ledger}}))
        self.news.append(f"{name}: admitted with its own keys, request {request.fingerprint()}")
        self._publish()
        self._answer(name)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _coordinator(self) -> None:
        folder = self.out / COORDINATOR
        known = self.register.last(COORDINATOR)
        if known is not None and not (folder / kit.SERVER_KEY).exists():
            return  # handed over; a renewed certificate may lie here
        for each in (folder, folder / kit.STATE, folder / kit.RUNS):
            authority.make_folder(each)
        title = self.description.federation.name
        key = self._key(folder / kit.SERVER_KEY, authority.key_pem)
        self._new(folder / kit.SECRET, lambda: secrets.token_urlsafe(SECRET_BYTES).encode(), private=True)
        self._certificate(folder / kit.SERVER_CERT, COORDINATOR, key.public_key())
        self._new(folder / kit.CA, lambda: authority.certificate_pem(self.authority.certificate))
        self._new(folder / README, lambda: papers.coordinator_readme(title).encode())
        self._new(folder / kit.KIT_FILE, lambda: papers.kit_text("coordinator", COORDINATOR, title).encode())
        if known is None:
            self.news.append(f"coordinator: kit in {folder}")
            self.todo.append(
                f"coordinator: move {folder} to the machine that hospitals reach as {self.description.coordinator.host}"
            )
        named = authority.read_certificate(folder / kit.SERVER_CERT)
        if not _names_host(named, self.description.coordinator.host):
            self.todo.append(
                f"coordinator: {kit.SERVER_CERT} does not name {self.description.coordinator.host}: run --renew coordinator"
            )

    def _hospital(self, name: str) -> None:
        folder = self.out / name
        hospital = folder / "hospital"
        for each in (folder, folder / kit.STATE, hospital):
            authority.make_folder(each)
        title = self.description.federation.name
        key = self._key(folder / kit.CLIENT_KEY, authority.key_pem)
        node = self._key(folder / kit.NODE_KEY, authority.key_ssh)
        line = authority.ssh_line(node.public_key(), name)
        self._foreign(name, line)
        self._new(folder / kit.NODE_PUBLIC, lambda: f"{line}\n".encode())
        self._certificate(folder / kit.CLIENT_CERT, name, key.public_key())
        self._new(folder / kit.CA, lambda: authority.certificate_pem(self.authority.certificate))
        policy = papers.site_text(name, self.description.labels, self.description.privacy)
        self._new(hospital / SITE, policy.encode)
        self._new(folder / README, lambda: papers.hospital_readme(name, title).encode())
        self._new(folder / kit.KIT_FILE, lambda: papers.kit_text("hospital", name, title).encode())
        self._remember(self.register.with_member(Member(name=name, node_key=line)))
        self.news.append(f"{name}: kit in {folder}")
        self.todo.append(
            f"{name}: hand {folder} over on a safe way, then remove it here: it holds {name}'s private keys"
        )

    def _renew_coordinator(self, *, new_keys: bool) -> None:
        folder = self.out / COORDINATOR
        last = self.register.last(COORDINATOR)
        if last is None:
            raise ConfigError("there is no coordinator's kit yet", fix="run fedmm provision without --renew first")
        authority.make_folder(folder)
        public = last.public_key()
        if new_keys:
            key = authority.new_key()
            public = key.public_key()
            authority.place(folder / kit.SERVER_KEY, authority.key_pem(key), private=True)
            authority.place(folder / kit.SECRET, secrets.token_urlsafe(SECRET_BYTES).encode(), private=True)
        self._issue(folder / kit.SERVER_CERT, COORDINATOR, public)  # type: ignore[arg-type]
        what = ", ".join([kit.SERVER_CERT, *([kit.SERVER_KEY, kit.SECRET] if new_keys else [])])
        self.news.append(f"coordinator: new {what}")
        self.todo.append(f"coordinator: copy {what} of {folder} into its kit, and restart it")
        if new_keys:
            self.todo.append(
                f"hospitals would still believe the old {kit.SERVER_KEY} until {last.not_valid_after_utc:%Y-%m-%d}, they have no "
                "revocation list: if it was stolen, make a new CA by provisioning into a new folder"
            )

    def _renew_hospital(self, name: str, *, new_keys: bool) -> None:
        member, last = self._member(name), self.register.last(name)
        entry = self.description.entry(name)
        if member.revoked and not new_keys:
            raise ConfigError(f"{name} was withdrawn", fix=f"to take it back: --renew {name} --new-keys")
        if entry is not None and entry.own_keys:
            if new_keys:
                raise ConfigError(
                    f"{name} makes its own keys",
                    fix=f"there: fedmm provision --csr {name} --out NEW; here: --renew {name} --request FILE",
                )
            self._remember(self.register.with_issued(name, self._client(name, _public(last))))
            self._publish()
            self._answer(name)
            return
        folder, public, register = self.out / name, _public(last), self.register
        authority.make_folder(folder)
        if new_keys:
            key, node = authority.new_key(), authority.new_key()
            public, line = key.public_key(), authority.ssh_line(node.public_key(), name)
            authority.place(folder / kit.CLIENT_KEY, authority.key_pem(key), private=True)
            authority.place(folder / kit.NODE_KEY, authority.key_ssh(node), private=True)
            authority.place(folder / kit.NODE_PUBLIC, f"{line}\n".encode())
            register = register.without(name).with_member(Member(name=name, node_key=line))
        certificate = self._client(name, public)
        self._remember(register.with_issued(name, certificate))  # old ones withdrawn, new one known: in one write
        authority.place(folder / kit.CLIENT_CERT, authority.certificate_pem(certificate))
        what = ", ".join([kit.CLIENT_CERT, *([kit.CLIENT_KEY, kit.NODE_KEY, kit.NODE_PUBLIC] if new_keys else [])])
        self.news.append(f"{name}: new {what}")
        self.todo.append(f"{name}: copy {what} of {folder} into its kit, remove them here, restart it")

    def _answer(self, name: str) -> None:
        last = self.register.last(name)
        answer = Answer(
            name=name,
            ca=authority.certificate_pem(self.authority.certificate).decode(),
            certificate=authority.certificate_pem(last).decode() if last else "",
            federation=(self._ca / kit.FEDERATION).read_text(encoding="utf-8"),
            signature=(self._ca / kit.SIGNATURE).read_bytes().hex(),
            proposal=self.description.privacy,
        )
        path = self.out / f"{name}.answer.json"
        authority.place(path, as_file(answer))
        self.news.append(f"{name}: answer in {path}")
        self.todo.append(f"{name}: send it {path}; nothing in it is secret (there: fedmm provision --answer)")

    # --- what is signed -----------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Revocation list and description of the federation, signed anew if they changed, in every kit that is here."""
        listed = self._ca / kit.CRL
        relisted = not listed.exists() or _numbers(listed) != (
            self.register.list_number,
            set(self.register.revoked()),
        )
        if relisted:
            content = self.authority.revocations(self.register.revoked(), number=self.register.list_number)
            authority.place(listed, content)
        changed = self._sign()
        shared = {name: (self._ca / name).read_bytes() for name in (*SHARED, kit.CRL)}
        names = [COORDINATOR, *(member.name for member in self.register.members if not member.revoked)]
        for name in names:
            folder = self.out / name
            mine = [*SHARED, *([kit.CRL] if name == COORDINATOR else [])]
            if (folder / kit.KIT_FILE).exists():
                stale = [file for file in mine if _read(folder / file) != shared[file]]
                for file in stale:
                    authority.place(folder / file, shared[file])
        if changed:
            self.news.append(f"federation.json: serial {self.register.serial}, signed")
        if (changed or relisted) and self.register.serial > 1:
            files = f"{kit.CRL}, {kit.FEDERATION}, {kit.SIGNATURE}"
            self.todo.append(f"coordinator: copy {files} of {self._ca} into its kit, and restart it")
        if changed and self.register.serial > 1:
            self.todo.append(
                f"hospitals: copy {kit.FEDERATION}, {kit.SIGNATURE} of {self._ca} into their kits, and restart"
            )

    def _sign(self) -> bool:
        """True if the description is another than the one that was signed last."""
        path, signature = self._ca / kit.FEDERATION, self._ca / kit.SIGNATURE
        text = kit.to_json(self._federation(max(self.register.serial, 1)))
        key = self.authority.key.public_key()
        if _read(path) == text and authority.is_signed(text, _read(signature), key) and self.register.serial:
            return False
        self._remember(self.register.model_copy(update={"serial": self.register.serial + 1}))
        text = kit.to_json(self._federation(self.register.serial))
        authority.place(signature, self.authority.sign(text))
        authority.place(path, text)
        return True

    def _federation(self, serial: int) -> Federation:
        coordinator = self.description.coordinator
        return Federation(
            name=self.description.federation.name,
            serial=serial,
            coordinator=kit.Address(host=coordinator.host, port=coordinator.port),
            labels=self.description.labels,
            hospitals=self.register.members,
        )

    # --- files and the register ---------------------------------------------------------------------------------------

    @property
    def _ca(self) -> Path:
        return self.out / AUTHORITY

    def _remember(self, register: Register) -> None:
        write_register(self._ca / REGISTER, register)
        self.register = register

    def _new(self, path: Path, make: Callable[[], bytes], *, private: bool = False) -> None:
        if not path.exists():
            authority.place(path, make(), private=private)

    def _key(self, path: Path, form: Callable[[Key], bytes]) -> Key:
        self._new(path, lambda: form(authority.new_key()), private=True)
        return authority.read_key(path)

    def _certificate(self, path: Path, name: str, key: PublicKey) -> None:
        if not path.exists():
            self._issue(path, name, key)
        found = authority.read_certificate(path)
        if found.public_key() != key or not authority.is_issued_by(found, self.authority.certificate):
            raise ConfigError(
                f"{path} does not belong to the key beside it, or to another CA",
                fix=f"remove {path.parent} if it was never handed over; else --renew {name} --new-keys",
            )

    def _issue(self, path: Path, name: str, key: PublicKey) -> None:
        """In the register first: no certificate is out that cannot be withdrawn."""
        given, days = self.description.coordinator, self.description.federation.days_valid
        certificate = (
            self.authority.server([given.host, *given.names], key, days=days)
            if name == COORDINATOR
            else self._client(name, key)
        )
        self._remember(self.register.with_issued(name, certificate))
        authority.place(path, authority.certificate_pem(certificate))

    def _client(self, name: str, key: PublicKey) -> x509.Certificate:
        return self.authority.client(name, key, days=self.description.federation.days_valid)

    def _member(self, name: str) -> Member:
        member = self.register.member(name)
        if member is None:
            names = ", ".join(each.name for each in self.register.members) or "none yet"
            raise ConfigError(f"{name} is no member of this federation", why=f"members: {names}", fix="check the name")
        return member

    def _makes_own_keys(self, name: str) -> None:
        entry = self.description.entry(name)
        if entry is None or not entry.own_keys:
            why = "it is not there" if entry is None else "kits with keys are made for it here"
            raise ConfigError(
                f"federation.toml does not say that {name} makes its own keys",
                why=why,
                fix=f'if {name} should take part: [[hospitals]] name = "{name}", own_keys = true',
            )

    def _foreign(self, name: str, line: str) -> None:
        """Raises: ConfigError if the node key is another member's."""
        for member in self.register.members:
            if member.name != name and member.node_key.split()[:2] == line.split()[:2]:
                raise ConfigError(f"{name} and {member.name} have the same node key", fix="each makes its own")

    def _is_last(self, name: str, key: PublicKey) -> bool:
        last = self.register.last(name)
        return last is not None and last.public_key() == key

    def _is_withdrawn(self, name: str, key: PublicKey) -> bool:
        return any(
            each.name == name and each.revoked and each.read.public_key() == key for each in self.register.issued
        )


@contextmanager
def open_office(out: Path, description: Description) -> Iterator[Office]:
    """KITS, made if it is not there; one process at a time. Raises: ConfigError if it is another federation's or damaged."""
    ca = out / AUTHORITY
    authority.make_folder(out)
    authority.make_folder(ca)
    with alone_in(ca):
        fresh = not (ca / CA_KEY).exists()
        if fresh and (ca / kit.CA).exists():
            raise ConfigError(f"{ca / CA_KEY} is missing", fix="restore KITS/ca from the latest backup")
        if fresh and not (ca / REGISTER).exists():
            write_register(ca / REGISTER, Register())
        register = read_register(ca / REGISTER)
        if fresh:
            authority.place(ca / CA_KEY, authority.key_pem(authority.new_key()), private=True)
        key = authority.read_key(ca / CA_KEY)
        title = description.federation.name
        if not (ca / kit.CA).exists():
            authority.place(ca / kit.CA, authority.certificate_pem(authority.make_authority(title, key)))
        certificate = authority.read_certificate(ca / kit.CA)
        owner = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if not owner or owner[0].value != title or certificate.public_key() != key.public_key():
            raise ConfigError(
                f"{out} holds the kits of another federation",
                why=f"its CA is not that of {title}",
                fix="give another --out, or the federation.toml that made it",
            )
        office = Office(out, description, register, Authority(key, certificate))
        yield office
        if fresh:
            office.news.insert(0, f"CA of {title}: {authority.fingerprint(certificate)}")
            office.todo.append(f"keep {ca} offline and in a backup: whoever has it decides who takes part")


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _public(certificate: x509.Certificate | None) -> PublicKey:
    key = certificate.public_key() if certificate else None
    if not isinstance(key, PublicKey):
        raise ConfigError("the register has no certificate of this name", fix="restore KITS/ca from the latest backup")
    return key


def _numbers(path: Path) -> tuple[int, set[int]]:
    listed = x509.load_pem_x509_crl(path.read_bytes())
    number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return number, {entry.serial_number for entry in listed}


def _names_host(certificate: x509.Certificate, host: str) -> bool:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return authority.general_name(host) in list(names)
