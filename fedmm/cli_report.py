"""`fedmm report`: the page about a run, and the privacy report that a data protection officer signs and anybody checks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmm.errors import ConfigError
from fedmm.terminal import EXIT_NO, Adder, format_argument, print_json

if TYPE_CHECKING:
    from fedmm.report.seal import Check


def add_commands(add: Adder) -> None:
    sub = add(
        "report",
        report,
        "write RUN/report.html again; the privacy report of a run; check one",
        "fedmm report RUN --privacy HOSPITALS/hospital_1",
    )
    sub.add_argument("run", metavar="RUN", type=Path, nargs="?", help="run folder")
    sub.add_argument(
        "--privacy",
        metavar="HOSPITAL",
        type=Path,
        nargs="*",
        help="the privacy report, signed, of each hospital folder; of none: of those that the run was simulated with, or "
        "unsigned from the coordinator's records",
    )
    sub.add_argument("--audit", metavar="AUDIT", type=Path, help="what fedmm audit wrote (folder, or audit.json)")
    sub.add_argument(
        "--compare", metavar="OPEN_RUN", type=Path, help="a run without privacy, to show what privacy costs"
    )
    sub.add_argument("--days", type=_days, default=365, metavar="N", help="how long the privacy report holds (365)")
    sub.add_argument(
        "--verify", metavar="FILE", type=Path, help="check a privacy report (.json or .html); exit 1 if not good"
    )
    sub.add_argument(
        "--key",
        default="",
        metavar="KEY",
        help="with --verify: the public key you know, or a ledger head SEQUENCE:HASH",
    )
    sub.add_argument(
        "--at",
        type=Path,
        metavar="HOSPITAL",
        help="with --verify: also compare with the ledger of this hospital folder",
    )
    format_argument(sub)


def report(args: argparse.Namespace) -> int:
    if args.verify is not None:
        if args.run is not None or args.privacy is not None:
            raise ConfigError(
                "--verify takes a file and nothing else", fix="fedmm report --verify RUN/privacy-NAME.json"
            )
        return _verify(args)
    if args.run is None:
        raise ConfigError("which run?", fix="fedmm report RUN, or fedmm report --verify FILE")
    if args.privacy is None:
        from fedmm.report.render import write_report

        page = write_report(args.run)
        if args.format == "json":
            print_json({"files": [str(page)]})
        else:
            print(page)
        return 0
    return _privacy(args)


def _privacy(args: argparse.Namespace) -> int:
    from fedmm.report import disclosure, seal
    from fedmm.report.privacy import draw

    sources = disclosure.Sources(args.run, audit=args.audit, compare=args.compare, days=args.days)
    hospitals = args.privacy or _simulated(args.run)
    written: list[str] = []
    for hospital in hospitals:
        document = disclosure.of_hospital(sources, hospital)
        files = seal.seal(document, draw, hospital=hospital)
        written += _write(args.run, f"privacy-{document['hospital']}", files)
    if not hospitals:
        written += _write(args.run, "privacy", seal.seal(disclosure.of_run(sources), draw, hospital=None))
    if args.format == "json":
        print_json({"signed": bool(hospitals), "files": written})
    else:
        print("\n".join(written))
        if not hospitals:
            print(
                "unsigned: made from the coordinator's records alone; a hospital signs its own with --privacy HOSPITAL"
            )
    return 0


def _simulated(run: Path) -> list[Path]:
    """The hospital folders that a run on this machine used, as far as they and their ledgers are still there."""
    from fedmm.config import find_hospitals, load_site
    from fedmm.report.record import read_config

    config: Mapping[str, Any] = read_config(run)
    place = Path(str(config["settings"].get("data.hospitals", "")))
    if not place.is_absolute() or not place.is_dir():  # of a run across sites it is a default that means nothing
        return []
    known = {folder: load_site(folder) for folder in find_hospitals(place)}
    ours = {folder: site for folder, site in known.items() if site.hospital.name in config.get("hospitals", [])}
    return [folder for folder, site in ours.items() if (folder / site.ledger.path).exists()]


def _write(folder: Path, name: str, files: tuple[str, str]) -> list[str]:
    written = []
    for suffix, content in zip((".json", ".html"), files, strict=True):
        target, part = folder / f"{name}{suffix}", folder / f".{name}{suffix}.{os.getpid()}"
        part.write_bytes(content.encode())
        os.replace(part, target)
        written.append(str(target))
    return written


def _verify(args: argparse.Namespace) -> int:
    from fedmm.report.privacy import draw
    from fedmm.report.seal import compare, verify

    checks = verify(args.verify, draw, key=args.key)
    if args.at is not None and all(check.passed is not False for check in checks):
        checks += compare(args.verify, args.at)
    good = all(check.passed is not False for check in checks)
    if args.format == "json":
        print_json({"ok": good, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            print(f"{_SAID[check.passed]:<8} {check.name:<10} {check.text}")
        print(f"{args.verify}: {_verdict(checks)}")
    return 0 if good else EXIT_NO


def _verdict(checks: Sequence[Check]) -> str:
    """In one line."""
    if any(check.passed is False for check in checks):
        return "NOT GOOD: do not rely on it"
    if any(check.name == "drawing" and check.passed is None for check in checks):
        return "good, but the page was not drawn again (another version drew it): read the JSON"
    return "good"


_SAID = {True: "ok", False: "NO", None: "not done"}


def _days(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 3650:
        raise argparse.ArgumentTypeError(f"{number} is not in 1 to 3650")
    return number
