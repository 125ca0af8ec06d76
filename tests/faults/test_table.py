"""docs/reliability.md and the tests name each other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def rows() -> list[list[str]]:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def functions_in(folder: Path) -> set[str]:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py"))
    return set(re.findall(r"^def (test_\w+)\(", sources, flags=re.MULTILINE))


def test_every_row_says_all_there_is_to_say_and_names_tests_that_exist() -> None:
    known = functions_in(ROOT / "tests")
    for row in rows():
        *said, tests = row
        assert len(said) == 4, row
        assert all(said[1:]), row
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, row
        assert set(named) <= known, row


def test_every_fault_that_is_tested_has_its_row() -> None:
    named = {name for row in rows() for name in re.findall(r"`(test_\w+)`", row[-1])}
    own = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert functions_in(HERE) - own <= named
