"""Book-keeping layer by layer against Opacus' own gradients: norms and clipped sums, in single and double precision."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedmm.privacy import ghost
from fedmm.privacy.clip import Clip
from fedmm.privacy.ghost import POOLED, TapedModel, parts_of
from fedmm.privacy.layers import way_of
from fedmm.privacy.parts import Factors, Groups, Pool, SumPart
from tests.privacy.measure import FORMS, force

STUDIES = (3, 1, 5, 2, 1, 4)  # not sorted: rows are brought into order
LAYERS = {
    "linear": (nn.Linear(6, 5), (6,)),
    "linear over positions": (nn.Linear(6, 5), (4, 6)),
    "linear over windows and positions": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "layer norm": (nn.LayerNorm(6), (6,)),
    "layer norm over positions": (nn.LayerNorm(6), (4, 6)),
    "layer norm of two dimensions": (nn.LayerNorm((4, 6)), (3, 4, 6)),
    "group norm": (nn.GroupNorm(2, 6), (6, 5, 4)),
    "group norm over time": (nn.GroupNorm(3, 6), (6, 5)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 6)),
    "conv2d dilated": (nn.Conv2d(3, 4, (3, 2), padding=(2, 0), dilation=(2, 1)), (3, 8, 6)),
    "conv2d in groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 6, 6)),
    "conv2d padded by words": (nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "embedding": (nn.Embedding(7, 4), (5,)),
    "rms norm": (nn.RMSNorm(6), (4, 6)),
}


class Twofold(nn.Module):
    """The layer behind another one, so that it is not the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = self.layer(value)
        return out


def reference(layer: nn.Module, value: Tensor, b: Tensor, groups: Groups) -> dict[str, Tensor]:
    """(P, ...) by Opacus' sampler of the layer."""
    sampler = GradSampleModule.GRAD_SAMPLERS[type(layer)]
    found = sampler(layer, [value], b)
    names = {id(weight): name for name, weight in layer.named_parameters()}
    return {names[id(weight)]: groups.sums(g) for weight, g in found.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_norms_and_the_sum_of_opacus_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, most: float, form: str
) -> None:
    """Relative to the longest norm and to the sum's length, whichever form the layer takes."""
    force(monkeypatch, form)
    torch.manual_seed(1)
    layer, shape = LAYERS[name]
    model = TapedModel(Twofold(layer.to(dtype)), GradSampleModule.GRAD_SAMPLERS).train()
    patient_S = torch.repeat_interleave(torch.arange(len(STUDIES)), torch.tensor(STUDIES))
    patient_S = patient_S[torch.randperm(len(patient_S))]
    groups = Groups(patient_S, len(STUDIES))
    size = (len(patient_S), *shape)
    value = torch.randint(0, 7, size) if isinstance(layer, nn.Embedding) else torch.randn(size, dtype=dtype)
    model.tape = []
    out = model(value)
    b = torch.randn_like(out)
    made = parts_of(model, (out * b).sum(), groups, Clip(list(layer.parameters())))
    expected = reference(layer, value, b, groups)
    square_P = torch.stack([g.flatten(1).double().square().sum(1) for g in expected.values()]).sum(0)
    norm_P = torch.stack([part.squares() for part in made]).sum(0).sqrt()
    torch.testing.assert_close(norm_P, square_P.sqrt(), rtol=most, atol=0)
    assert bool((norm_P >= square_P.sqrt() * (1 - 1e-12)).all()) or dtype == torch.float64
    factor_P = torch.rand(len(STUDIES), dtype=torch.float64)
    factor_P[2] = 0
    ours = {id(w): total for part in made for w, total in part.clipped(Factors(factor_P, some_zero=True)).items()}
    for weight_name, gradient in expected.items():
        total = torch.einsum("p,p...->...", factor_P.to(dtype), gradient)
        error = (ours[id(layer.get_parameter(weight_name))] - total).norm() / total.norm()
        assert float(error) <= most, weight_name


def test_each_form_is_taken_where_it_is_the_cheaper_one() -> None:
    groups = Groups(torch.arange(24) // 3, 8)
    book = ghost.Book(GradSampleModule.GRAD_SAMPLERS, groups, Clip([nn.Parameter(torch.zeros(1))]))
    wide, tall = nn.Linear(4096, 512), nn.Linear(64, 64)
    assert book._dots(wide, 1, keep=True)
    assert book._dots(wide, 1, keep=False)
    assert not book._dots(tall, 64, keep=True)
    assert 8 * tall.weight.numel() <= POOLED < 8 * wide.weight.numel()


def test_a_pass_lets_go_of_what_it_has_used() -> None:
    """Inputs and gradients of a layer whose patients' gradients are made are not held to the end of the pass."""
    torch.manual_seed(1)
    model = TapedModel(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), GradSampleModule.GRAD_SAMPLERS).train()
    groups = Groups(torch.arange(6) // 2, 3)
    model.tape = tape = []
    loss = model(torch.randn(6, 8)).sum()
    assert len(tape) == 4
    made = parts_of(model, loss, groups, Clip(list(model.parameters())))
    assert tape == [None] * 4
    assert {type(part) for part in made} == {SumPart, Pool}
    assert all(part._kept is not None for part in made if isinstance(part, SumPart))


def test_what_has_book_keeping_of_its_own_says_so() -> None:
    ways = {name: way_of(layer) for name, (layer, _) in LAYERS.items()}
    assert {name for name, way in ways.items() if way != "book-keeping"} == {"conv2d padded by words", "rms norm"}
