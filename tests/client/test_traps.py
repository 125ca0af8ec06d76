"""Weights made to read out patients are refused before anything is paid; honest ones never are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import MessageType

from client import traps
from client.traps import check_weights, mirrored, parallel
from fedmm.errors import PolicyRefused
from fedmm.federation.messages import array_record, encode
from fedmm.models.catalogue import catalogue
from fedmm.models.encoder import encoders
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.report.record import read_rounds
from tests import tiny
from tests.client.test_client import ask, evaluate_ask, refusal, spent, train_ask, weights
from tests.e2e.conftest import failures, policy, simulate, write_hospital

LIMIT = 1000.0
LARGE = {"resnet18", "resnet50", "densenet121", "vgg16"}  # the same kinds of layers as cnn, seconds each


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    return write_hospital(tmp_path / "north")


def leaves() -> list[dict[str, str]]:
    found = catalogue()
    small = {m: [n for n in names if not encoders[m].get(n).from_folder] for m, names in found["encoders"].items()}
    chosen = [{m: n} for m, names in small.items() for n in names if n not in LARGE]
    return chosen + [{"fusion": name} for name in found["fusions"]]


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: "-".join(next(iter(leaf.items()))))
def test_the_fresh_weights_of_every_small_leaf_pass(leaf: dict[str, str]) -> None:
    for seed in range(3):
        spec = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(width=32, **leaf), labels=tiny.LABELS)
        check_weights({n: v.detach() for n, v in build_model(spec, seed).trained().items()}, LIMIT)


@pytest.mark.parametrize("private", ["true", "false"])
def test_the_weights_of_rounds_of_training_pass(tmp_path: Path, private: str) -> None:
    write_hospital(tmp_path / "hospitals" / "north")
    changes = {"privacy__enabled": private, "federation__rounds": 4, "training__learning_rate": 3.0, "model__width": 32}
    changes |= {"training__sampling_rate": 1.0, "training__max_update_norm": 1e6, "privacy__epsilon": 4}
    assert simulate(tmp_path / "hospitals", tmp_path / "run", **changes).code == 0
    assert [record["trained"] for record in read_rounds(tmp_path / "run")] == [["north"]] * 4
    assert failures(tmp_path / "run", "north") == []


# --- traps ------------------------------------------------------------------------------------------------------------


def imprint(value: torch.Tensor) -> torch.Tensor:
    """Fowl et al. 2022: each row measures the same, biases part the patients into bins."""
    return value[:1].expand_as(value) * torch.linspace(0.5, 2.0, len(value)).view(-1, *[1] * (value.dim() - 1))


def imprint_in_half(value: torch.Tensor) -> torch.Tensor:
    half = len(value) // 2
    return torch.cat([value[:half], imprint(value[half:])])[torch.randperm(len(value), generator=chance())]


def trap(value: torch.Tensor) -> torch.Tensor:
    """Boenisch et al. 2023: half of each row negative, the other half the same numbers turned around and scaled."""
    rows = value.flatten(1).clone()
    half = rows.shape[1] // 2
    for row in rows:
        places = torch.randperm(rows.shape[1], generator=chance())
        down = -torch.rand(half, generator=chance()) - 0.01
        row[places[:half]], row[places[half : 2 * half]] = down, -0.97 * down[torch.randperm(half, generator=chance())]
        row[places[2 * half :]] = 0.0
    return rows.view_as(value)


GENERATOR = torch.Generator().manual_seed(7)


def chance() -> torch.Generator:
    return GENERATOR


TRAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "imprint": imprint,
    "imprint in half of the rows": imprint_in_half,
    "trap weights": trap,
    "one large weight": lambda value: value + 2000.0 * torch.eye(1, value[0].numel()).view(value[:1].shape),
}


def matrix_names() -> list[str]:
    """One matrix and one convolution of the model that the hospital is asked to train, 16 x 16 or more."""
    large = {n: v for n, v in wide_weights().items() if v.dim() >= 2 and len(v) >= 16 and v[0].numel() >= 16}
    return [next(n for n, v in large.items() if v.dim() == kind) for kind in (2, 4)]


def wide_ask(kind: str) -> Any:
    spec = train_ask().spec
    wide = spec.model_copy(update={"model": spec.model.model_copy(update={"width": 32})})
    asked = evaluate_ask() if kind == MessageType.EVALUATE else train_ask()
    return asked.model_copy(update={"spec": wide, "settings": asked.settings | {"model.width": 32}})


def wide_weights() -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in build_model(wide_ask(MessageType.TRAIN).spec, 1).trained().items()}


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_refused_before_anything_is_paid_and_no_value_is_told(hospital: Path, name: str, kind: str) -> None:
    for matrix in matrix_names():
        sent = wide_weights()
        sent[matrix] = TRAPS[name](sent[matrix])
        code, reason = refusal(ask(hospital, encode(wide_ask(kind), arrays=array_record(sent)), kind))
        assert code == 1002
        assert matrix in reason
        assert "2000" not in reason
    now = spent(hospital)
    assert (now.releases, now.not_private) == (0, 0)
    assert ask(hospital, encode(wide_ask(kind), arrays=array_record(wide_weights())), kind).has_content()


def test_the_limit_is_the_hospitals(hospital: Path) -> None:
    text = policy("north") + "[runs]\nmax_abs_weight = 0.5\n"
    (hospital / "site.toml").write_text(text, encoding="utf-8")
    code, reason = refusal(ask(hospital, encode(train_ask(), arrays=array_record(weights()))))
    assert code == 1002
    assert "larger than this hospital accepts, 0.5" in reason


def test_small_matrices_and_rows_of_zeros_are_not_looked_at() -> None:
    same = torch.ones(15, 40)
    check_weights(
        {"few rows": same, "few columns": torch.ones(40, 15), "one": torch.ones(40), "none": torch.ones(0, 20)}, LIMIT
    )
    check_weights(
        {"zeros": torch.zeros(40, 40), "zero rows": torch.cat([torch.zeros(39, 40), torch.ones(1, 40)])}, LIMIT
    )
    with pytest.raises(PolicyRefused):
        check_weights({"sixteen": torch.ones(16, 16)}, LIMIT)


def test_the_marks_are_shares_of_the_rows() -> None:
    rows = torch.eye(20, dtype=torch.float64)
    assert parallel(rows) == 0
    rows[:5] = rows[0]
    assert parallel(rows) == pytest.approx(4 / 19)
    turned = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).double()
    assert mirrored(turned) == 0
    turned[:10, 15:] = -0.5 * turned[:10, :15].abs()
    turned[:10, :15] = turned[:10, :15].abs()
    assert mirrored(turned) == pytest.approx(0.5)


def test_looking_leaves_torchs_own_chance_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_weights({"large": torch.randn(600, 20, generator=torch.Generator().manual_seed(1))}, LIMIT)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_weights_are_looked_at_once_and_other_ones_or_another_limit_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[float] = []
    honest = traps._look
    monkeypatch.setattr(traps, "_look", lambda weights, limit: (looked.append(limit), honest(weights, limit))[1])
    honest_weights = {"a": torch.randn(20, 20)}
    for _ in range(3):
        check_weights({"a": honest_weights["a"].clone()}, LIMIT)
    assert len(looked) == 1
    check_weights({"b": honest_weights["a"]}, LIMIT)
    with pytest.raises(PolicyRefused):
        check_weights(honest_weights, 0.0)
    with pytest.raises(PolicyRefused):
        check_weights(honest_weights, 0.0)
    assert looked[1:] == [LIMIT, 0.0, 0.0], "what was refused is looked at again"
