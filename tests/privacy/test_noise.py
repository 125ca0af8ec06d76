"""Where privacy's chance comes from."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedmm.config import TrainingConfig
from fedmm.errors import PlanInvalid
from fedmm.models.multimodal import build_model
from fedmm.privacy.engine import CLIPPING
from fedmm.privacy.noise import Noise, SystemNoise, add_on_grid
from fedmm.privacy.plan import PrivacyPlan, Rate
from fedmm.training.loop import Cohort, Nobody, Workbench, train
from tests import tiny
from tests.privacy.measure import hospital, noise_spread, plan

ROOT = Path(__file__).resolve().parents[2]


def test_seeding_everything_that_can_be_seeded_does_not_repeat_the_noise() -> None:
    draws = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        noise = SystemNoise()
        draws.append((noise.gaussian((8,), 1.0).tolist(), noise.sample(64, Rate(0.5)), noise.generator().random()))
    assert draws[0][0] != draws[1][0]
    assert draws[0][1] != draws[1][1]  # equal by chance once in 2^64
    assert draws[0][2] != draws[1][2]


WHOLE_ROUND = """
import random, numpy, torch
random.seed(1); numpy.random.seed(1); torch.manual_seed(1); torch.use_deterministic_algorithms(True)
from fedmm.privacy.noise import SystemNoise
from tests.privacy.test_noise import round_of
from tests.privacy.measure import plan
print(SystemNoise().gaussian((4,), 1.0).tolist(), [v.sum().item() for v in round_of(plan()).values()])
"""


def test_two_processes_with_every_seed_fixed_release_different_rounds() -> None:
    seeds = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WHOLE_ROUND]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=seeds, cwd=ROOT).stdout for _ in "ab"
    ]
    first, second = ({float(n) for n in re.findall(r"-?\d\.\d+", text)} for text in outputs)
    assert len(first) > 10
    assert not first & second


# --- through a whole round of training ------------------------------------------------------------------------------------


def round_of(
    asked: PrivacyPlan, cohort: Cohort | None = None, *, noise: Noise | None = None, clipping: str = "hooks"
) -> dict[str, torch.Tensor]:
    """What a round adds to each tensor, in units of noise_multiplier x C: learning rate and divisor taken out."""
    config = TrainingConfig(learning_rate=0.5, batch_size=4, modality_dropout=0)
    bench = Workbench(tiny.spec(), torch.device("cpu"), clipping=clipping)
    bench.load(START)
    train(bench, cohort or Nobody(), asked, config=config, noise=noise or SystemNoise())
    unit = 0.5 / 4 * asked.noise_multiplier * asked.max_grad_norm
    return {name: (START[name].double() - value.double()) / unit for name, value in bench.weights().items()}


START = {name: torch.zeros_like(value) for name, value in build_model(tiny.spec(), 1).state_dict().items()}


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_released_round_has_noise_of_the_planned_spread_in_every_tensor(clipping: str) -> None:
    """Chi-square for each tensor over 30 rounds: false alarm 1e-6 for all tensors together."""
    releases = [round_of(plan(noise=2.0, max_grad_norm=0.4), clipping=clipping) for _ in range(30)]
    assert noise_spread(releases, 1.0) == []


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_round_with_patients_has_the_same_noise_around_their_clipped_sum(clipping: str) -> None:
    """Two rounds on the same patients differ by noise alone: spread sqrt(2). False alarm 1e-6."""
    patients = hospital(tiny.batch((1, 5, 2, 3))).cohort("all")
    asked = plan(noise=2.0, max_grad_norm=0.4)
    differences = []
    for _ in range(15):
        one, other = (round_of(asked, patients, clipping=clipping) for _ in "ab")
        differences.append({name: value - other[name] for name, value in one.items()})
    assert noise_spread(differences, math.sqrt(2)) == []


def test_rounds_and_hospitals_share_no_noise() -> None:
    """Correlation of all pairs of 12 releases (3 hospitals, 4 rounds), also shifted by one value; 1e-6 in all."""
    releases = []
    for _ in range(3):
        noise = SystemNoise()  # of one hospital's process
        releases += [torch.cat([v.flatten() for v in round_of(plan(), noise=noise).values()]) for _ in range(4)]
    rows = torch.stack([row for release in releases for row in (release, release.roll(1))])
    correlation = (torch.corrcoef(rows) - torch.eye(len(rows))).abs()
    pairs = len(rows) * (len(rows) - 1) / 2
    bound = float(stats.norm.isf(1e-6 / pairs / 2)) / math.sqrt(rows.shape[1])
    assert float(correlation.max()) < bound


@pytest.mark.parametrize("shape", [(), (1,), (3,), (200, 301)])
def test_gaussian_has_the_shape_type_and_spread(shape: tuple[int, ...]) -> None:
    """Mean, variance and fourth moment at 5 sigma: false alarm below 2e-6 a shape."""
    values = SystemNoise().gaussian(shape, 2.5)
    assert values.shape == shape
    assert values.dtype == torch.float64
    n = values.numel()
    if n > 1000:
        z = values / 2.5
        assert abs(float(z.mean())) < 5 / math.sqrt(n)
        assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_draws_of_different_rounds_and_hospitals_are_not_correlated() -> None:
    """Largest of 45 correlations of 20,000 draws at 5 sigma: false alarm 3e-5."""
    draws = torch.stack([SystemNoise().gaussian((20_000,), 1.0) for _ in range(10)])
    correlation = torch.corrcoef(draws) - torch.eye(10)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_sampling_is_poisson(rate: float) -> None:
    """Each patient in with the same probability, independently: size has variance N q (1 - q). 5 sigma, false alarm 4e-6."""
    noise, patients, draws = SystemNoise(), 50, 4_000
    member = np.zeros((draws, patients))
    for i in range(draws):
        member[i, noise.sample(patients, Rate(rate))] = 1
    variance = rate * (1 - rate)
    assert np.abs(member.mean(0) - rate).max() < 5 * math.sqrt(variance / draws)
    assert abs(member.sum(1).var() / (patients * variance) - 1) < 5 * math.sqrt(2.2 / draws)
    together = (member[:, 0] * member[:, 1]).mean()
    assert abs(together - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / draws)


def test_rate_one_takes_everybody() -> None:
    assert SystemNoise().sample(100, Rate(1.0)) == list(range(100))


@pytest.mark.parametrize("rate", [0.5, 1, 1 / 32, True, np.float64(0.5)])
def test_the_sampler_takes_the_plans_rate_and_no_other_number(rate: float) -> None:
    with pytest.raises(PlanInvalid, match="takes a Rate"):
        SystemNoise().sample(4, rate)


def test_nobody_to_sample_is_an_empty_sample() -> None:
    assert SystemNoise().sample(0, Rate(0.5)) == []


def test_the_released_sum_lies_on_the_grid_and_keeps_its_value() -> None:
    std = 0.37
    total = torch.tensor([0.0, 1.0, -3.3, 1e-9])
    noise = torch.tensor([0.2, -0.5, 0.1, 0.0], dtype=torch.float64)
    out = add_on_grid(total, noise, std)
    grid = 2.0 ** (math.floor(math.log2(std)) - 20)
    assert out.dtype == torch.float32
    assert torch.equal(torch.round(out.double() / grid) * grid, out.double())
    torch.testing.assert_close(out.double(), total.double() + noise, rtol=0, atol=grid)


def test_low_bits_of_the_sum_do_not_survive() -> None:
    """Two neighbours that differ by less than the grid give the same release for almost all noise: no gaps to read."""
    noise = SystemNoise().gaussian((50_000,), 1.0)
    one = add_on_grid(torch.full((50_000,), 0.1), noise, 1.0)
    other = add_on_grid(torch.full((50_000,), 0.1 + 1e-8), noise, 1.0)
    assert float((one != other).double().mean()) < 0.05  # expected 1e-8 / 2^-20, about 1 %
    assert set(torch.unique(one).tolist()) & set(torch.unique(other).tolist())


def test_a_copy_for_another_process_gets_its_own_key() -> None:
    kind, arguments = SystemNoise().__reduce__()
    assert arguments == ()
    assert kind().gaussian((4,), 1.0).tolist() != kind().gaussian((4,), 1.0).tolist()
