"""federation.toml: what the coordinator writes down before `fedmm provision` makes the kits."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from fedmm.errors import ConfigError
from fedmm.schema import Frozen, Labels
from fedmm.sites.kit import NAME, Address, explain

COORDINATOR, AUTHORITY = "coordinator", "ca"  # names of folders beside those of the hospitals
MAX_BYTES = 2**20  # of a description, a request or an answer: far above what an honest one needs


class FederationSection(Frozen):
    name: str = Field(pattern=NAME, description="Public name of the federation.")
    days_valid: int = Field(365, ge=1, le=3650, description="How long certificates of its members hold, days.")


class CoordinatorSection(Address):
    names: tuple[str, ...] = Field((), description="Further names or addresses for the server's certificate.")

    @field_validator("host", "names")
    @classmethod
    def _names_or_addresses(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (given,) if isinstance(given, str) else given:
            if not is_host(name):
                raise ValueError(f"{name!r} is neither a host name nor an IP address")
        return given


class HospitalEntry(Frozen):
    name: str = Field(pattern=NAME)
    own_keys: bool = Field(False, description="It makes its private keys itself and sends a request (--csr).")


class Proposal(Frozen):
    """What the federation proposes for each site.toml. The hospital decides; nothing of it is in force unless it does."""

    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=0.01)
    min_noise_multiplier: float | None = Field(None, gt=0)
    max_sampling_rate: float | None = Field(None, gt=0, le=1)


class Description(Frozen):
    federation: FederationSection
    coordinator: CoordinatorSection
    labels: Labels
    privacy: Proposal = Proposal()
    hospitals: tuple[HospitalEntry, ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _can_be_folders(self) -> Description:
        names = [entry.name.lower() for entry in self.hospitals]  # some file systems take north and North for one
        if len(set(names)) != len(names):
            raise ValueError("two hospitals have the same name")
        if {COORDINATOR, AUTHORITY} & set(names):
            raise ValueError(f"a hospital cannot be named {COORDINATOR} or {AUTHORITY}")
        if not self.labels.columns:
            raise ValueError("labels: name at least one thing to predict")
        words = (*self.labels.columns, *self.labels.class_values, *self.labels.ordinal_levels)
        if not all(word.isprintable() for word in words):
            raise ValueError("labels: names must be printable")
        return self

    def entry(self, name: str) -> HospitalEntry | None:
        return next((entry for entry in self.hospitals if entry.name == name), None)


def is_host(name: str) -> bool:
    """An IP address, or a host name that a certificate can carry (RFC 1123); no wildcards."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        parts = name.split(".")
        return len(name) <= 253 and all(
            0 < len(part) < 64 and part.isascii() and part.replace("-", "a").isalnum() and part.strip("-") == part
            for part in parts
        )
    return "%" not in name  # a zone is of one machine only


def read_description(path: Path) -> Description:
    """Raises: ConfigError naming each wrong line."""
    fix = "[federation] name; [coordinator] host, port; [labels] as in site.toml; [[hospitals]] name"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is too long for a description of a federation", fix=fix)
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", fix=f"write one: {fix}") from None
    except (OSError, ValueError, RecursionError) as error:
        place = str(error) if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise ConfigError(f"{path} cannot be read ({type(error).__name__})", why=place, fix=fix) from None
    try:
        return Description.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{path} is not valid", why=explain(error), fix=fix) from None
