"""The check for a machine with a GPU, tried on one without."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from benchmarks import gpu
from fedmm.models.encoder import encoders

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The encoder that the benchmark registers is for its process alone."""
    yield
    encoders["report"]._entries.pop("bert_of_noise", None)


def test_the_whole_table_is_measured() -> None:
    found = gpu.measure(CPU, tiny=True)
    for name in ("resnet50", "bert", "default"):
        assert found[f"{name}_plain_largest_batch"] == found[f"{name}_private_largest_batch"] == 4
        assert 0 < found[f"{name}_2_private_to_plain"] < math.inf
        assert found[f"{name}_2_private_round_s"] > 0


@pytest.mark.parametrize(
    ("room", "least"), [(1, 1), (2, 2), (5, 4), (23, 18), (63, 48), (64, 64), (100, 100), (1000, 100)]
)
def test_the_largest_batch_is_found_to_a_quarter(room: int, least: int) -> None:
    asked = []

    def step(patients: int) -> None:
        asked.append(patients)
        if patients > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert least <= gpu.most_that_fits(step, 100, CPU) <= min(room, 100)
    assert len(asked) == len(set(asked)) <= 11


def test_a_model_of_which_nobody_fits_is_said() -> None:
    def step(patients: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="not one patient"):
        gpu.most_that_fits(step, 64, CPU)


def test_without_a_gpu_the_check_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert "nothing was checked" in capsys.readouterr().err
