"""`fedmm doctor KIT`: everything that can be checked before the first connection, one line each. No patient's value, no counts.

Nothing is made or changed: no ledger, no state folder. What takes minutes (every file of the hospital) is `fedmm check`.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedmm.config import installed_version, load_site
from fedmm.data.check import decode, files_of, read_folder
from fedmm.errors import FedmmError
from fedmm.privacy import vault
from fedmm.privacy.ledger import Ledger
from fedmm.schema import InputSpec
from fedmm.sites import authority, kit, papers, tls
from fedmm.sites.kit import Kit

State = Literal["ok", "warning", "problem"]
FLWR = "1.41."  # pyproject.toml pins it; another one speaks another protocol
# Flower takes a SuperNode's signed timestamp when it is less than 5 s ahead and less than 305 s behind the SuperLink's clock
# (flwr.common.constant: SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE). Ahead is the narrow side.
AHEAD, BEHIND = 5.0, 300.0
SOON = timedelta(days=30)  # a certificate that runs out so soon is worth a line
SAMPLE = 20  # rows whose files are read; # measured: a second or two
GIB = 2**30
DISK_LEAST, DISK_GOOD = GIB // 2, 5 * GIB  # guess: logs, kept features; the coordinator keeps weights of several rounds
MEMORY_LEAST, MEMORY_GOOD = GIB, 3 * GIB  # guess: torch alone takes 0.5, a default run at a hospital 1.2


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    detail: str
    fix: str = ""


Finding = tuple[State, str, str]  # of one check: state, detail, fix
Examine = Callable[[Kit], Finding]


def examine(folder: Path, *, progress: Callable[[Check], None] | None = None) -> list[Check]:
    """Every check of the kit in `folder`, in order; progress is called with each. Raises nothing for anything in the kit.

    A kit that cannot be opened ends the list: the other checks need it.
    """
    checks: list[Check] = []
    for check in _checks(folder):
        checks.append(check)
        if progress:
            progress(check)
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": is_ok(checks), "checks": [asdict(check) for check in checks]}


def is_ok(checks: list[Check]) -> bool:
    return all(check.state != "problem" for check in checks)


def _checks(folder: Path) -> Iterator[Check]:
    yield _examined("versions", _versions)
    opened: list[Kit] = []
    yield _examined("kit", partial(_kit, folder, opened))
    for me in opened:
        parts = COORDINATOR if me.is_coordinator else HOSPITAL
        for name, part in parts.items():
            yield _examined(name, partial(part, me))


def _examined(name: str, part: Callable[[], Finding]) -> Check:
    try:
        return Check(name, *part())
    except FedmmError as error:
        detail = error.what + (f" ({error.why})" if error.why else "")
        return Check(name, "problem", detail, error.fix)
    except OSError as error:
        return Check(
            name, "problem", f"{error.strerror or type(error).__name__}: {error.filename}", "check permissions"
        )
    except (
        Exception
    ) as error:  # one check that fails in an unforeseen way must not hide the others; its text may hold values
        return Check(name, "problem", f"this check failed ({type(error).__name__})", "report it; the others are valid")


# --- what this machine is ---------------------------------------------------------------------------------------------


def _versions() -> Finding:
    try:
        flwr = version("flwr")
    except PackageNotFoundError:
        return "problem", "flwr is not installed", "install fedmm with its dependencies: pip install fedmm"
    here = f"fedmm {installed_version()}, flwr {flwr}, Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}"
    if not flwr.startswith(FLWR):
        return "problem", f"{here}: fedmm needs flwr {FLWR}x", f"pip install 'flwr=={FLWR}0'"
    if not ssl.HAS_TLSv1_3:
        return "problem", f"{here}: no TLS 1.3", "use a Python with OpenSSL 1.1.1 or newer"
    return "ok", here, ""


def _disk(me: Kit) -> Finding:
    places = [me.state, me.runs] if me.is_coordinator else [me.state, me.hospital]
    free = min(shutil.disk_usage(_existing(place)).free for place in places)
    return _enough("disk", free, DISK_LEAST, DISK_GOOD, f"free some where {' and '.join(map(str, places))} lie")


def _existing(place: Path) -> Path:
    return next(each for each in (place, *place.parents) if each.exists())


def _memory(_: Kit) -> Finding:
    fix = "close other programs, or use a larger machine"
    return _enough("memory", _available(), MEMORY_LEAST, MEMORY_GOOD, fix)


def _available() -> int:
    """Bytes that a program could get, in a container too."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    host = 1024 * int(lines["MemAvailable"].split()[0])
    try:
        group = Path("/sys/fs/cgroup")
        rest = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return host
    return max(0, min(host, rest))


def _enough(what: str, have: int, least: int, good: int, fix: str) -> Finding:
    detail = f"{have / GIB:.1f} GiB of {what} free"
    if have >= good:
        return "ok", detail, ""
    return ("problem" if have < least else "warning"), f"{detail}, {good / GIB:g} are comfortable", fix


def _device(_: Kit) -> Finding:
    from fedmm.training.loop import choose_device  # here: seconds of import

    device = choose_device("auto")
    if device == "cpu":
        return "ok", f"cpu, {len(os.sched_getaffinity(0))} cores (training.device = auto)", ""
    import torch

    return "ok", f"{device}: {torch.cuda.get_device_name()} (training.device = auto)", ""


def _free_port(host: str, port: int, what: str) -> str:
    """Why nobody could listen there; empty if one could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)  # on Linux, with SO_REUSEADDR, only this sees another listener
        except OSError as error:
            return f"{what} {host}:{port}: {error.strerror}"
    return ""


def _ports(me: Kit) -> Finding:
    ports = me.config.ports
    wanted = (
        [(ports.listen, me.federation.coordinator.port, "public"), ("127.0.0.1", ports.link, "link")]
        if me.is_coordinator
        else [("127.0.0.1", ports.node, "node")]
    )
    if ports.metrics:
        wanted.append(("127.0.0.1", ports.metrics, "metrics"))
    busy = [why for each in wanted if (why := _free_port(*each))]
    if busy:
        where = f"[ports] in {kit.KIT_FILE}" + ("; the public one in federation.toml" if me.is_coordinator else "")
        fix = f"stop what has it (fedmm itself, if it runs: then all is well), or choose another: {where}"
        return "problem", "; ".join(busy), fix
    return "ok", ", ".join(f"{what} {host}:{port}" for host, port, what in wanted) + " can be opened", ""


# --- the kit ----------------------------------------------------------------------------------------------------------

FILES = {
    True: (kit.CA, kit.CRL, kit.FEDERATION, kit.SIGNATURE, kit.SERVER_CERT, kit.SERVER_KEY, kit.SECRET),
    False: (kit.CA, kit.FEDERATION, kit.SIGNATURE, kit.CLIENT_CERT, kit.CLIENT_KEY, kit.NODE_KEY, kit.NODE_PUBLIC),
}
RENEW = "at the coordinator: fedmm provision federation.toml --out KITS --renew {name}"


def _kit(folder: Path, opened: list[Kit]) -> Finding:
    me = kit.open_kit(folder)
    missing = [name for name in FILES[me.is_coordinator] if not me.file(name).is_file()]
    if missing:
        return (
            "problem",
            f"{', '.join(missing)} missing in {folder}",
            "take them from the kit that fedmm provision wrote",
        )
    opened.append(me)
    there = me.federation
    number = sum(not member.revoked for member in there.hospitals)
    return "ok", f"{me.name} in {there.name}, signed description {there.serial}, {number} hospital(s)", ""


def _certificate(me: Kit) -> Finding:
    own, key = (kit.SERVER_CERT, kit.SERVER_KEY) if me.is_coordinator else (kit.CLIENT_CERT, kit.CLIENT_KEY)
    renew = RENEW.format(name=me.name)
    ca, certificate = authority.read_certificate(me.file(kit.CA)), authority.read_certificate(me.file(own))
    if certificate.public_key() != authority.read_key(me.file(key)).public_key():
        return "problem", f"{own} and {key} do not belong together", "take both from the same kit, or: " + renew
    if not authority.is_issued_by(certificate, ca):
        return "problem", f"{own} was not made by {kit.CA} of this kit", "take both from the same kit, or: " + renew
    if certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value != x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.SERVER_AUTH if me.is_coordinator else ExtendedKeyUsageOID.CLIENT_AUTH]
    ):
        return "problem", f"{own} is for another use", "take the one of this kit"
    wrong = _wrong_name(me, certificate)
    if wrong:
        return "problem", wrong, renew
    return _dates(own, certificate, ca, renew)


def _wrong_name(me: Kit, certificate: x509.Certificate) -> str:
    if not me.is_coordinator:
        named = authority.common_name(certificate)
        return "" if named == me.name else f"{kit.CLIENT_CERT} is that of {named!r}, the kit that of {me.name!r}"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = me.federation.coordinator.host
    return "" if authority.general_name(host) in list(names) else f"{kit.SERVER_CERT} does not name {host}"


def _dates(own: str, certificate: x509.Certificate, ca: x509.Certificate, renew: str) -> Finding:
    now = datetime.now(UTC)
    for name, each in ((kit.CA, ca), (own, certificate)):
        if now < each.not_valid_before_utc:
            return (
                "problem",
                f"{name} is not valid before {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
                "set the clock",
            )
        if now > each.not_valid_after_utc:
            fix = renew if name == own else "a new CA is needed: provision into a new folder"
            return "problem", f"{name} expired on {each.not_valid_after_utc:%Y-%m-%d}", fix
    until = certificate.not_valid_after_utc
    if until - now < SOON:
        return "warning", f"{own} holds until {until:%Y-%m-%d} only", renew
    return "ok", f"{own} holds until {until:%Y-%m-%d}, chain, key and name fit", ""


def _revocations(me: Kit) -> Finding:
    fix = f"copy KITS/ca/{kit.CRL} into the kit"
    try:
        listed = x509.load_pem_x509_crl(me.file(kit.CRL).read_bytes())
    except ValueError:
        return "problem", f"{kit.CRL} is damaged", fix
    ca = authority.read_certificate(me.file(kit.CA))
    if not listed.is_signature_valid(ca.public_key()):  # type: ignore[arg-type]
        return "problem", f"{kit.CRL} was not made by {kit.CA} of this kit", fix
    until = listed.next_update_utc
    if until is not None and until < datetime.now(UTC):
        return "problem", f"{kit.CRL} expired on {until:%Y-%m-%d}: nobody can connect", fix
    tls.server_context(me)
    return "ok", f"{len(listed)} certificate(s) withdrawn", ""


def _node_key(me: Kit) -> Finding:
    node = authority.ssh_line(authority.read_key(me.file(kit.NODE_KEY)).public_key(), "").split()
    member = me.federation.member(me.name)
    if member is None or member.node_key.split()[:2] != node:
        fix = "take node.key and federation.json from the same kit, or: " + RENEW.format(name=me.name)
        return "problem", f"{kit.NODE_KEY} is not the key that {kit.FEDERATION} names for {me.name}", fix
    if me.file(kit.NODE_PUBLIC).read_text(encoding="utf-8").split()[:2] != node:
        return "problem", f"{kit.NODE_PUBLIC} does not belong to {kit.NODE_KEY}", "take both from the same kit"
    return "ok", f"{kit.NODE_KEY} is the one that {kit.FEDERATION} names", ""


# --- the connection ---------------------------------------------------------------------------------------------------


def _connection(me: Kit) -> Finding:
    """And the clock, which the coordinator's answer tells: one connection for both."""
    there = me.federation.coordinator
    found = tls.ask_health(me)
    if found.status != 200:
        fix = "look into the coordinator's log: is its SuperLink up?"
        return "problem", f"{there.host}:{there.port} answers GET /health with {found.status}", fix
    reached = f"{there.host}:{there.port} reached, both certificates accepted"
    if found.ahead is None:
        return "warning", f"{reached}; it did not tell its time", "compare the clocks yourself: seconds matter"
    return _clock(found.ahead, reached)


def _clock(ahead: float, reached: str) -> Finding:
    """ahead: seconds, to a second, since the Date header has no fractions."""
    fix = "let NTP (chrony, systemd-timesyncd) set both clocks"
    said = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if ahead >= AHEAD or ahead <= -BEHIND:
        least = f"less than {AHEAD:g} s ahead and {BEHIND:g} s behind are accepted"
        return "problem", f"{reached}; {said}: {least}", fix
    if ahead > AHEAD / 2 or ahead < -BEHIND / 2:
        return "warning", f"{reached}; {said}", fix
    return "ok", f"{reached}; clocks agree", ""


# --- the hospital -----------------------------------------------------------------------------------------------------


def _policy(me: Kit) -> Finding:
    path = me.hospital / "site.toml"
    try:
        site = load_site(me.hospital)
    except FedmmError as error:
        waiting = path.is_file() and papers.DECIDE in path.read_text(encoding="utf-8", errors="replace")
        fix = f'decide the lines after "{papers.DECIDE.strip()}" in {path}' if waiting else error.fix
        return "problem", error.what, fix
    if site.hospital.name != me.name:
        return (
            "problem",
            f"site.toml is of {site.hospital.name}, the kit of {me.name}",
            f"correct hospital.name in {path}",
        )
    theirs, ours = me.federation.labels.model_dump(), site.labels.model_dump()
    differs = [name for name in theirs if theirs[name] != ours[name]]
    if differs:
        fix = f"make [labels] of {path} equal to federation.json, or agree on others and provision again"
        return "problem", f"labels.{', labels.'.join(differs)} of site.toml differ from the federation's", fix
    fits = "site.toml fits the kit and the federation's labels"
    if site.privacy.allow_not_private:
        fix = f"right for invented or public data only; else privacy.allow_not_private = false in {path}"
        return "warning", f"{fits}; it accepts runs without privacy", fix
    return "ok", fits, ""


def _data(me: Kit) -> Finding:
    """Of the problems only where they are: how many there are could tell something about patients."""
    _, table = read_folder(me.hospital)
    problems, files = list(table.problems), files_of(table)
    for row, paths in files[:SAMPLE]:
        problems += decode(row, paths, InputSpec())[1]
    codes = sorted({problem.code for problem in problems if problem.code != "bad_policy"})  # that one has its own line
    if codes:
        return "problem", f"training would refuse this folder: {', '.join(codes)}", f"fedmm check {me.hospital}"
    return (
        "ok",
        f"manifest is valid, the files of its first rows are readable; all of them: fedmm check {me.hospital}",
        "",
    )


def _ledger(me: Kit) -> Finding:
    try:
        site = load_site(me.hospital)
    except FedmmError:
        return "problem", "cannot be looked for without a valid site.toml", "see policy above"
    path = me.hospital / site.ledger.path
    if not any(path.with_suffix(suffix).exists() for suffix in (path.suffix, ".key", vault.PATIENTS)):
        fits = os.access(path.parent, os.W_OK)
        if not fits:
            return (
                "problem",
                f"no ledger can be made in {path.parent}",
                "give the user that runs fedmm the right to write",
            )
        return "ok", "none yet: it is made at the first training", ""
    with Ledger.open(me.hospital, site, create=False):
        return "ok", "readable, chain and key fit; every signature: fedmm ledger verify", ""


COORDINATOR: dict[str, Examine] = {
    "certificate": _certificate,
    "revocations": _revocations,
    "ports": _ports,
    "disk": _disk,
    "memory": _memory,
}
HOSPITAL: dict[str, Examine] = {
    "certificate": _certificate,
    "node key": _node_key,
    "connection": _connection,
    "ports": _ports,
    "disk": _disk,
    "memory": _memory,
    "device": _device,
    "policy": _policy,
    "data": _data,
    "ledger": _ledger,
}
