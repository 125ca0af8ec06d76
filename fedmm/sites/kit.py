"""A kit: the folder that a coordinator or a hospital holds of a federation. File names, and reading them with care.

    coordinator/  kit.toml ca.crt crl.pem federation.json federation.sig server.crt server.key superexec.secret  state/ runs/
    HOSPITAL/     kit.toml ca.crt         federation.json federation.sig client.crt client.key node.key node.pub state/ hospital/

kit.toml says who this is and where things lie; federation.json says who takes part, signed by the federation's CA
(federation.sig), so that neither side can be lied to about it. `fedmm provision` writes kits (fedmm.sites.provision), each
with a README.txt for people.
"""

from __future__ import annotations

import json
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import Field, ValidationError, model_validator

from fedmm.errors import ConfigError
from fedmm.schema import Frozen, Labels

KIT_FILE, CA, CRL, FEDERATION, SIGNATURE = "kit.toml", "ca.crt", "crl.pem", "federation.json", "federation.sig"
SERVER_CERT, SERVER_KEY, SECRET = "server.crt", "server.key", "superexec.secret"
CLIENT_CERT, CLIENT_KEY, NODE_KEY, NODE_PUBLIC = "client.crt", "client.key", "node.key", "node.pub"
STATE, RUNS = "state", "runs"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
PRIVATE = (SERVER_KEY, SECRET, CLIENT_KEY, NODE_KEY)  # of these nobody but the owner may read


class Address(Frozen):
    host: str = Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:-]+$", description="As hospitals reach it.")
    port: int = Field(9443, ge=1, le=65535, description="The one public port, of the proxy.")


class Member(Frozen):
    """A hospital of the federation. Its TLS certificate has `name` as common name."""

    name: str = Field(pattern=NAME)
    node_key: str = Field(max_length=1024, description="Public key of its SuperNode: one OpenSSH line, ECDSA P-384.")
    revoked: bool = Field(False, description="Withdrawn: its certificate is on the revocation list.")


class Federation(Frozen):
    """Who takes part in what: federation.json."""

    version: Literal[1] = 1
    name: str = Field(pattern=NAME)
    serial: int = Field(ge=1, description="Grows with each signing; an older description is not taken for a newer one.")
    coordinator: Address
    labels: Labels
    hospitals: tuple[Member, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> Federation:
        names = [member.name for member in self.hospitals]
        if len(set(names)) != len(names):
            raise ValueError("two hospitals have the same name")
        return self

    def member(self, name: str) -> Member | None:
        return next((member for member in self.hospitals if member.name == name), None)


class Identity(Frozen):
    role: Literal["coordinator", "hospital"]
    name: str = Field(pattern=NAME)
    federation: str = Field(pattern=NAME)


class Places(Frozen):
    """Relative to the kit, or absolute."""

    hospital: str = Field("hospital", description="Folder with manifest and site.toml.")
    runs: str = Field(RUNS, description="Where the coordinator keeps run folders.")
    state: str = Field(STATE, description="Logs, process ids, what is remembered between starts.")


class Ports(Frozen):
    """On loopback only, but for the coordinator's public one, which federation.json names."""

    listen: str = Field("0.0.0.0", description="Address that the coordinator's proxy listens on.")
    link: int = Field(9091, ge=1, le=65535, description="SuperLink at the coordinator, on loopback.")
    node: int = Field(9094, ge=1, le=65535, description="SuperNode's runtime at a hospital, on loopback.")
    metrics: int = Field(9464, ge=0, le=65535, description="Prometheus metrics, on loopback; 0: none.")


class KitFile(Frozen):
    kit: Identity
    places: Places = Places()
    ports: Ports = Ports()


@dataclass(frozen=True)
class Kit:
    """A kit that was read: its settings, and the signed description of its federation."""

    folder: Path
    config: KitFile
    federation: Federation

    @property
    def name(self) -> str:
        return self.config.kit.name

    @property
    def is_coordinator(self) -> bool:
        return self.config.kit.role == "coordinator"

    def file(self, name: str) -> Path:
        return self.folder / name

    def _place(self, given: str) -> Path:
        return (self.folder / Path(given).expanduser()).absolute()

    @property
    def state(self) -> Path:
        return self._place(self.config.places.state)

    @property
    def runs(self) -> Path:
        return self._place(self.config.places.runs)

    @property
    def hospital(self) -> Path:
        return self._place(self.config.places.hospital)

    def make_state(self) -> Path:
        """The state folder, readable by its owner only."""
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)
        return self.state


def open_kit(folder: Path, *, role: Literal["coordinator", "hospital"] | None = None) -> Kit:
    """Read a kit and check what can be checked without a connection: form, signature, membership, permissions.

    Raises: ConfigError with the fix.
    """
    config = _read_toml(folder)
    if role is not None and config.kit.role != role:
        raise ConfigError(
            f"{folder} is the kit of a {config.kit.role}, not of a {role}", fix=f"give the folder of a {role}'s kit"
        )
    federation = read_federation(folder)
    if federation.name != config.kit.federation:
        raise ConfigError(
            f"{folder} mixes two federations: {config.kit.federation} and {federation.name}",
            fix="take all files from the same kit",
        )
    if config.kit.role == "hospital":
        member = federation.member(config.kit.name)
        if member is None:
            raise ConfigError(
                f"{config.kit.name} is no hospital of the federation {federation.name}",
                fix="ask the coordinator for a kit with this name, or for a newer federation.json",
            )
        if member.revoked:
            raise ConfigError(
                f"{config.kit.name} was withdrawn from the federation {federation.name}",
                fix="ask the coordinator why; a new kit is needed to come back",
            )
    for name in PRIVATE:
        path = folder / name
        if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path} can be read by others", fix=f"chmod 600 {path}, and ask who had access")
    return Kit(folder, config, federation)


def _read_toml(folder: Path) -> KitFile:
    path = folder / KIT_FILE
    try:
        return KitFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not a kit", why=f"it has no {KIT_FILE}", fix="give a folder that fedmm provision wrote"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__})") from None
    except ValidationError as error:
        raise ConfigError(f"{path} is not valid", why=explain(error)) from None


def read_federation(folder: Path) -> Federation:
    """federation.json of a kit, if the CA of that kit signed it. Raises: ConfigError."""
    ask_again = "take ca.crt, federation.json and federation.sig from the same fedmm provision"
    try:
        text, signature = (folder / FEDERATION).read_bytes(), (folder / SIGNATURE).read_bytes()
        authority = x509.load_pem_x509_certificate((folder / CA).read_bytes())
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None) or folder / CA
        raise ConfigError(f"{name} is missing or damaged", fix=ask_again) from None
    key = authority.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(signature, text, ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise ConfigError(
            f"{folder / FEDERATION} is not signed by this kit's CA",
            why="it was changed, or comes from another federation",
            fix=ask_again,
        ) from None
    try:
        return Federation.model_validate(json.loads(text))
    except (ValidationError, ValueError) as error:
        why = explain(error) if isinstance(error, ValidationError) else type(error).__name__
        raise ConfigError(
            f"{folder / FEDERATION} is not valid", why=why, fix="install the same fedmm at both ends"
        ) from None


def explain(error: ValidationError) -> str:
    parts: list[str] = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "settings"
        parts.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)


def to_json(federation: Federation) -> bytes:
    """The bytes that are signed."""
    content: dict[str, Any] = federation.model_dump(mode="json")
    return (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode()
