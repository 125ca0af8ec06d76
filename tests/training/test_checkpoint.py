"""A checkpoint is there whole or not at all, and a damaged one says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.errors import ConfigError
from fedmm.training.checkpoint import CHECKPOINT_FILE, Checkpoint, load_checkpoint, save_checkpoint, write_atomically

settings.register_profile("fedmm-checkpoint", deadline=None, database=None)


def checkpoint(number: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    return Checkpoint(
        round=number,
        weights={
            "a.weight": torch.randn(2, 3, generator=generator),
            "scale": torch.tensor(0.5),
            "no": torch.ones(0, 2),
        },
        strategy={"m_t.a.weight": torch.randn(2, 3, generator=generator).double(), "momentum.0": torch.tensor(1.0)},
        notes={"run": "run-1", "text": 'ä "quoted"\n', "nested": {"a": [1, None]}},
    )


def same(left: Checkpoint, right: Checkpoint) -> bool:
    def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
        return {k: (v.dtype, tuple(v.shape), v.contiguous().numpy().tobytes()) for k, v in tensors.items()}

    return (left.round, left.notes, bits(left.weights), bits(left.strategy)) == (
        right.round,
        right.notes,
        bits(right.weights),
        bits(right.strategy),
    )


def loaded(folder: Path) -> Checkpoint:
    found = load_checkpoint(folder)
    assert found is not None
    return found


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    assert same(loaded(tmp_path), checkpoint())


def test_weights_and_strategy_may_have_the_same_names_and_any_layout(tmp_path: Path) -> None:
    name, value = "strategy/weights/x", torch.arange(6.0).reshape(2, 3).T
    save_checkpoint(tmp_path, Checkpoint(1, {name: value}, {name: value + 1}, {}))
    found = loaded(tmp_path)
    assert torch.equal(found.weights[name], value)
    assert torch.equal(found.strategy[name], value + 1)


def test_a_run_that_has_not_begun_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_the_last_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2):
        save_checkpoint(tmp_path, checkpoint(number))
    assert same(loaded(tmp_path), checkpoint(2))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_an_end_while_writing_leaves_the_checkpoint_before(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    def end(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace") if step == "replace" else ("os.fsync",)), end)  # type: ignore[arg-type]
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, checkpoint(2))
    assert same(loaded(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(3))
    assert same(loaded(tmp_path), checkpoint(3))


def test_the_bytes_are_on_disk_before_the_name_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real = Path.replace
    monkeypatch.setattr("os.fsync", lambda _: steps.append("flush"))
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append("rename"), real(a, b))[1])
    write_atomically(tmp_path / "x", b"data")
    assert steps[:2] == ["flush", "rename"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_a_first_write_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    path = tmp_path / CHECKPOINT_FILE
    path.rename(tmp_path / (CHECKPOINT_FILE + ".new"))
    assert load_checkpoint(tmp_path) is None


def test_a_leftover_of_a_write_is_ignored_and_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / (CHECKPOINT_FILE + ".new")
    leftover.write_bytes(b"half" * 10_000)
    save_checkpoint(tmp_path, checkpoint(1))
    leftover.write_bytes(b"half")
    assert same(loaded(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    assert same(loaded(tmp_path), checkpoint(2))
    assert not leftover.exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def whole(folder: Path) -> bytes:
    save_checkpoint(folder, checkpoint())
    return (folder / CHECKPOINT_FILE).read_bytes()


def with_about(data: bytes, *about: object) -> bytes:
    """The same tensors under another header entry `__metadata__`, or without one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    text = json.dumps({"__metadata__": about[0], **header} if about else header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


NOTES = {"round": "1", "notes": "{}"}
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte missing": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: b"\0" * len(data),
    "another file": lambda data: b"PK\x03\x04" + data[4:],
    "endless header": lambda data: b"\xff" * 8 + data[8:],
    "no notes at all": lambda data: with_about(data),
    "null for notes": lambda data: with_about(data, None),
    "no round": lambda data: with_about(data, {"notes": "{}"}),
    "no notes": lambda data: with_about(data, {"round": "1"}),
    "a round that is no number": lambda data: with_about(data, NOTES | {"round": "one"}),
    "notes that are no JSON": lambda data: with_about(data, NOTES | {"notes": "{"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_explained(name: str, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(DAMAGE[name](whole(tmp_path)))
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(tmp_path)
    assert CHECKPOINT_FILE in caught.value.what
    assert caught.value.fix


def test_the_header_that_these_damages_start_from_is_a_good_one(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_bytes(with_about(whole(tmp_path), NOTES))
    assert loaded(tmp_path).round == 1


def test_a_folder_in_place_of_the_checkpoint_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).mkdir()
    with pytest.raises(ConfigError):
        load_checkpoint(tmp_path)


@settings(settings.get_profile("fedmm-checkpoint"), max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 2000))
def test_changed_bytes_give_a_checkpoint_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    data = bytearray(whole(folder))
    for place, value in changes:
        data[place % len(data)] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        (folder / CHECKPOINT_FILE).write_bytes(damaged)
        try:
            found = loaded(folder)
        except ConfigError:
            continue
        assert isinstance(found.round, int)
        assert len(found.weights) + len(found.strategy) <= 5
