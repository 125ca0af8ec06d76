"""Where privacy's chance comes from."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedmm.privacy.noise import SystemNoise, add_on_grid


def test_seeding_everything_that_can_be_seeded_does_not_repeat_the_noise() -> None:
    draws = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        noise = SystemNoise()
        draws.append((noise.gaussian((8,), 1.0).tolist(), noise.sample(64, 0.5), noise.generator().random()))
    assert draws[0][0] != draws[1][0]
    assert draws[0][1] != draws[1][1]  # equal by chance once in 2^64
    assert draws[0][2] != draws[1][2]


def test_two_processes_draw_different_noise() -> None:
    code = "from fedmm.privacy.noise import SystemNoise; print(SystemNoise().gaussian((4,), 1.0).tolist())"
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(outputs) == 2


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
        member[i, noise.sample(patients, rate)] = 1
    variance = rate * (1 - rate)
    assert np.abs(member.mean(0) - rate).max() < 5 * math.sqrt(variance / draws)
    assert abs(member.sum(1).var() / (patients * variance) - 1) < 5 * math.sqrt(2.2 / draws)
    together = (member[:, 0] * member[:, 1]).mean()
    assert abs(together - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / draws)


def test_rate_one_takes_everybody() -> None:
    assert SystemNoise().sample(100, 1.0) == list(range(100))


def test_nobody_to_sample_is_an_empty_sample() -> None:
    assert SystemNoise().sample(0, 0.5) == []


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
