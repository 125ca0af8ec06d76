"""What the commands of `fedmm` share: their arguments and how they speak."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmm.config import SiteConfig, load_site
from fedmm.errors import ConfigError

EXIT_NO, EXIT_WRONG_USE, EXIT_FAILED, EXIT_INTERRUPTED = 1, 2, 4, 130
EXITS = "exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 refused, 4 failed (docs/errors.md)"
Command = Callable[[argparse.Namespace], int]
Adder = Callable[[str, Command, str, str], argparse.ArgumentParser]


def adder(commands: Any) -> Adder:
    """A function that adds one command: name, what runs it, one sentence, an example."""

    def add(name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}\n{EXITS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_command=run)
        return sub

    return add


def hospital_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("hospital", metavar="HOSPITAL", type=Path, help="hospital folder")


def run_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", type=Path, help="run folder")


def format_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--format", choices=["text", "json"], default="text", help="text (default) or json")


def open_site(hospital: Path) -> SiteConfig:
    """The policy of a folder that a person typed. Raises: ConfigError if there is none; as load_site."""
    if not hospital.is_dir():
        raise ConfigError(f"there is no hospital folder {hospital}", fix="check the path")
    return load_site(hospital)


def or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))
