"""The house keeps its floors: who may import whom, one door for each heavy dependency (../shared/design.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "fedmm.schema": 0, "fedmm.config": 0, "fedmm.registry": 0, "fedmm.errors": 0, "fedmm.seeds": 0,
    "fedmm.pretrained_folder": 0,
    "fedmm.data": 1, "fedmm.models": 1, "fedmm.privacy": 1,
    "fedmm.training": 2, "fedmm.federation": 3, "fedmm.report": 4, "fedmm.sites": 4,
    "fedmm.cli": 5, "fedmm.cli_ledger": 5, "fedmm.cli_scores": 5, "fedmm.cli_train": 5, "fedmm.cli_sites": 5, "fedmm.cli_kits": 5,
    "fedmm.cli_attack": 5, "fedmm.cli_audit": 5, "fedmm.cli_report": 5, "fedmm.terminal": 5,
    "client": 5, "server": 5,
}  # fmt: skip
DOORS = {
    "transformers": ("fedmm/models/pretrained.py",),
    "peft": ("fedmm/models/pretrained.py",),
    "tokenizers": ("fedmm/pretrained_folder.py",),
    "opacus": ("fedmm/privacy/engine.py", "fedmm/privacy/crosscheck.py"),
    "dp_accounting": ("fedmm/privacy/accounting.py",),
    "prometheus_client": ("fedmm/sites/metrics.py",),
    "tensorboardX": ("fedmm/report/trackers.py",),
    "flwr": ("fedmm/federation/", "client/", "server/", "fedmm/cli.py"),
}
WITHOUT_TORCH = (
    "fedmm/schema.py", "fedmm/config.py", "fedmm/registry.py", "fedmm/errors.py", "fedmm/seeds.py",
    "fedmm/pretrained_folder.py",
    "fedmm/privacy/ledger.py", "fedmm/privacy/chain.py", "fedmm/privacy/vault.py", "fedmm/privacy/accounting.py",
    "fedmm/privacy/losses.py",
    "fedmm/privacy/policy.py", "fedmm/privacy/plan.py", "fedmm/privacy/audit.py", "fedmm/privacy/trials.py", "fedmm/report/",
)  # fmt: skip
SOURCES = sorted(path for room in ("fedmm", "client", "server") for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, also inside functions; not what stands under `if TYPE_CHECKING:`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to."""
    found = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(found, key=len) if found else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if here is None:
        assert path.read_text() == "", f"{path} is in no room"
        return
    for module in imports(path):
        there = room(module)
        allowed = (
            there is None or there == here or FLOORS[there] < FLOORS[here] or FLOORS[here] == FLOORS[there] in (0, 5)
        )
        assert allowed, f"{path.relative_to(ROOT)} (floor {FLOORS[here]}) imports {module}"


@pytest.mark.parametrize("package", DOORS)
def test_each_heavy_dependency_has_its_doors(package: str) -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if any(module.split(".")[0] == package for module in imports(path)):
            assert name.startswith(DOORS[package]), f"{name} imports {package}"


def test_torch_stays_out_of_what_an_auditor_reads() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name.startswith(WITHOUT_TORCH):
            assert not [m for m in imports(path) if m.split(".")[0] == "torch"], name


def test_nothing_unpickles_and_nothing_seeds_privacy_noise() -> None:
    for path in SOURCES:
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        modules = {module.split(".")[0] for module in imports(path)}
        assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, name
        assert "torch.load(" not in text, name
        if name.startswith("fedmm/privacy/"):
            assert "fedmm.seeds" not in {m.rsplit(".", 1)[0] for m in imports(path)}, f"{name}: noise is never seeded"
            assert "manual_seed" not in text, name


def test_files_and_folders_stay_small() -> None:
    for path in SOURCES:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 400, f"{path.relative_to(ROOT)} has {len(lines)} lines: which room is missing?"
        assert len(path.relative_to(ROOT).parts) <= 3, f"{path} is too deep"
