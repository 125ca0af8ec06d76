"""Fixed features are made once for each study and read by later processes; nothing stale is ever read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from fedmm.data import check, dataset, kept
from fedmm.data.dataset import HospitalData, load_hospital
from fedmm.data.kept import FOLDER, MOST, FixedPart
from fedmm.errors import HospitalInvalid
from fedmm.schema import InputSpec, fixed

SPEC = InputSpec(image_size=16)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    dataset._CACHE.__init__()  # type: ignore[misc]


def mean(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1).mean(1, keepdim=True)


def load(folder: Path, identity: str = "a", *, names: tuple[str, ...] = ("image",)) -> HospitalData:
    """As a new process would."""
    dataset._CACHE.__init__()  # type: ignore[misc]
    parts: Mapping[str, FixedPart] = {name: FixedPart(identity, mean) for name in names}
    return load_hospital(folder, SPEC, parts=parts)


def test_features_stand_in_for_the_files_and_absent_ones_are_zero(hospital: Path) -> None:
    raw = load_hospital(hospital, SPEC)
    data = load(hospital)
    assert "image" not in data.inputs
    here = data.seen_SM[:, 0]
    torch.testing.assert_close(data.inputs[fixed("image")][here], mean(raw.inputs["image"][here]))
    assert not data.inputs[fixed("image")][~here].any()
    assert torch.equal(data.seen_SM, raw.seen_SM)
    assert set(data.cohort("all").batch([0]).inputs) == {fixed("image"), "report", "audio"}


def test_a_later_process_opens_no_file_of_the_modality(hospital: Path) -> None:
    first = load(hospital)
    readers = {name: reader for name, reader in check.READERS.items() if name != "image"}
    with mock.patch.object(check, "READERS", readers):  # decoding an image would be a KeyError
        again = load(hospital)
    assert torch.equal(again.inputs[fixed("image")], first.inputs[fixed("image")])


@pytest.mark.parametrize("change", ["identity", "file", "damage", "fedmm"])
def test_another_part_a_changed_file_a_damaged_copy_or_another_fedmm_is_made_again(
    hospital: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(hospital)
    there = next((hospital / FOLDER).iterdir())
    if change == "file":
        os.utime(hospital / "a.png", ns=(1, 1))
    if change == "damage":
        there.write_bytes(there.read_bytes()[:-4])
    if change == "fedmm":
        monkeypatch.setattr(kept, "installed_version", lambda: "9.9")
    calls: list[int] = []

    def compute(value: torch.Tensor) -> torch.Tensor:
        calls.append(len(value))
        return mean(value)

    dataset._CACHE.__init__()  # type: ignore[misc]
    part = FixedPart("b" if change == "identity" else "a", compute)
    made = load_hospital(hospital, SPEC, parts={"image": part})
    assert calls == [int(made.seen_SM[:, 0].sum())]


def test_a_file_that_broke_since_is_still_found(hospital: Path) -> None:
    load(hospital)
    (hospital / "a.png").write_bytes(b"junk")
    with pytest.raises(HospitalInvalid):
        load(hospital)


def test_only_the_owner_may_read_it_and_old_ones_go(hospital: Path) -> None:
    for number in range(MOST + 2):
        load(hospital, str(number))
    files = list((hospital / FOLDER).iterdir())
    assert len(files) == MOST
    assert {file.stat().st_mode & 0o077 for file in [*files, hospital / FOLDER]} == {0}


def test_what_a_withdrawn_patient_left_goes_with_the_next_load(hospital: Path) -> None:
    load(hospital)
    (before,) = (hospital / FOLDER).iterdir()
    left = hospital / FOLDER / "killed.part"
    left.write_bytes(b"features")
    os.utime(left, (1, 1))
    manifest = (hospital / "manifest.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (hospital / "manifest.csv").write_text("".join(manifest[:-1]), encoding="utf-8")
    load(hospital)
    (after,) = (hospital / FOLDER).iterdir()
    assert after != before


def test_a_folder_that_cannot_be_written_is_served_all_the_same(hospital: Path) -> None:
    (hospital / FOLDER).write_text("a file in the way")
    assert load(hospital).inputs[fixed("image")].shape[1] == 1
