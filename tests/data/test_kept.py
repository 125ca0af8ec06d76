"""Each file is decoded once, ever; later epochs, processes and runs read rows from disk; nothing stale or damaged is ever read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fedmm.config import TrainingConfig
from fedmm.data import check, dataset, kept
from fedmm.data.dataset import HospitalData, load_hospital
from fedmm.data.kept import FOLDER, KEY_FILE, FixedPart
from fedmm.data.rows import transform_of
from fedmm.errors import HospitalInvalid
from fedmm.schema import MODALITIES, InputSpec, fixed
from fedmm.training.augment import vary
from tests.data.conftest import ROWS, ramp, tensors, tone, write_manifest, write_wav

SPEC = InputSpec(image_size=16, report_tokens=16, audio_seconds=0.2, audio_mels=8)
OTHER = SPEC.model_copy(update={"image_size": 24})
STUDIES = 12


@pytest.fixture(autouse=True)
def forgotten() -> None:
    dataset._CACHE.__init__()  # type: ignore[misc]


@pytest.fixture
def hospital(hospital: Path) -> Path:
    """Patients p0, p1, … with a file of each modality of their own, which differ."""
    rng = np.random.default_rng(3)
    for number in range(STUDIES):
        Image.fromarray(ramp() + rng.integers(0, 99, (48, 40), dtype=np.uint8)).save(hospital / f"{number}.png")
        (hospital / f"{number}.txt").write_text(f"Report number{'abcdefghijkl'[number]} is normal.", encoding="utf-8")
        write_wav(hospital / f"{number}.wav", tone(hertz=300.0 + 50 * number))
    write_manifest(hospital, *(row(number) for number in range(STUDIES)))
    return hospital


def row(number: int) -> str:
    return f"p{number},s{number},{number}.png,{number}.txt,{number}.wav,1,0,mild,train"


def load(folder: Path, spec: InputSpec = SPEC, **parts: FixedPart) -> HospitalData:
    """As a new process would."""
    dataset._CACHE.__init__()  # type: ignore[misc]
    return load_hospital(folder, spec, parts=parts)


@pytest.fixture
def opened() -> Iterator[Counter[str]]:
    """How often each file was read by its reader."""
    count: Counter[str] = Counter()

    def counting(name: str) -> Callable[[Path, InputSpec], np.ndarray]:
        reader = check.READERS[name]

        def read(path: Path, spec: InputSpec) -> np.ndarray:
            count[path.name] += 1
            return reader(path, spec)

        return read

    with mock.patch.object(check, "READERS", {name: counting(name) for name in MODALITIES}):
        yield count


def say(hospital: Path, text: str) -> None:
    """One more section of site.toml."""
    site = hospital / "site.toml"
    first = text.split("\n")[0]
    before = site.read_text(encoding="utf-8").partition(f"\n{first}")[0]
    site.write_text(f"{before}\n{text}\n", encoding="utf-8")


def shards(hospital: Path) -> list[Path]:
    return sorted((hospital / FOLDER).glob("*.safetensors"))


def same(one: HospitalData, other: HospitalData) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def decoded(folder: Path, numbers: range) -> dict[str, torch.Tensor]:
    """By the readers alone."""
    ends = {"image": "png", "report": "txt", "audio": "wav"}
    return {
        name: torch.from_numpy(np.stack([check.READERS[name](folder / f"{n}.{end}", SPEC) for n in numbers]))
        for name, end in ends.items()
    }


# --- what is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["read", "mapped", "sealed"])
def test_a_later_process_opens_no_file_and_has_the_same_bits(
    hospital: Path, where: str, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "mapped":
        monkeypatch.setattr(kept, "MAPPED_BYTES", 0)
    if where == "sealed":
        say(hospital, "[cache]\nencrypted = true")
    expected = decoded(hospital, range(STUDIES))
    opened.clear()
    first = load(hospital)
    assert set(opened.values()) == {1}
    assert len(opened) == 3 * STUDIES
    again = load(hospital)
    assert set(opened.values()) == {1}
    for data in (first, again):
        assert all(torch.equal(value, expected[name]) for name, value in tensors(data).items())
        assert (data.held == 0) == (where == "mapped")


def test_many_threads_give_the_bits_of_one(hospital: Path, tmp_path: Path) -> None:
    say(hospital, "[limits]\nthreads = 1\n[cache]\ngigabytes = 0")
    one = load(hospital)
    say(hospital, "[limits]\nthreads = 5\n[cache]\ngigabytes = 0")
    assert same(load(hospital), one)


def test_one_changed_file_and_one_new_study_are_decoded_alone(hospital: Path, opened: Counter[str]) -> None:
    load(hospital)
    opened.clear()
    (hospital / "3.txt").write_text("Effusion.", encoding="utf-8")
    load(hospital)
    assert opened == {"3.txt": 1}
    opened.clear()
    for end in ("png", "txt", "wav"):
        (hospital / f"99.{end}").write_bytes((hospital / f"1.{end}").read_bytes())
    write_manifest(hospital, row(99), *(row(number) for number in range(STUDIES)))
    data = load(hospital)
    assert opened == {"99.png": 1, "99.txt": 1, "99.wav": 1}
    expected = decoded(hospital, range(STUDIES))
    assert all(torch.equal(value[1:], expected[name]) for name, value in tensors(data).items())


def test_files_that_many_studies_share_and_absent_ones_are_served(hospital: Path) -> None:
    write_manifest(hospital, *ROWS)
    load(hospital)
    value, data = tensors(load(hospital)), load(hospital)
    for axis, name in enumerate(MODALITIES):
        assert value[name][data.seen_SM[:, axis]].any()
        assert not value[name][~data.seen_SM[:, axis]].any()
    assert torch.equal(value["image"][0], value["image"][1])


@pytest.mark.parametrize("what", ["fedmm", "library", "reader", "spec"])
def test_what_other_code_made_is_not_read(
    hospital: Path, tmp_path: Path, what: str, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(hospital)
    if what == "fedmm":
        monkeypatch.setattr(kept, "installed_version", lambda: "9.9")
    if what == "library":
        monkeypatch.setattr(kept, "version", lambda name: "9.9")
    if what == "reader":
        (tmp_path / "image.py").write_text("# another one")
        monkeypatch.setattr(kept, "__file__", str(tmp_path / "kept.py"))
    kept._code.cache_clear()
    load(hospital, OTHER if what == "spec" else SPEC)
    kept._code.cache_clear()
    assert set(opened.values()) == {2}


def test_another_tokeniser_of_the_same_name_is_another_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMM_PRETRAINED", str(tmp_path))
    (tmp_path / "bert").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "bert" / name).write_text("{}")
    spec = SPEC.model_copy(update={"report_tokenizer": "bert"})
    before = transform_of(spec)
    (tmp_path / "bert/tokenizer.json").write_text("{ }")
    assert len({before, transform_of(spec), transform_of(SPEC)}) == 3


def test_a_broken_file_is_found_each_time_and_the_others_are_decoded_once(hospital: Path, opened: Counter[str]) -> None:
    good = (hospital / "5.png").read_bytes()
    (hospital / "5.png").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(HospitalInvalid) as caught:
            load(hospital)
        assert [(found.row, found.code) for found in caught.value.problems] == [(7, "broken_image")]
    (hospital / "5.png").write_bytes(good)
    load(hospital)
    assert opened.pop("5.png") == 3
    assert set(opened.values()) == {1}


def test_progress_counts_studies_and_is_silent_when_all_is_there(hospital: Path) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        dataset._CACHE.__init__()  # type: ignore[misc]
        load_hospital(hospital, SPEC, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, STUDIES) for done in range(1, STUDIES + 1)]


def test_augmentation_varies_a_batch_and_never_what_is_kept(hospital: Path) -> None:
    data = load(hospital)
    config = TrainingConfig(augment="image,report,audio", augment_copies=2)
    batch = data.cohort("all").batch(range(3))
    assert torch.isfinite(vary(batch, config, seed=1, spec=SPEC).inputs["image"]).all()
    batch.inputs["image"].zero_()
    assert data.cohort("all").batch(range(3)).inputs["image"].any()


# --- damage, kills, other processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "bit", "keys", "foreign", "empty", "long"])
def test_a_damaged_or_foreign_shard_is_made_again(
    hospital: Path,
    damage: str,
    sealed: bool,  # noqa: FBT001
    opened: Counter[str],
) -> None:
    if sealed:
        say(hospital, "[cache]\nencrypted = true")
    first = load(hospital)
    victim = next(path for path in shards(hospital) if path.name.startswith("image"))
    content = bytearray(victim.read_bytes())
    if damage == "bit":
        content[-50] ^= 1
    if damage == "keys":
        at = 8 + int.from_bytes(content[:8], "little")
        content = content[:at] + bytes(byte ^ 1 for byte in content[at:])
    changed = {"cut": content[:-4], "foreign": b"{}", "empty": b"", "long": b"\xff" * 8 + bytes(content)}
    victim.write_bytes(changed.get(damage, bytes(content)))
    opened.clear()
    assert same(load(hospital), first)
    assert opened == {f"{number}.png": 1 for number in range(STUDIES)}
    opened.clear()
    assert same(load(hospital), first)
    assert not opened
    assert len(shards(hospital)) == 3


DYING = """
import os, sys
from pathlib import Path
from fedmm.data import dataset, kept
from fedmm.schema import InputSpec
kept.SHARD_BYTES = 3 * 4 * 16 * 16  # three images
write, count = os.fsync, 0
def dying(descriptor):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), 9)
    write(descriptor)
os.fsync = dying
dataset.load_hospital(Path(sys.argv[1]), InputSpec.model_validate_json(sys.argv[2]))
"""


def test_a_writer_killed_in_the_middle_leaves_what_was_whole_and_nothing_else_is_read(
    hospital: Path, opened: Counter[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(hospital), SPEC.model_dump_json()], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert list((hospital / FOLDER).glob("*.part"))
    assert len(shards(hospital)) == 2
    data = load(hospital)
    assert 0 < sum(opened.values()) < 3 * STUDIES
    assert not list((hospital / FOLDER).glob("*.part"))
    expected = decoded(hospital, range(STUDIES))
    assert all(torch.equal(value, expected[name]) for name, value in tensors(data).items())


def test_two_loads_at_once_decode_each_file_once(hospital: Path, opened: Counter[str]) -> None:
    found: list[HospitalData] = []
    both = threading.Barrier(2)

    def work() -> None:
        both.wait()
        found.append(load_hospital(hospital, SPEC))

    with mock.patch.object(dataset._CACHE, "get", return_value=None):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same(*found)
    assert set(opened.values()) == {1}


def test_rows_that_another_process_took_away_are_still_there_for_who_maps_them(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MAPPED_BYTES", 0)
    data = load(hospital)
    before = tensors(data)
    for shard in shards(hospital):
        shard.unlink()
    assert all(torch.equal(value, before[name]) for name, value in tensors(data).items())


@pytest.mark.parametrize("obstacle", ["full disk", "file in the way", "no folder"])
def test_what_cannot_be_kept_is_held_in_memory(hospital: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "file in the way":
        (hospital / FOLDER).write_text("")
    if obstacle == "full disk":
        monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "no space")))
    if obstacle == "no folder":
        monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=PermissionError))
    data, expected = load(hospital), decoded(hospital, range(STUDIES))
    assert all(torch.equal(value, expected[name]) for name, value in tensors(data).items())
    assert data.held == sum(value.nbytes for value in expected.values())
    assert not [path for path in hospital.glob(f"{FOLDER}/*") if path.name != kept.LOCK]


# --- what stays on disk -------------------------------------------------------------------------------------------------


def traces(hospital: Path, rows: Mapping[str, torch.Tensor]) -> int:
    """In how many files of the folder one of these rows can be found."""
    wanted = [row.numpy().tobytes() for value in rows.values() for row in value]
    return sum(any(each in path.read_bytes() for each in wanted) for path in shards(hospital))


def test_what_a_withdrawn_patient_left_goes_with_the_next_load_whatever_made_it(
    hospital: Path, opened: Counter[str]
) -> None:
    part = FixedPart("a", lambda value: value.flatten(1)[:, :8].contiguous())
    load(hospital, OTHER)
    load(hospital, SPEC, image=part)
    gone = decoded(hospital, range(4, 5))
    gone |= {"features": part.compute(gone["image"])}
    gone |= {"other": torch.from_numpy(check.READERS["image"](hospital / "4.png", OTHER)[np.newaxis])}
    assert traces(hospital, gone) == len(shards(hospital)) == 7
    write_manifest(hospital, *(row(number) for number in range(STUDIES) if number != 4))
    opened.clear()
    data = load(hospital)
    assert traces(hospital, gone) == 0
    assert not opened, "the rows of all others stay"
    assert data.cohort("all").patients == STUDIES - 1
    assert same(data, load(hospital))


def test_only_full_shards_are_left_as_they_are_and_small_ones_are_put_together(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SHARD_BYTES", 5 * 4 * SPEC.image_size**2)
    first = load(hospital)
    images = {path for path in shards(hospital) if path.name.startswith("image")}
    assert len(images) == 3
    for number in range(20, 24):  # one study after the other
        for end in ("png", "txt", "wav"):
            (hospital / f"{number}.{end}").write_bytes((hospital / f"1.{end}").read_bytes())
        write_manifest(hospital, *(row(n) for n in [*range(STUDIES), *range(20, number + 1)]))
        data = load(hospital)
    after = {path for path in shards(hospital) if path.name.startswith("image")}
    assert len(after & images) == 2
    assert len(after) <= 5
    assert all(torch.equal(value[:STUDIES], tensors(first)[name]) for name, value in tensors(data).items())


def test_only_the_owner_may_read_what_is_kept(hospital: Path) -> None:
    say(hospital, "[cache]\nencrypted = true")
    load(hospital)
    files = [*(hospital / FOLDER).iterdir(), hospital / FOLDER, hospital / KEY_FILE]
    assert {file.stat().st_mode & 0o077 for file in files} == {0}


def test_the_bound_holds_and_what_was_not_used_longest_goes_first(hospital: Path, opened: Counter[str]) -> None:
    load(hospital)
    one = sum(path.stat().st_size for path in shards(hospital))
    say(hospital, f"[cache]\ngigabytes = {2.9 * one / 1e9}")
    load(hospital, OTHER)
    load(hospital)  # used again
    load(hospital, SPEC.model_copy(update={"image_size": 20}))
    assert sum(path.stat().st_size for path in shards(hospital)) <= 2.9 * one
    opened.clear()
    load(hospital)
    assert not opened
    load(hospital, OTHER)
    assert opened


@pytest.mark.parametrize("gigabytes", [0, 2e-5])
def test_a_hospital_larger_than_the_bound_is_served_and_no_more_than_the_bound_is_written(
    hospital: Path, gigabytes: float
) -> None:
    first = load(hospital)
    say(hospital, f"[cache]\ngigabytes = {gigabytes}")
    for _ in range(2):
        with mock.patch.object(kept, "_write_whole", wraps=kept._write_whole) as write:
            assert same(load(hospital), first)
        assert sum(len(call.args[1]) for call in write.call_args_list) <= gigabytes * 1e9
        assert sum(path.stat().st_size for path in shards(hospital)) <= gigabytes * 1e9


# --- sealed -------------------------------------------------------------------------------------------------------------


def test_sealed_rows_cannot_be_found_and_sealing_later_decodes_nothing(hospital: Path, opened: Counter[str]) -> None:
    first = load(hospital)
    rows = decoded(hospital, range(STUDIES))
    assert traces(hospital, rows) == 3
    opened.clear()
    say(hospital, "[cache]\nencrypted = true")
    assert same(load(hospital), first)
    assert traces(hospital, rows) == 0
    say(hospital, "[cache]\nencrypted = false")
    assert same(load(hospital), first)
    assert traces(hospital, rows) == 3
    assert not opened


@pytest.mark.parametrize("key", ["lost", "another", "seen by others"])
def test_without_its_key_what_is_sealed_is_made_again(hospital: Path, key: str, opened: Counter[str]) -> None:
    say(hospital, "[cache]\nencrypted = true\n[ledger]\npath = 'books/ledger.sqlite'")
    (hospital / "books").mkdir()
    first = load(hospital)
    file = hospital / "books" / KEY_FILE  # beside the ledger
    old = file.read_bytes()
    if key == "lost":
        file.unlink()
    if key == "another":
        file.write_bytes(bytes(32))
    if key == "seen by others":
        file.chmod(0o644)
    opened.clear()
    for _ in range(2):
        assert same(load(hospital), first)
    assert set(opened.values()) == {1}
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_bytes() != old


def test_a_sealed_shard_under_another_name_is_not_read(hospital: Path, opened: Counter[str]) -> None:
    say(hospital, "[cache]\nencrypted = true")
    load(hospital)
    load(hospital, SPEC.model_copy(update={"audio_hop": 159}))
    images = [path for path in shards(hospital) if path.name.startswith("image")]
    (one, other) = images
    other.write_bytes(one.read_bytes())
    opened.clear()
    load(hospital)
    load(hospital, SPEC.model_copy(update={"audio_hop": 159}))
    assert opened == {f"{number}.png": 1 for number in range(STUDIES)}


# --- what fixed parts make ----------------------------------------------------------------------------------------------


def counted(identity: str = "a") -> tuple[FixedPart, list[int]]:
    """A mean, and of how many studies it was made each time."""
    calls: list[int] = []

    def compute(value: torch.Tensor) -> torch.Tensor:
        calls.append(len(value))
        return value.flatten(1).mean(1, keepdim=True)

    return FixedPart(identity, compute), calls


def test_features_stand_in_for_the_files_and_absent_ones_are_zero(hospital: Path) -> None:
    write_manifest(hospital, *ROWS)
    raw, (part, _) = load(hospital), counted()
    data = load(hospital, image=part)
    here = data.seen_SM[:, 0]
    value = tensors(data)[fixed("image")]
    torch.testing.assert_close(value[here], part.compute(tensors(raw)["image"][here]))
    assert not value[~here].any()
    assert torch.equal(data.seen_SM, raw.seen_SM)
    assert set(data.cohort("all").batch([0]).inputs) == {fixed("image"), "report", "audio"}
    assert data.cohort("all").batch([]).inputs[fixed("image")].shape == (0, 1)


def test_a_hospital_without_the_modality_has_features_of_the_right_form(hospital: Path) -> None:
    write_manifest(hospital, "p,s,,1.txt,,1,0,mild,train")
    part, _ = counted()
    assert tensors(load(hospital, image=part))[fixed("image")].tolist() == [[0.0]]


@pytest.mark.parametrize("change", ["none", "identity", "file", "damage", "decoded"])
def test_features_are_made_once_and_again_only_for_what_changed(
    hospital: Path, change: str, opened: Counter[str]
) -> None:
    part, calls = counted()
    load(hospital, image=part)
    assert sum(calls) == STUDIES
    calls.clear()
    opened.clear()
    if change == "identity":
        part = FixedPart("b", part.compute)
    if change == "file":
        os.utime(hospital / "1.png", ns=(1, 1))
    sizes = {path: path.stat().st_size for path in shards(hospital) if path.name.startswith("image")}
    if change == "damage":
        min(sizes, key=lambda path: sizes[path]).write_bytes(b"")
    if change == "decoded":
        max(sizes, key=lambda path: sizes[path]).unlink()
    load(hospital, image=part)
    assert sum(calls) == {"none": 0, "identity": STUDIES, "file": 1, "damage": STUDIES, "decoded": 0}[change]
    assert opened == ({"1.png": 1} if change == "file" else {}), "features are made of what was decoded"


def test_features_that_fit_into_the_bound_are_kept_before_what_they_were_made_of(
    hospital: Path, opened: Counter[str]
) -> None:
    part, calls = counted()
    load(hospital)
    one = sum(path.stat().st_size for path in shards(hospital))
    say(hospital, f"[cache]\ngigabytes = {one / 1e9}")
    for _ in range(2):
        calls.clear()
        opened.clear()
        load(hospital, image=part)
    assert sum(calls) == 0
    assert not opened
