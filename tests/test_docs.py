"""What the documentation says is true: scripts run, names exist, nothing points nowhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedmm.cli import build_parser
from fedmm.errors import REFUSALS, UNEXPECTED_CODE
from fedmm.privacy.accounting import epsilon_pld
from fedmm.privacy.plan import Event

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_script_of_the_privacy_page_recomputes_epsilon_from_an_export(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/privacy.md").read_text(), flags=re.DOTALL)
    events = [Event("train", 4.2, 1.0, 1)] * 20 + [Event("train", 1.1, 0.25, 2)] * 10
    rows = [{"seq": i, **e.to_dict(), "run": "r", "round": i, "state": "settled"} for i, e in enumerate(events)]
    (tmp_path / "events.json").write_text(json.dumps({"delta": 1e-4, "events": rows, "unprotected": []}))
    (tmp_path / "recompute.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "recompute.py"), str(tmp_path / "events.json")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(epsilon_pld(events, 1e-4), abs=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_tests_named_in_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name
    for name in re.findall(r"`((?:tests|fedmm|client|server|deploy|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_names_every_source_file_and_shows_code_by_line_25() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("from fedmm") for line in lines[:25])
    files = "\n".join(lines)[("\n".join(lines)).index("## Files") :]
    for path in [p for room in ("fedmm", "client", "server") for p in (ROOT / room).rglob("*.py")]:
        if path.name != "__init__.py":
            assert path.name in files, path


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"^    (\w+) ", build_parser().format_help(), flags=re.MULTILINE):
        assert f"fedmm {name}" in text, name


def test_every_refusal_has_its_line_in_the_page_of_errors() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    for code, kind in REFUSALS.items():
        assert f"| {code} | {kind('x').name} |" in text
    assert f"| {UNEXPECTED_CODE} | UNEXPECTED |" in text
