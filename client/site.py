"""What only this hospital knows: its folder, its policy, its ledger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flwr.app import Context

from fedmm.config import SiteConfig, find_hospitals, load_site
from fedmm.data.dataset import HospitalData, load_hospital
from fedmm.data.kept import FOLDER, FixedPart
from fedmm.errors import FedmmError, PolicyRefused
from fedmm.privacy.ledger import Ledger
from fedmm.schema import InputSpec

HOSPITALS_VARIABLE = "FEDMM_HOSPITALS"  # folder of hospitals, for simulation runtimes that pass no node config


@dataclass
class Site:
    """One hospital as its ClientApp sees it, for the time of one message."""

    folder: Path
    config: SiteConfig

    @property
    def name(self) -> str:
        return self.config.hospital.name

    @cached_property
    def ledger(self) -> Ledger:
        """Opened at the first use. Raises: LedgerUnusable."""
        return Ledger.open(self.folder, self.config)

    @property
    def state(self) -> Path:
        """Where this hospital's clients keep what they need beside the ledger; for its owner's eyes only."""
        return self.folder / FOLDER

    def close(self) -> None:
        if "ledger" in vars(self):
            self.ledger.close()

    def data(self, spec: InputSpec, parts: Mapping[str, FixedPart]) -> HospitalData:
        """parts: as in load_hospital. Raises: HospitalInvalid with the list that `fedmm check` prints."""
        return load_hospital(self.folder, spec, parts=parts)


def open_site(context: Context) -> Site:
    """The hospital of this node. Raises: PolicyRefused if it cannot be found or its site.toml is missing or wrong.

    A real site says where its folder is (`--node-config 'site="/etc/fedmm/hospital"'`). Under a simulation runtime, which
    numbers its nodes, hospital i is the i-th folder of `data.hospitals`; a coordinator cannot point a real site elsewhere.
    """
    given = context.node_config.get("site")
    folder = Path(str(given)) if given is not None else _numbered(context)
    return Site(folder, load_site(folder))


def _numbered(context: Context) -> Path:
    number = context.node_config.get("partition-id")
    if number is None:
        raise PolicyRefused(
            "this node does not know its hospital folder",
            fix="start it with --node-config 'site=\"/path/to/hospital\"'",
        )
    folder = os.environ.get(HOSPITALS_VARIABLE) or str(context.run_config.get("data.hospitals", ""))
    try:
        hospitals = find_hospitals(Path(folder).expanduser())
    except FedmmError:
        raise PolicyRefused(
            "no hospital folders on this machine", fix="fedmm synth, then give -c 'data.hospitals=\"/absolute/path\"'"
        ) from None
    if int(number) >= len(hospitals):
        raise PolicyRefused(
            f"node {number} has no hospital: there are {len(hospitals)} folders",
            fix="start as many SuperNodes as there are hospitals",
        )
    return hospitals[int(number)]
