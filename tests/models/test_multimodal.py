"""The model under everything that a hospital may send: any subset of modalities, any batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmm.config import ModelConfig
from fedmm.errors import ConfigError
from fedmm.models.fusion import fusions
from fedmm.models.heads import Output, answer, probabilities, study_loss
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import load_model, load_spec, save_model, save_spec
from fedmm.schema import MODALITIES, Batch, InputSpec, Labels
from tests import tiny

SUBSETS = [[bool(n >> m & 1) for m in range(3)] for n in range(8)]


def forward(model: torch.nn.Module, batch: Batch, seen: list[bool]) -> torch.Tensor | Output:
    seen_BM = torch.tensor([seen] * batch.studies, dtype=torch.bool).reshape(-1, 3)
    out: torch.Tensor | Output = model(batch.inputs, seen_BM)
    return out


def thinned(fusion: str, *values: object, keep: bool) -> object:
    """All cases of two fusions, of the others some: tests/models/test_fusions.py has all subsets without the encoders."""
    return pytest.param(fusion, *values, marks=[] if keep or fusion in ("concat", "weighted") else pytest.mark.slow)


@pytest.mark.parametrize(
    ("fusion", "studies", "seen"),
    [
        thinned(fusion, studies, seen, keep=(studies, sum(seen)) in [(7, 0), (1, 3)])
        for fusion in fusions.names()
        for studies in (0, 1, 7)
        for seen in SUBSETS
    ],
    ids=str,
)
def test_any_subset_gives_finite_output_and_gradient(fusion: str, studies: int, seen: list[bool]) -> None:
    model, batch = build_model(tiny.spec(fusion)), tiny.batch([1] * studies)
    out = forward(model, batch, seen)
    assert answer(out).shape == (studies, len(tiny.LABELS.outputs))
    assert answer(out).isfinite().all()
    study_loss(out, batch).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("fusion", "seen"),
    [
        thinned(fusion, seen, keep=sum(seen) == 0 or seen[1:] == [True, True])
        for fusion in fusions.names()
        for seen in SUBSETS[:-1]
    ],
    ids=str,
)
def test_what_stands_in_an_absent_slot_changes_neither_result_nor_gradient(fusion: str, seen: list[bool]) -> None:
    results = []
    for filling in (0.0, 7.0, math.nan):
        model, batch = build_model(tiny.spec(fusion)), tiny.batch([1, 2])
        for name, here in zip(MODALITIES, seen, strict=True):
            if not here:
                batch.inputs[name].fill_(0 if name == "report" and math.isnan(filling) else filling)
        out = forward(model, batch, seen)
        study_loss(out, batch).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((answer(out).detach(), torch.cat([g.flatten() for g in gradients])))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_a_study_does_not_see_the_others_in_its_batch() -> None:
    model, batch = build_model(tiny.spec()), tiny.batch([1] * 5)
    whole = model(batch.inputs, batch.seen_BM)
    for i in range(5):
        alone = model({n: v[i : i + 1] for n, v in batch.inputs.items()}, batch.seen_BM[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone)


def test_the_presence_of_a_modality_changes_the_result() -> None:
    model, batch = build_model(tiny.spec()), tiny.batch([1])
    outputs = [answer(forward(model, batch, seen)) for seen in SUBSETS]
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == len(SUBSETS)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = build_model(tiny.spec(), 1), build_model(tiny.spec(), 1), build_model(tiny.spec(), 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("size", [16, 33, 64, 100])
def test_every_image_size_and_audio_length_fits(size: int) -> None:
    inputs = InputSpec(image_size=size, audio_seconds=size / 50, audio_mels=8 + size % 7)
    spec = ModelSpec(inputs=inputs, model=ModelConfig(width=4), labels=tiny.LABELS)
    batch = tiny.batch([1, 1], inputs=inputs)
    assert build_model(spec)(batch.inputs, batch.seen_BM).shape == (2, 5)


def test_an_unknown_leaf_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"concat, .*weighted"):
        build_model(tiny.spec("magic"))


# --- loss ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_studys_loss_depends_on_that_study_alone(studies: list[int], seed: int) -> None:
    batch = tiny.batch(studies, seed=seed)
    logits = torch.randn(batch.studies, 5, generator=torch.Generator().manual_seed(seed))
    loss = study_loss(logits, batch)
    assert loss.shape == (batch.studies,)
    assert loss.isfinite().all()
    for i in range(batch.studies):
        one = Batch(
            inputs={}, seen_BM=batch.seen_BM[i : i + 1], finding_BF=batch.finding_BF[i : i + 1],
            class_B=batch.class_B[i : i + 1], patient_B=batch.patient_B[:1] * 0, patients=1,
            further_BK=batch.further_BK[i : i + 1], day_B=batch.day_B[i : i + 1], key_B=batch.key_B[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close(study_loss(logits[i : i + 1], one), loss[i : i + 1])


def test_a_study_without_labels_has_loss_and_gradient_zero() -> None:
    batch = tiny.batch([1, 1])
    batch.finding_BF.fill_(math.nan)
    batch.class_B.fill_(-1)
    logits = torch.randn(2, 5, requires_grad=True)
    study_loss(logits, batch).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 5))


def test_the_loss_is_the_mean_over_the_known_labels() -> None:
    batch = tiny.batch([1])
    batch.finding_BF[0] = torch.tensor([1.0, math.nan])
    batch.class_B[0] = 2
    logits = torch.tensor([[0.3, 9.0, 0.1, -0.4, 0.8]])
    expected = (math.log1p(math.exp(-0.3)) - float(logits[0, 2:].log_softmax(0)[2])) / 2
    assert float(study_loss(logits, batch)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "labels", [tiny.LABELS, Labels(findings=("a",)), Labels(class_name="c", class_values=("x", "y"))]
)
def test_probabilities_are_probabilities(labels: Labels) -> None:
    values = probabilities(torch.randn(6, len(labels.outputs)) * 30, labels)
    assert values.shape == (6, len(labels.outputs))
    assert ((values >= 0) & (values <= 1)).all()
    if labels.class_name:
        torch.testing.assert_close(values[:, len(labels.findings) :].sum(1), torch.ones(6))


# --- on disk ------------------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_without_any_other_config_and_says_the_same(tmp_path: Path) -> None:
    model, batch = build_model(tiny.spec("weighted"), 4), tiny.batch([2, 1])
    save_model(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = load_model(tmp_path)
    assert not again.training
    assert torch.equal(model(batch.inputs, batch.seen_BM), again(batch.inputs, batch.seen_BM))
    assert load_spec(tmp_path) == model.spec


def test_more_keys_in_config_json_are_for_people(tmp_path: Path) -> None:
    save_spec(tiny.spec(), tmp_path, extra={"run": "abc", "settings": {"a.b": 1}})
    assert load_spec(tmp_path) == tiny.spec()
    assert json.loads((tmp_path / "config.json").read_text())["run"] == "abc"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "inputs": 3}', "\x00\xff"])
def test_a_config_that_is_none_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_model(build_model(tiny.spec("weighted")), tmp_path)
    save_spec(tiny.spec("concat"), tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="does not fit"):
        load_model(tmp_path)


def test_missing_weights_ask_whether_the_run_has_finished(tmp_path: Path) -> None:
    save_spec(tiny.spec(), tmp_path)
    with pytest.raises(ConfigError, match="has the run finished"):
        load_model(tmp_path)
