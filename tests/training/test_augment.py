"""Augmentation and modality dropout: what varies, what stays, and that one patient still moves the sum by at most C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmm.config import TrainingConfig
from fedmm.data.dataset import Cohort
from fedmm.errors import ConfigError
from fedmm.models.heads import answer
from fedmm.models.multimodal import build_model
from fedmm.privacy.engine import CLIPPING, PrivateEngine
from fedmm.schema import MODALITIES, Batch, InputSpec
from fedmm.training import augment as module
from fedmm.training.augment import VARY, augment, check_augment, hide_modalities, modalities_to_augment, vary
from fedmm.training.loop import Workbench, train
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy import measure
from tests.privacy.measure import LIMIT, C, clipped_sum, engine_for, hospital

ALL = ",".join(VARY)
WAVES = InputSpec(image_size=16, report_tokens=8, report_buckets=64, audio_seconds=0.4, audio_form="waveform")


def batch(studies_P: Sequence[int], *, seed: int = 0, inputs: InputSpec = tiny.INPUTS) -> Batch:
    """Absent modalities are zeros, as from a hospital."""
    whole = tiny.batch(studies_P, seed=seed, inputs=inputs)
    for m, name in enumerate(MODALITIES):
        whole.inputs[name][~whole.seen_BM[:, m]] = 0
    return whole


def augmented(whole: Batch, *names: str, copies: int = 1, seed: int = 1, inputs: InputSpec = tiny.INPUTS) -> Batch:
    return augment(whole, names or tuple(VARY), copies=copies, seed=seed, spec=inputs)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items()) and torch.equal(
        one.seen_BM, other.seen_BM
    )


# --- what stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [tiny.INPUTS, WAVES], ids=["log_mel", "waveform"])
@pytest.mark.parametrize("copies", [1, 3])
def test_values_change_and_nothing_else_does(inputs: InputSpec, copies: int) -> None:
    whole = batch([1, 3, 2], inputs=inputs)
    before = {name: value.clone() for name, value in whole.inputs.items()}
    made = augmented(whole, copies=copies, inputs=inputs)
    row_B = torch.arange(whole.studies).repeat_interleave(copies)
    for name in ("seen_BM", "finding_BF", "class_B", "patient_B", "key_B", "day_B", "further_BK"):
        assert torch.equal(getattr(made, name).nan_to_num(7), getattr(whole, name)[row_B].nan_to_num(7))
    assert (made.patients, made.studies) == (whole.patients, copies * whole.studies)
    for m, name in enumerate(MODALITIES):
        value, seen_B = made.inputs[name], made.seen_BM[:, m]
        assert value.dtype == before[name].dtype
        assert value.shape == (made.studies, *before[name].shape[1:])
        assert value.isfinite().all()
        assert not value[~seen_B].any(), "absent stays zero"
        assert torch.equal(whole.inputs[name], before[name]), "the hospital's own copy stays"
    for name in ("image", "audio"):
        m = MODALITIES.index(name)
        rows = made.inputs[name][made.seen_BM[:, m]].flatten(1)
        assert len(rows.unique(dim=0)) == len(rows), "no two copies are equal, and the first is as varied as the others"
        assert not (rows.unsqueeze(1) == before[name].flatten(1)).all(2).any()


def test_what_is_not_named_stays() -> None:
    whole = batch([2, 3])
    made = augmented(whole, "audio")
    assert torch.equal(made.inputs["image"], whole.inputs["image"])
    assert torch.equal(made.inputs["report"], whole.inputs["report"])
    assert same(augment(whole, (), copies=1, seed=0, spec=tiny.INPUTS), whole)


def test_reports_of_another_tokeniser_stay() -> None:
    whole = batch([2, 3])
    spec = tiny.INPUTS.model_copy(update={"report_tokenizer": "bert"})
    made = augment(whole, ("report",), copies=1, seed=1, spec=spec)
    assert torch.equal(made.inputs["report"], whole.inputs["report"])


def test_an_empty_batch_stays_empty() -> None:
    made = vary(batch([]), TrainingConfig(augment=ALL, augment_copies=4), seed=0, spec=tiny.INPUTS)
    assert made.studies == 0


# --- images ---------------------------------------------------------------------------------------------------------------


def pictures(image_HW: Tensor, count: int) -> Tensor:
    size = image_HW.shape[0]
    spec = InputSpec(image_size=size)
    chance = [np.random.default_rng(seed) for seed in range(count)]
    return VARY["image"](image_HW.expand(count, 1, size, size), chance, spec)[:, 0]


def test_an_image_is_never_mirrored_and_everything_stays_about_where_it_was() -> None:
    spot_HW = torch.zeros(64, 64)
    spot_HW[10:18, 6:14] = 8.0  # middle: 13.5 down, 9.5 right
    made_BHW = pictures(spot_HW, 300)
    bright_BHW = (made_BHW > 4).float()
    down_B = (bright_BHW.sum(2) * torch.arange(64)).sum(1) / bright_BHW.sum((1, 2))
    right_B = (bright_BHW.sum(1) * torch.arange(64)).sum(1) / bright_BHW.sum((1, 2))
    # 4 for the shift, 4 for the turn at this distance from the middle, 3 for the zoom
    assert (down_B - 13.5).abs().max() < 11
    assert (right_B - 9.5).abs().max() < 11
    assert down_B.std() > 1.5
    assert right_B.std() > 1.5


def test_borders_repeat_the_edge_instead_of_a_black_frame() -> None:
    made_BHW = pictures(torch.full((16, 16), 3.0), 100)
    assert made_BHW.min() > 3 * (1 - module.CONTRAST) - module.BRIGHTNESS - 6 * module.GRAIN
    assert made_BHW.mean((1, 2)).std() > 0.1, "contrast and brightness vary"


# --- recordings -----------------------------------------------------------------------------------------------------------


def test_a_spectrogram_stays_in_the_scale_of_the_reader() -> None:
    value_NR = torch.full((40, 100), -2.0)
    value_NR[10:20, 10:40] = torch.linspace(-1, 2, 30)
    chance = [np.random.default_rng(seed) for seed in range(100)]
    made_BNR = VARY["audio"](value_NR.expand(100, 40, 100), chance, InputSpec())
    assert made_BNR.min() >= -2
    assert made_BNR.max() <= 2 + 1e-6
    assert (made_BNR.amax((1, 2)) > 1).all(), "the loudest is the measure, masked or not"
    floor_BNR = made_BNR == -2
    assert floor_BNR.all(2).sum(1).max() <= 6, "bands"
    assert floor_BNR.all(1).sum(1).max() <= 10, "frames"
    assert floor_BNR.all(2).any()
    assert floor_BNR.all(1).any()
    loudest_B = made_BNR.amax(1).argmax(1)
    assert loudest_B.min() < 35 < 43 < loudest_B.max(), "earlier and later"


def test_a_waveform_gets_noise_within_10_to_30_db_and_a_gain_of_6() -> None:
    rng = np.random.default_rng(0)
    wave_L = torch.from_numpy(np.sin(np.arange(8000) / 5).astype(np.float32))
    chance = [np.random.default_rng(seed) for seed in range(200)]
    made_BL = VARY["audio"](wave_L.expand(200, 8000), chance, InputSpec(audio_form="waveform")).double()
    power_B = made_BL.square().mean(1)
    gain_B = 10 * (power_B / 0.5).log10()
    assert -6 - 0.5 < gain_B.min() < -4.5
    assert 4.5 < gain_B.max() < 6 + 0.5 + 0.5  # noise at 10 dB adds 0.4 dB
    silent_L = torch.zeros(8000)
    assert not VARY["audio"](silent_L.expand(1, 8000), [rng], InputSpec(audio_form="waveform")).any()


# --- chance ---------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    config = TrainingConfig(augment=ALL, augment_copies=2, modality_dropout=0.5)
    first, again, other = (vary(batch([1, 3, 2]), config, seed=s, spec=tiny.INPUTS) for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_copies_are_hidden_each_by_its_own_chance() -> None:
    whole = batch([1] * 30)
    made = vary(whole, TrainingConfig(augment_copies=8, modality_dropout=0.5), seed=0, spec=tiny.INPUTS)
    seen_BKM = made.seen_BM.view(30, 8, -1)
    several_B = whole.seen_BM.sum(1) > 1
    assert several_B.any()
    assert (seen_BKM[several_B] != seen_BKM[several_B][:, :1]).flatten(1).any(1).float().mean() > 0.9


def test_a_patients_studies_vary_the_same_whoever_else_is_there() -> None:
    """Bit by bit, but for the last bit of what was interpolated in a batch of another shape."""
    config = TrainingConfig(augment=ALL, augment_copies=3, modality_dropout=0.5)
    whole = batch([2, 1, 3, 2])
    together = vary(whole, config, seed=5, spec=tiny.INPUTS)
    for patient in range(4):
        alone = vary(tiny.pick(whole, [patient]), config, seed=5, spec=tiny.INPUTS)
        mine = tiny.pick(together, [patient])
        assert torch.equal(alone.seen_BM, mine.seen_BM)
        for name, value in alone.inputs.items():
            torch.testing.assert_close(value, mine.inputs[name], rtol=0, atol=1e-5)


def made_of(patients: Sequence[int], whole: Batch) -> Cohort:
    data = hospital(tiny.pick(whole, patients))
    return replace(data, key_P=tuple(1000 + patient for patient in patients)).cohort("all")


def private_sum(cohort: Cohort, config: TrainingConfig, clipping: str) -> Tensor:
    """(weights,) the noiseless sum of one step, read from what the real training does to the weights."""
    bench = Workbench(tiny.spec(), torch.device("cpu"), clipping=clipping)
    bench.load(dict(build_model(tiny.spec(), 1).trained()))
    before = bench.weights()
    train(bench, cohort, measure.plan(most=3), config=config, noise=FixedNoise(4, scale=0))
    moved = [(before[name].double() - value.double()).flatten() for name, value in bench.weights().items()]
    return torch.cat(moved) * config.batch_size / config.learning_rate


def moves(clipping: str) -> list[float]:
    """|| S(D) - S(D without i) || / C by real training, everything that chance may do switched on."""
    config = TrainingConfig(
        augment=ALL, augment_copies=3, modality_dropout=0.4, batch_size=1, learning_rate=100, physical_studies=20
    )
    whole, everyone = batch([1, 5, 2, 4, 1]), list(range(5))
    total = private_sum(made_of(everyone, whole), config, clipping)
    rests = (made_of([p for p in everyone if p != gone], whole) for gone in everyone)
    return [float((total - private_sum(rest, config, clipping)).norm()) / C for rest in rests]


@pytest.mark.parametrize("clipping", CLIPPING)
def test_with_augmentation_and_dropout_a_patient_moves_the_sum_by_at_most_c(clipping: str) -> None:
    found = moves(clipping)
    assert max(found) <= LIMIT
    assert max(found) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"


def test_chance_that_hangs_on_the_place_in_the_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(batch: Batch, seed: int, name: str) -> list[np.random.Generator]:
        rng = np.random.default_rng(seed)
        return [np.random.default_rng(rng.integers(2**63)) for _ in range(batch.studies)]

    monkeypatch.setattr(module, "_chance", by_place)
    assert max(moves("hooks")) > 1.1


# --- averaged before clipping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", CLIPPING)
def test_the_mean_of_the_copies_gradients_is_clipped_once(clipping: str) -> None:
    copies, bound = 4, 0.5
    whole = batch([1, 3, 2])
    made = augmented(whole, copies=copies)
    rows = torch.arange(made.studies)
    single = [one_copy(made, rows[rows % copies == k]) for k in range(copies)]
    loose, tight = (engine_for(tiny.spec(), max_grad_norm=c, clipping=clipping) for c in (1e3, bound))
    expected, each_clipped = torch.zeros(0), torch.zeros(0)
    for patient in range(whole.patients):
        gradients = torch.stack([clipped_sum(loose, tiny.pick(one, [patient])) for one in single])
        mean, cut = gradients.mean(0), gradients * (bound / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
        mine = mean * min(1.0, bound / float(mean.norm()))
        expected, each_clipped = (mine, cut.mean(0)) if patient == 0 else (expected + mine, each_clipped + cut.mean(0))
    ours = clipped_sum(tight, made)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert float((ours - each_clipped).norm()) > 1e-3, "the order of mean and clip made no difference: shows nothing"


def one_copy(made: Batch, rows: Tensor) -> Batch:
    renumbered = {name: getattr(made, name)[rows] for name in vars(made) if name.endswith(("_B", "_BM", "_BF", "_BK"))}
    return replace(made, inputs={n: v[rows] for n, v in made.inputs.items()}, copies=1, **renumbered)


def test_copies_do_not_look_at_one_another_in_a_fusion_over_time() -> None:
    whole = batch([1, 4, 3])
    model = build_model(tiny.spec("timeline"), 1).eval()
    made = augment(whole, (), copies=3, seed=0, spec=tiny.INPUTS)
    plain, copied = (answer(model(b.inputs, b.seen_BM, b.timeline)) for b in (whole, made))
    torch.testing.assert_close(copied, plain.repeat_interleave(3, dim=0))
    alone = answer(model(whole.inputs, whole.seen_BM))
    assert not torch.allclose(plain, alone), "nobody has a history: shows nothing"


def test_no_more_rows_are_in_memory_than_asked_unless_one_patient_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    real = PrivateEngine.accumulate

    def note(engine: PrivateEngine, batch: Batch, *others: Any, **further: Any) -> None:
        seen.append((batch.studies, batch.patients))
        real(engine, batch, *others, **further)

    monkeypatch.setattr(PrivateEngine, "accumulate", note)
    cohort = hospital(batch([1, 2, 1, 3, 1, 1])).cohort("all")
    for physical, largest in ((12, 12), (8, 12), (1, 12)):
        seen.clear()
        config = TrainingConfig(augment="image", augment_copies=4, physical_studies=physical)
        train(Workbench(tiny.spec(), torch.device("cpu")), cohort, measure.plan(), config=config, noise=FixedNoise(0))
        assert sum(rows for rows, _ in seen) == 4 * 9
        assert max(rows for rows, _ in seen) == largest
        assert all(rows <= physical or patients == 1 for rows, patients in seen)


def test_plain_training_takes_augmented_copies_too() -> None:
    cohort = hospital(batch([1, 2, 1, 3])).cohort("all")
    results = []
    for settings in ({}, {"augment": ALL}, {"augment": ALL, "augment_copies": 3}):
        bench = Workbench(tiny.spec(), torch.device("cpu"))
        bench.load(dict(build_model(tiny.spec(), 1).trained()))
        config = TrainingConfig(modality_dropout=0, **settings)
        train(
            bench,
            cohort,
            replace(measure.plan(), private=False, noise_multiplier=0.0),
            config=config,
            noise=FixedNoise(0),
        )
        results.append(torch.cat([value.flatten() for value in bench.weights().values()]))
    assert all(result.isfinite().all() for result in results)
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


# --- settings -------------------------------------------------------------------------------------------------------------


def test_an_unknown_modality_and_one_of_kept_features_are_refused() -> None:
    check_augment(TrainingConfig())
    check_augment(TrainingConfig(augment=ALL), fixed=[])
    check_augment(TrainingConfig(augment="report,audio"), fixed=["image"])
    with pytest.raises(ConfigError, match=r"'lab' cannot be augmented"):
        check_augment(TrainingConfig(augment="image,lab"), fixed=[])
    with pytest.raises(ConfigError, match=r"image has an encoder with a fixed part") as caught:
        check_augment(TrainingConfig(augment="image"), fixed=["image"])
    assert "training.augment" in caught.value.fix


def test_modalities_are_named_in_any_order_and_once() -> None:
    assert modalities_to_augment(TrainingConfig()) == ()
    assert modalities_to_augment(TrainingConfig(augment="audio,image,audio")) == ("image", "audio")


def test_dropout_of_nothing_changes_nothing() -> None:
    whole = batch([1, 2])
    assert hide_modalities(whole, 0.0, seed=1) is whole
