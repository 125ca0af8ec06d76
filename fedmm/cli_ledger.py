"""`fedmm ledger …`: what a hospital spent, what left it, and how to look after the ledger."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedmm.config import RunConfig, SiteLedger
from fedmm.errors import ConfigError, PolicyRefused
from fedmm.terminal import EXIT_NO, Adder, format_argument, hospital_argument, open_site, or_dash, print_json

if TYPE_CHECKING:
    from fedmm.privacy.chain import Head
    from fedmm.privacy.ledger import Ledger


def show(args: argparse.Namespace) -> int:
    from fedmm.privacy import statement

    with _look(args.hospital) as ledger:
        content = statement.show(ledger)
    if args.format == "json":
        print_json(content)
    else:
        print(_text(content))
    return 0


def verify(args: argparse.Namespace) -> int:
    from fedmm.errors import LedgerUnusable
    from fedmm.privacy.ledger import Ledger

    site = open_site(args.hospital)
    heads = _heads(args.against, site.hospital.name) if args.against else []
    try:
        with Ledger.open(args.hospital, site, create=False) as ledger:
            ledger.verify(against=heads)
            rows = ledger.head().seq
    except LedgerUnusable as error:
        if args.format == "json":
            print_json({"ok": False, "problem": error.what})
        else:
            print(error)
        return EXIT_NO
    if args.format == "json":
        print_json({"ok": True, "rows": rows})
    else:
        print(f"{args.hospital}: {rows} rows, chain and signatures are intact")
    return 0


def export(args: argparse.Namespace) -> int:
    from fedmm.privacy import statement

    with _look(args.hospital) as ledger:
        print_json(statement.export(ledger))
    return 0


def forecast(args: argparse.Namespace) -> int:
    from fedmm.privacy import statement
    from fedmm.privacy.plan import Event, make_plan

    with _look(args.hospital) as ledger:
        rounds = [event for event in statement.export(ledger)["events"] if event["kind"] == "train"]
        event = Event.from_dict({k: rounds[-1][k] for k in Event.__dataclass_fields__}) if rounds else None
        event = event or make_plan(RunConfig()).round_event(1)  # nothing spent yet: the default plan
        left, epsilon, ceiling = ledger.forecast(event), ledger.epsilon(), ledger.spent().ceiling
    if args.format == "json":
        print_json({"rounds_left": left, "like": event.to_dict(), "epsilon": epsilon, "ceiling": ceiling})
    else:
        print(
            f"{left} more round(s) of {event.steps} step(s) with noise {event.noise_multiplier:.3f} and sampling rate "
            f"{event.sampling_rate:g} fit: epsilon is {epsilon:.4f} of {ceiling:g}"
        )
    return 0


def rotate(args: argparse.Namespace) -> int:
    from fedmm.privacy.ledger import Ledger

    with Ledger.open(args.hospital, open_site(args.hospital), create=False) as ledger:
        public = ledger.rotate()
        row = ledger.head().seq
    if args.format == "json":
        print_json({"public_key": public, "row": row})
    else:
        print(
            f"from row {row} on the key is {public[:16]}…; back up ledger and key together, destroy copies of the old key"
        )
    return 0


def split(args: argparse.Namespace) -> int:
    """A ledger of its own for a folder of other patients."""
    from fedmm.data.dataset import patient_keys
    from fedmm.privacy import roster
    from fedmm.privacy.ledger import Ledger

    site, new = open_site(args.hospital), open_site(args.new)
    if new.hospital.name == site.hospital.name:
        raise ConfigError(f"both folders are {site.hospital.name}", fix="give the new one its own hospital.name")
    with Ledger.open(args.hospital, site, create=False) as ledger:
        if (args.new / new.ledger.path).exists() and not roster.path_of(args.new / new.ledger.path).exists():
            raise PolicyRefused(
                "the new folder has a ledger already, and no list of the patients under it",
                fix=f"restore {roster.path_of(args.new / new.ledger.path)} from the latest backup",
            )
        roster.split(args.hospital / site.ledger.path, args.new / new.ledger.path, patient_keys(args.new))
        with Ledger.open(args.new, new, split_off=True) as other:
            other.record_split(site.hospital.name, ledger.public_key())
            ledger.record_split(new.hospital.name, other.public_key())
    if args.format == "json":
        print_json({"hospital": site.hospital.name, "split_off": new.hospital.name})
    else:
        print(
            f"{new.hospital.name} has a ledger of its own: none of its patients was ever under {site.hospital.name}'s, "
            "and each of the two refuses a patient of the other from now on"
        )
    return 0


def add_commands(add: Adder) -> None:
    for name, run, text in (
        ("show", show, "what was spent, by three accountants, and what left the building"),
        ("verify", verify, "exit 1 if a row was changed, removed or added"),
        ("export", export, "the events as JSON, to recompute epsilon elsewhere"),
        ("forecast", forecast, "how many more rounds like the last one fit under the ceiling"),
        ("rotate", rotate, "a new signing key, named by the old one"),
        ("split", split, "a ledger of its own for a folder of other patients"),
    ):
        last = " HOSPITALS/hospital_2" if name == "split" else ""
        sub = add(name, run, text, f"fedmm ledger {name} HOSPITALS/hospital_1{last}")
        hospital_argument(sub)
        if name == "split":
            sub.add_argument("new", metavar="NEW", type=Path, help="folder of the patients who get a new ledger")
        format_argument(sub)
        if name == "verify":
            sub.add_argument(
                "--against", type=Path, metavar="RUN", help="also compare with what the ledger said in this run"
            )


@contextmanager
def _look(hospital: Path) -> Iterator[Ledger]:
    """The ledger of a hospital. One that has never trained gets none by being looked at: an empty one elsewhere stands in
    for it, or a ledger that was taken away would be replaced by looking for it."""
    from fedmm.privacy import vault
    from fedmm.privacy.ledger import Ledger

    site = open_site(hospital)
    path = hospital / site.ledger.path
    if any(path.with_suffix(suffix).exists() for suffix in (path.suffix, ".key", vault.PATIENTS)):
        with Ledger.open(hospital, site, create=False) as ledger:
            yield ledger
        return
    with (
        TemporaryDirectory() as empty,
        Ledger.open(Path(empty), site.model_copy(update={"ledger": SiteLedger()})) as ledger,
    ):
        yield ledger


def _heads(run: Path, hospital: str) -> list[Head]:
    """What the ledger of a hospital said about itself in a run. Raises: ConfigError if it was not in it."""
    from fedmm.privacy.chain import Head
    from fedmm.report.record import read_config, read_rounds

    read_config(run)
    said = [record["epsilon"][hospital] for record in read_rounds(run) if hospital in record["epsilon"]]
    if not said:
        raise ConfigError(f"{hospital} trained in no round of {run}", fix="give a run that it took part in")
    return [Head(each["ledger_sequence"], each["ledger_hash"], each["ledger_signature"]) for each in said]


def _text(content: dict[str, Any]) -> str:
    lines = [
        f"unit       {content['unit']}, {content['relation'].replace('_', ' ')}",
        f"epsilon    {content['epsilon']:.4f} of {content['ceiling']:g} at delta {content['delta']:g} (PLD, the number of record)",
        f"           {or_dash(content['epsilon_prv'])} by PRV, {or_dash(content['epsilon_rdp'])} by RDP",
        f"releases   {content['releases']}, reserved and not settled {content['reserved']}, refused {content['refusals']}",
        f"head       row {content['head']['sequence']}, {content['head']['hash'][:16]}",
        f"key        {content['public_key'][:16]}…",
    ]
    if content["not_private"]:
        lines.append(
            f"NOT PRIVATE {content['not_private']} release(s) left without protection under a research policy; "
            "epsilon does not cover them"
        )
    for run in content["by_run"]:
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in run.items()))
    lines.append("what left  " + ("" if content["sent"] else "nothing"))
    for kind in content["sent"]:
        said = {"yes": "charged", "no": "NOT covered by epsilon"}.get(kind["covered"], "holds nothing of a patient")
        lines.append(f"  {kind['messages']} x {kind['what']}, {kind['bytes']:,} bytes, {said}")
    return "\n".join(lines)
