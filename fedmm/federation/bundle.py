"""The bundle (FAB) of a run between real sites: the code that is installed here, and nothing else.

Flower carries an app's code from the coordinator to every hospital and runs it there. A hospital of fedmm runs what it
installed; the bundle only has to say that the coordinator runs the same. Building it is deterministic, so two sites with the
same fedmm make the same bytes, and a hash that differs is another code (docs/threat-model.md).
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

import tomli_w
from flwr.cli.build import build_fab_from_files

import fedmm
from fedmm.config import RunConfig, installed_version

ROOMS = ("client", "fedmm", "server")


@lru_cache(maxsize=1)
def bundle() -> bytes:
    """The FAB of the installed code, the same bytes wherever the same code is."""
    root = Path(fedmm.__path__[0]).parent
    files = {
        str(path.relative_to(root)): path.read_bytes() for room in ROOMS for path in sorted((root / room).rglob("*.py"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a pattern's name in flwr
        fab, _ = build_fab_from_files({"pyproject.toml": _description().encode(), **files})
    return _stored(fab)


def _stored(fab: bytes) -> bytes:
    """The same archive without compression: another zlib would give other bytes for the same code."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(fab)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), old.read(entry))
    return made.getvalue()


def bundle_hash() -> str:
    """SHA-256 of `bundle`, hexadecimal: what Flower calls the FAB's hash."""
    return hashlib.sha256(bundle()).hexdigest()


def _description() -> str:
    """pyproject.toml of the bundle: not the repository's, which an installed fedmm does not have."""
    app = {
        "publisher": "fedmm",
        "fab-include": [f"{room}/**/*.py" for room in ROOMS],
        "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
        "config": RunConfig().flat(),
    }
    version = installed_version().partition("+")[0]
    return tomli_w.dumps(
        {"project": {"name": "fedmm", "version": version, "dependencies": []}, "tool": {"flwr": {"app": app}}}
    )
