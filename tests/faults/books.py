"""What must be true of a hospital's ledger after any fault."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from client.outbox import KINDS
from fedmm.config import load_site
from fedmm.privacy.ledger import Ledger
from fedmm.report.record import read_config, read_rounds


def run_id(run: Path) -> str:
    return str(read_config(run)["run"])


def charges(hospital: Path, run: str, *, what: str = "train") -> list[tuple[int, str]]:
    """Round and state of each charge of a run; the ledger is verified first. Nothing before there is a ledger."""
    site = load_site(hospital)
    if not (hospital / site.ledger.path).exists():
        return []
    with Ledger.open(hospital, site, create=False) as ledger:
        ledger.verify()
        events = [e for e in ledger.events() if e["run"] == run and e["kind"] in KINDS[what]]
    return [(int(e["round"]), str(e["state"])) for e in events]


def check_books(run: Path, hospitals: Iterable[Path]) -> None:
    """No under-count: what the coordinator has of a hospital, by digest, a settled charge of that round pays for.
    No double charge: no round of the run has two charges that count. The record names each round once."""
    name, records = run_id(run), read_rounds(run)
    assert [record["round"] for record in records] == list(range(1, len(records) + 1))
    for hospital in hospitals:
        for what in KINDS:
            numbers = [number for number, state in charges(hospital, name, what=what) if state != "voided"]
            assert len(numbers) == len(set(numbers)), f"{hospital.name} paid twice for {what}: {numbers}"
        site = load_site(hospital)
        with Ledger.open(hospital, site, create=False) as ledger:
            for record in records:
                said = record["epsilon"].get(site.hospital.name)
                if said is None or not said["release"]:
                    assert site.hospital.name not in record["trained"]
                    continue
                kinds = [kind for all_of in KINDS.values() for kind in all_of]
                paid = ledger.payable(name, record["round"], said["release"], kinds=kinds)
                assert paid is not None, f"{hospital.name}: no charge for its release of round {record['round']}"


def all_settled(run: Path, hospitals: Iterable[Path], *, rounds: int) -> None:
    """Each hospital has exactly one charge a round, and it is settled."""
    for hospital in hospitals:
        assert charges(hospital, run_id(run)) == [(number, "settled") for number in range(1, rounds + 1)], hospital
