"""Image encoders: alike under every batch and size, bounded by patient, and the fixed features are what their sources say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.models import image_fixed
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.heads import study_loss
from fedmm.models.image_fixed import HOG, FixedFeatures, Scattering
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import load_model, save_model
from fedmm.privacy.engine import CLIPPING, wrap
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import Batch, InputSpec, Timeline
from fedmm.training.loop import made_up
from tests import tiny
from tests.privacy.measure import LIMIT, clipped_sum, engine_for, engine_on, sensitivity

BACKBONES = ("resnet18", "resnet50", "densenet121", "vgg16")
FIXED = ("scattering", "hog")
NAMES = (*BACKBONES, "vit", *FIXED)
SMALL = ("vit", *FIXED)  # the others hold up to gigabytes of gradients: slow

every = pytest.mark.parametrize("name", NAMES)
small = [pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in NAMES]
both_ways = pytest.mark.parametrize("clipping", CLIPPING)


def made(name: str, size: int, width: int = 4) -> Encoder:
    torch.manual_seed(0)
    return encoders["image"].get(name)(InputSpec(image_size=size), width)


def images(studies: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(studies, 1, size, size, generator=torch.Generator().manual_seed(seed))


def spec(name: str, size: int = 16) -> ModelSpec:
    inputs = tiny.INPUTS.model_copy(update={"image_size": size})
    return ModelSpec(inputs=inputs, model=ModelConfig(image=name, width=4), labels=tiny.LABELS)


# --- what holds for all of them -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [16, 32, 64])
def test_any_batch_gives_finite_output_and_gradient_and_no_study_sees_another(name: str, size: int) -> None:
    encoder, whole = made(name, size), images(7, size)
    out = encoder(whole)
    assert out.shape == (7, 4)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    with torch.no_grad():
        assert encoder(whole[:0]).shape == (0, 4)
        torch.testing.assert_close(encoder(whole[2:3]), out[2:3], rtol=1e-3, atol=1e-4)
        assert encoder(torch.zeros(1, 1, size, size)).isfinite().all(), "an absent image is all 0"


@pytest.mark.parametrize(("name", "size"), [*((n, 17) for n in NAMES), *((n, s) for n in SMALL for s in (100, 131))])
def test_odd_sizes_fit(name: str, size: int) -> None:
    with torch.no_grad():
        out = made(name, size)(images(2, size))
    assert out.shape == (2, 4)
    assert out.isfinite().all()
    assert not torch.equal(out[0], out[1])


@pytest.mark.slow
@every
def test_the_largest_image_fits(name: str) -> None:
    with torch.no_grad():
        assert made(name, 1024)(images(1, 1024)).isfinite().all()


@every
def test_every_layer_is_one_that_both_ways_of_clipping_bound(name: str) -> None:
    encoder = made(name, 32)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    assert not any(getattr(m, "inplace", False) for m in encoder.modules())
    assert next(iter(encoder.parameters())).shape[1:2] != (3,), "one channel"
    for clipping in CLIPPING:
        wrap(made(name, 32).train(), clipping)


@every
def test_nothing_but_trained_weights_is_in_what_a_hospital_sends(name: str) -> None:
    encoder = made(name, 32)
    assert set(encoder.state_dict()) == {key for key, _ in encoder.named_parameters()}
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@every
def test_saved_and_loaded_it_says_the_same(name: str, tmp_path: Path) -> None:
    model, batch = build_model(spec(name), 4).eval(), tiny.batch([2, 1])
    save_model(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(batch.inputs, batch.seen_BM), load_model(tmp_path)(batch.inputs, batch.seen_BM))


@both_ways
@pytest.mark.parametrize("name", small)
def test_one_patient_moves_the_sum_by_at_most_c(name: str, clipping: str) -> None:
    whole = tiny.batch([1, 3, 2], seed=5)
    whole.seen_BM[:, 0] = True
    moved = sensitivity(engine_for(spec(name), clipping=clipping), whole)
    assert max(moved) <= LIMIT
    assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"


@pytest.mark.parametrize("name", small)
def test_both_ways_of_clipping_give_one_sum_and_it_is_autograds(name: str) -> None:
    whole = tiny.batch([1, 2, 1], seed=5)
    whole.seen_BM[:, 0] = True
    sums = [clipped_sum(engine_for(spec(name), clipping=c, max_grad_norm=1e6), whole) for c in CLIPPING]
    model = build_model(spec(name), 3).train()
    share_B = 1 / torch.bincount(whole.patient_B).float()[whole.patient_B]
    (study_loss(model(whole.inputs, whole.seen_BM), whole) * share_B).sum().backward()
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    for ours in sums:
        assert float((ours - expected).norm()) <= 1e-3 * float(expected.norm())


@both_ways
@pytest.mark.parametrize("name", small)
def test_it_passes_the_rehearsal_that_comes_before_any_charge(name: str, clipping: str) -> None:
    model = wrap(build_model(spec(name), 3).train(), clipping)
    one, other = (made_up(spec(name), (1, 2, 1), seed) for seed in (1, 2))
    rehearse(model, study_loss, one, other)


# --- torchvision's architectures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [16, 64])
def test_convolutions_of_a_torchvision_state_dict_fit_but_for_the_first(name: str, size: int) -> None:
    import torchvision

    with torch.device("meta"):
        there = getattr(torchvision.models, {"vgg16": "vgg16_bn"}.get(name, name))(weights=None)
    theirs = {key: m.weight.shape for key, m in there.named_modules() if isinstance(m, nn.Conv2d)}
    ours = {
        key.removeprefix("backbone."): m.weight.shape
        for key, m in made(name, size).named_modules()
        if isinstance(m, nn.Conv2d)
    }
    assert list(ours) == list(theirs)
    assert [key for key in ours if ours[key] != theirs[key]] == [next(iter(ours))]
    first = next(iter(ours))
    assert ours[first] == (theirs[first][0], 1, *theirs[first][2:])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_sum_with_the_shortcut_is_torchvisions(name: str) -> None:
    encoder, image = made(name, 64), images(2, 64)
    with torch.no_grad():
        net = encoder.backbone
        assert isinstance(net, nn.Module)
        torch.testing.assert_close(encoder(image), encoder.project(net(image)))  # type: ignore[operator]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [16, 31, 32, 63, 64, 65])
def test_a_small_image_keeps_a_last_map_of_more_than_one_pixel(name: str, size: int) -> None:
    with torch.device("meta"):
        encoder, image = made(name, size), torch.zeros(1, 1, size, size)
    assert 2 <= encoder.last_map(image).shape[-1] <= 4  # type: ignore[operator]


# --- fixed features: what their sources say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_only_one_linear_layer_learns_and_features_follow_from_the_image_alone(name: str) -> None:
    first, second = made(name, 32), encoders["image"].get(name)(InputSpec(image_size=32), 4)
    assert isinstance(first, FixedFeatures)
    assert isinstance(second, FixedFeatures)
    assert {key for key, _ in first.named_parameters()} == {"project.weight", "project.bias"}
    assert not torch.equal(first.project.weight, second.project.weight)
    assert torch.equal(first.features(images(3, 32)), second.features(images(3, 32)))


@pytest.mark.parametrize("name", FIXED)
def test_portions_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = made(name, 32), images(5, 32)
    assert isinstance(encoder, FixedFeatures)
    whole = encoder.features(batch)
    monkeypatch.setattr(image_fixed, "PORTION", 1)
    torch.testing.assert_close(encoder.features(batch), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FIXED)
def test_a_blank_or_partly_blank_image_has_finite_features(name: str) -> None:
    encoder, image = made(name, 32), torch.zeros(2, 1, 32, 32)
    image[1, 0, 8:20, 4:9] = 1
    assert encoder(image).isfinite().all()


@pytest.mark.parametrize("name", FIXED)
def test_a_shift_by_a_pixel_changes_features_less_than_pixels(name: str) -> None:
    encoder, wide = made(name, 64), images(4, 65)
    assert isinstance(encoder, FixedFeatures)
    here, there = wide[..., :64, :64], wide[..., :64, 1:]
    moved = float((encoder.features(here) - encoder.features(there)).norm() / encoder.features(here).norm())
    assert moved < 0.5 * float((here - there).norm() / here.norm())


def grating(angle: float, frequency: float, size: int) -> Tensor:
    """(1, 1, size, size), brightness changes along `angle`."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return torch.cos(frequency * (math.cos(angle) * x + math.sin(angle) * y) + 0.3)[None, None]


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_scattering_answers_a_grating_at_its_scale_and_orientation(scale: int) -> None:
    encoder = made("scattering", 64)
    assert isinstance(encoder, Scattering)
    image = torch.cat([grating(math.pi * o / 8, image_fixed.XI / 2**scale, 64) for o in range(8)])
    after = encoder.side - 64 - 8
    spectrum = torch.fft.fft2(nn.functional.pad(image, (8, after, 8, after), mode="reflect"))
    answers = [encoder._cells(encoder._wavelets(spectrum, j, 0).squeeze(1), j)[..., 1:3, 1:3] for j in range(3)]
    strength_BJL = torch.stack([answer.mean((2, 3)) for answer in answers], dim=1)
    assert strength_BJL.flatten(1).argmax(1).tolist() == [8 * scale + o for o in range(8)]


@pytest.mark.parametrize("k", range(9))
def test_hog_answers_a_grating_in_the_bin_of_its_direction(k: int) -> None:
    encoder = made("hog", 64)
    assert isinstance(encoder, HOG)
    histogram_K = encoder.histograms(grating(math.pi * k / 9, 0.4, 64)[0])[0, :, 1:-1, 1:-1].mean((1, 2))
    assert int(histogram_K.argmax()) == k
    assert float(histogram_K[k]) > 0.9 * float(histogram_K.sum())


def spatial_morlet(side: int, scale: int, orientation: int, step: int) -> np.ndarray:
    """The wavelet by its formula at every step-th pixel of a circle of `side` pixels; np.roll convolves with it."""
    spread, xi, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, 0.5
    reach = np.arange(-3 * side, 3 * side, step)
    y, x = np.meshgrid(reach, reach, indexing="ij")
    angle = math.pi * orientation / 8
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    blob = np.exp(-(along**2 + slant**2 * across**2) / (2 * spread**2))
    wave = blob * np.exp(1j * xi * along)
    whole = (wave - wave.sum() / blob.sum() * blob) * slant / (2 * math.pi * spread**2) * step**2
    n = side // step
    return whole.reshape(6, n, 6, n).sum((0, 2))


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Circular, by its definition."""
    out = np.zeros(image.shape, dtype=complex)
    for y, x in np.argwhere(np.abs(kernel) > 1e-9):
        out += kernel[y, x] * np.roll(image, (y, x), (0, 1))
    return out


def cells(u: np.ndarray, size: int, border: int, step: int, blur: float) -> np.ndarray:
    """Mean over each of 4 x 4 cells of the blurred u: the Gaussian summed over the cell in steps of 1/64 pixel."""
    fine = (np.arange(64 * size) + 0.5) / 64 - 0.5
    place = np.arange(len(u)) * step - border
    gauss = np.exp(-((place[:, None] - fine[None]) ** 2) / (2 * blur**2))
    weight = gauss.reshape(len(u), 4, -1).sum(2).T
    weight /= weight.sum(1, keepdims=True)
    return weight @ u @ weight.T


def test_scattering_equals_convolutions_by_their_definition() -> None:
    encoder, image = made("scattering", 16), images(1, 16, seed=3)
    assert isinstance(encoder, Scattering)
    x = np.pad(image[0, 0].double().numpy(), 4, mode="reflect")
    assert x.shape == (encoder.side, encoder.side)
    first = [[np.abs(convolved(x, spatial_morlet(24, j, o, 1))[:: 2**j, :: 2**j]) for o in range(8)] for j in (0, 1)]
    second = [np.abs(convolved(u, spatial_morlet(24, 1, o, 1))[::2, ::2]) for u in first[0] for o in range(8)]
    groups = [[x], first[0], second, first[1]]
    expected = []
    for steps, maps in zip((1, 1, 2, 2), groups, strict=True):
        values = np.stack([cells(u, 16, 4, steps, 0.8 * 2) for u in maps])
        expected.append(((values - values.mean()) / np.sqrt(values.var() + image_fixed.FAINT)).ravel())
    found = encoder.features(image)[0].double().numpy()
    np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-3)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_wavelet_on_a_coarser_grid_is_the_same_wavelet(scale: int) -> None:
    direct = spatial_morlet(48, scale, 3, 2)
    bank = image_fixed.morlet_bank(24, scale - 1)[3].double().numpy()
    np.testing.assert_allclose(np.fft.ifft2(bank), direct, atol=2e-3 * np.abs(direct).max())


def test_hog_equals_loops_over_pixels() -> None:
    encoder, image = made("hog", 18), images(1, 18, seed=4)
    assert isinstance(encoder, HOG)
    x, side, cell = np.pad(image[0, 0].double().numpy(), 1, mode="edge"), encoder.side, encoder.cell
    assert (side, cell) == (5, 4)
    histogram = np.zeros((side, side, 9))
    for row in range(18):
        for column in range(18):
            dx, dy = x[row + 1, column + 2] - x[row + 1, column], x[row + 2, column + 1] - x[row, column + 1]
            place = math.degrees(math.atan2(dy, dx)) % 180 / 20
            low, share = int(place), place - int(place)
            histogram[row // cell, column // cell, low % 9] += (1 - share) * math.hypot(dx, dy) / cell**2
            histogram[row // cell, column // cell, (low + 1) % 9] += share * math.hypot(dx, dy) / cell**2
    blocks = np.zeros((36, side - 1, side - 1))
    for row in range(side - 1):
        for column in range(side - 1):
            block = np.concatenate([histogram[row + a, column + b] for a in (0, 1) for b in (0, 1)])
            block = np.minimum(block / math.sqrt((block**2).sum() + image_fixed.FLAT**2), 0.2)
            blocks[:, row, column] = block / math.sqrt((block**2).sum() + image_fixed.FLAT**2)
    np.testing.assert_allclose(encoder.features(image)[0].double().numpy(), blocks.ravel(), atol=1e-4)


class Alone(nn.Module):
    """An encoder as a whole model, to see that its weights get the gradient that counts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = made(name, 16)

    def forward(self, inputs: dict[str, Tensor], seen_BM: Tensor, timeline: Timeline) -> Tensor:
        out: Tensor = self.encoder(inputs["image"])
        return out


@both_ways
@pytest.mark.parametrize("name", SMALL)
def test_an_encoder_alone_is_bounded_too(name: str, clipping: str) -> None:
    def squares(out_BD: Tensor, batch: Batch) -> Tensor:
        return (out_BD - 1).square().sum(1)

    moved = sensitivity(engine_on(Alone(name), clipping=clipping), tiny.batch([1, 3, 2]), loss=squares)
    assert max(moved) == pytest.approx(1, abs=1e-4)
