"""Who may connect: the SuperLink's list of nodes follows federation.json, names and keys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmm.sites.kit import NODE_PUBLIC, open_kit
from server.link import Link
from tests.sites.federation import office, provision


class Control:
    """A SuperLink's Control API, as far as nodes go."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def ListNodes(self, request: Any) -> Any:
        return SimpleNamespace(nodes_info=self.nodes)

    def RegisterNode(self, request: Any) -> None:
        number, status = len(self.nodes) + 1, "registered"
        assert request.public_key not in [node.public_key for node in self.nodes], "Flower takes a key once"
        self.nodes.append(
            SimpleNamespace(
                node_id=number, name=request.name, status=status, online_until=0, public_key=request.public_key
            )
        )

    def UnregisterNode(self, request: Any) -> None:
        self.nodes[request.node_id - 1].status = "unregistered"


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tmp_path / "kits")
    return tmp_path / "kits"


def admit(kits: Path, control: Control) -> list[str]:
    link = Link(open_kit(kits / "coordinator"))
    link._client.close()
    link._client = control  # type: ignore[assignment]
    return link.admit()


def known(control: Control) -> dict[str, bytes]:
    return {node.name: node.public_key for node in control.nodes if node.status != "unregistered"}


def keys(kits: Path, *names: str) -> dict[str, bytes]:
    files = {name: (kits / name / NODE_PUBLIC).read_bytes() for name in names}
    return {name: public_key_to_bytes(load_ssh_public_key(line)) for name, line in files.items()}  # type: ignore[arg-type]


def test_hospitals_of_the_description_are_admitted_once(kits: Path) -> None:
    control = Control()
    assert admit(kits, control) == ["north", "south"]
    assert admit(kits, control) == []
    assert known(control) == keys(kits, "north", "south")


def test_a_hospital_whose_keys_were_renewed_connects_with_the_new_one_and_no_longer_with_the_old(kits: Path) -> None:
    control = Control()
    admit(kits, control)
    old = known(control)
    with office(kits) as opened:
        opened.renew("north", new_keys=True)
    assert admit(kits, control) == ["north"]
    assert known(control) == keys(kits, "north", "south")
    assert (known(control)["north"] != old["north"], known(control)["south"]) == (True, old["south"])
    assert admit(kits, control) == []


def test_a_withdrawn_hospital_is_taken_off_the_list(kits: Path) -> None:
    control = Control()
    admit(kits, control)
    with office(kits) as opened:
        opened.revoke("north")
    assert admit(kits, control) == []
    assert set(known(control)) == {"south"}
