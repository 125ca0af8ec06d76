"""Each fusion alone: any subset, absent slots, both ways of clipping, and the task that shows what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmm.models.fusion import Fused, fusions
from fedmm.models.fusion_decision import Autoencoder, Decision
from fedmm.models.heads import Head, Output, answer, probabilities, study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model
from fedmm.models.store import load_model, save_model
from fedmm.privacy.engine import CLIPPING, wrap
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import MODALITIES, Batch, Labels
from fedmm.training.loop import made_up
from tests import tiny
from tests.privacy.measure import LIMIT, clipped_sum, engine_for, hospital, sensitivity

WIDTH = 8
SEEN_8M = torch.tensor([[bool(n >> m & 1) for m in range(3)] for n in range(8)])
ONE = Labels(findings=("yes",))
JOINT = ("concat", "cross_attention", "gated", "hierarchical", "low_rank", "tokens", "mimo", "autoencoder")
SEPARATE = ("additive", "mean_decision", "product_of_experts", "stacking")
every = pytest.mark.parametrize("fusion", fusions.names())
decisions = pytest.mark.parametrize("fusion", ["mean_decision", "product_of_experts", "stacking", "weighted_decision"])


class Behind(MultimodalModel):
    """The real fusion and heads behind embeddings that are given."""

    def __init__(self, fusion: str, labels: Labels = tiny.LABELS, width: int = WIDTH) -> None:
        torch.manual_seed(3)
        nn.Module.__init__(self)
        self.fusion = fusions.get(fusion)(width)
        self.head = Head(width, labels)
        self.further = nn.ModuleList(Head(width, labels) for _ in range(self.fusion.views - 1))

    def forward(self, z_BMD: Tensor, seen_BM: Tensor) -> Tensor | Output:  # type: ignore[override]
        fused = self.fusion(z_BMD * seen_BM.unsqueeze(-1), seen_BM)
        return self._decide(fused) if isinstance(fused, Fused) else self._answer(fused)


def labelled(seen_BM: Tensor, yes_B: Tensor) -> Batch:
    studies = len(seen_BM)
    return Batch(
        inputs={}, seen_BM=seen_BM, finding_BF=yes_B.float().unsqueeze(1), class_B=torch.full((studies,), -1),
        patient_B=torch.arange(studies), patients=studies,
        further_BK=torch.zeros(studies, 0), day_B=torch.full((studies,), torch.nan),
        key_B=torch.arange(studies),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit(model: nn.Module, z_BMD: Tensor, batch: Batch, *, steps: int = 120) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        study_loss(model(z_BMD, batch.seen_BM), batch).mean().backward()
        optimizer.step()


def right(logits_BO: Tensor, yes_B: Tensor) -> float:
    return float(((logits_BO[:, 0] > 0) == yes_B).float().mean())


def signs(studies: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, M, D) noise whose first value is a sign, and the signs (B, M)."""
    chance = torch.Generator().manual_seed(seed)
    sign_BM = torch.randint(0, 2, (studies, 3), generator=chance) * 2.0 - 1
    z_BMD = 0.1 * torch.randn(studies, 3, WIDTH, generator=chance)
    z_BMD[:, :, 0] += sign_BM
    return z_BMD, sign_BM


# --- what holds for each ------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("width", [5, WIDTH])
def test_all_subsets_give_finite_logits_loss_and_gradients(fusion: str, width: int) -> None:
    model = Behind(fusion, width=width)
    for studies in (0, 1, 7, 8):
        z_BMD, seen_BM = torch.randn(studies, 3, width, requires_grad=True), SEEN_8M[8 - studies :]
        whole = tiny.batch([1] * studies)
        output = model(z_BMD, seen_BM)
        assert answer(output).shape == (studies, len(tiny.LABELS.outputs))
        loss_B = study_loss(output, whole)
        assert loss_B.shape == (studies,)
        assert loss_B.isfinite().all()
        loss_B.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [*model.parameters(), z_BMD])
        values = probabilities(output, tiny.LABELS)
        assert ((values >= 0) & (values <= 1)).all()
        torch.testing.assert_close(values[:, 2:].sum(1), torch.ones(studies))


@every
def test_a_study_does_not_see_the_others(fusion: str) -> None:
    model, z_BMD, whole = Behind(fusion), torch.randn(8, 3, WIDTH), tiny.batch([1] * 8)
    loss_B = study_loss(model(z_BMD, SEEN_8M), whole)
    for i in range(8):
        alone = study_loss(model(z_BMD[i : i + 1], SEEN_8M[i : i + 1]), tiny.pick(whole, [i]))
        torch.testing.assert_close(alone, loss_B[i : i + 1])


@every
def test_each_subset_has_an_answer_of_its_own(fusion: str) -> None:
    z_BMD = torch.randn(1, 3, WIDTH).expand(8, -1, -1)
    assert len({tuple(row) for row in answer(Behind(fusion)(z_BMD, SEEN_8M)).tolist()}) == 8


@every
def test_a_saved_model_is_the_same_again_and_holds_weights_alone(fusion: str, tmp_path: Path) -> None:
    model, batch = build_model(tiny.spec(fusion), 4).eval(), tiny.batch([2, 1])
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.fusion.buffers())
    save_model(model, tmp_path)
    here, there = (answer(m(batch.inputs, batch.seen_BM)) for m in (model, load_model(tmp_path)))
    assert torch.equal(here, there)


@every
def test_both_ways_of_clipping_bound_a_patient_and_agree(fusion: str) -> None:
    whole = tiny.batch((1, 5, 2, 3))
    sums = []
    for clipping in CLIPPING:
        engine = engine_for(tiny.spec(fusion), clipping=clipping)
        assert 1 - 1e-4 < max(sensitivity(engine, hospital(whole).cohort("all"), limit=6)) <= LIMIT
        sums.append(clipped_sum(engine, whole))
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-6)


@every
@pytest.mark.parametrize("clipping", CLIPPING)
def test_it_passes_the_rehearsal_that_comes_before_any_charge(fusion: str, clipping: str) -> None:
    spec = ModelSpec(inputs=tiny.INPUTS, model=tiny.leaves(6, fusion=fusion), labels=tiny.LABELS)
    one, other = (made_up(spec, (1, 2, 1), seed) for seed in (1, 2))
    rehearse(wrap(build_model(spec).train(), clipping), study_loss, one, other)


# --- what only two modalities together say ------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", JOINT + SEPARATE)
def test_a_contradiction_between_image_and_report_is_learnt_by_joint_fusions_alone(fusion: str) -> None:
    """XOR of two signs. The separate ones see half of it whatever they learn; a bound of 0.8 keeps chance out."""
    z_BMD, sign_BM = signs(160)
    yes_B = sign_BM[:, 0] * sign_BM[:, 1] > 0
    model = Behind(fusion, ONE)
    fit(model, z_BMD, labelled(torch.ones(160, 3, dtype=torch.bool), yes_B))
    found = right(answer(model(z_BMD, torch.ones(160, 3, dtype=torch.bool))), yes_B)
    assert found > 0.95 if fusion in JOINT else found < 0.8


@every
def test_what_each_modality_says_a_little_of_is_learnt_with_a_third_missing(fusion: str) -> None:
    z_BMD, sign_BM = signs(200, seed=1)
    seen_BM = torch.rand(200, 3, generator=torch.Generator().manual_seed(2)) < 0.67
    vote_B = (sign_BM * seen_BM).sum(1)
    clear_B = vote_B != 0
    z_BMD, seen_BM, yes_B = z_BMD[clear_B], seen_BM[clear_B], vote_B[clear_B] > 0
    model = Behind(fusion, ONE)
    fit(model, z_BMD, labelled(seen_BM, yes_B))
    assert right(answer(model(z_BMD, seen_BM)), yes_B) > 0.95


# --- at the decision level ----------------------------------------------------------------------------------------------


@decisions
def test_the_answer_is_the_weighted_sum_of_the_experts_that_are_there(fusion: str) -> None:
    model = Behind(fusion)
    assert isinstance(model.fusion, Decision)
    z_BMD = torch.randn(8, 3, WIDTH) * SEEN_8M.unsqueeze(-1)
    fused = model.fusion(z_BMD, SEEN_8M)
    assert not fused.weight_BV[:, 1:][~SEEN_8M].any(), "an absent expert is heard"
    output = model(z_BMD, SEEN_8M)
    model.further.requires_grad_(False).apply(lambda module: shout(module))
    nobody = model(z_BMD, SEEN_8M)
    assert torch.equal(nobody.answer_BO[0], output.answer_BO[0]), "without any modality only the base rate speaks"
    torch.testing.assert_close(output.answer_BO[0], output.views_BVO[0, 0] * fused.weight_BV[0, 0])


def shout(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.bias, 100.0)


def test_a_product_of_experts_multiplies_the_odds_of_those_present_and_counts_the_base_rate_once() -> None:
    model = Behind("product_of_experts", ONE)
    output = model(torch.randn(8, 3, WIDTH), SEEN_8M)
    base_B, expert_BM = output.views_BVO[:, 0, 0], output.views_BVO[:, 1:, 0]
    expected_B = base_B + ((expert_BM - base_B.unsqueeze(1)) * SEEN_8M).sum(1)
    torch.testing.assert_close(output.answer_BO[:, 0], expected_B)
    alone_B = SEEN_8M.sum(1) == 1
    torch.testing.assert_close(output.answer_BO[alone_B, 0], expert_BM[alone_B][SEEN_8M[alone_B]])


def test_weighted_decisions_share_one_vote() -> None:
    fused = Behind("weighted_decision").fusion(torch.randn(8, 3, WIDTH), SEEN_8M)
    torch.testing.assert_close(fused.weight_BV.sum(1), torch.ones(8))


def test_stacking_learns_that_two_experts_say_the_same() -> None:
    """A product of experts counts it twice and is over-confident; the coefficients learn better."""
    z_BMD, sign_BM = signs(600)
    z_BMD[:, 1] = z_BMD[:, 0]
    right_B = torch.rand(600, generator=torch.Generator().manual_seed(4)) < 0.8
    yes_B = (sign_BM[:, 0] > 0) == right_B
    seen_BM = torch.tensor([[True, True, False]]).repeat(600, 1)
    losses = {}
    for fusion in ("stacking", "product_of_experts"):
        model = Behind(fusion, ONE)
        fit(model, z_BMD, labelled(seen_BM, yes_B))
        losses[fusion] = float(study_loss(model(z_BMD, seen_BM).answer_BO.detach(), labelled(seen_BM, yes_B)).mean())
    assert losses["stacking"] < losses["product_of_experts"]


# --- further heads and penalties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["mimo", "mean_decision", "product_of_experts"])
def test_each_modalitys_own_head_learns_where_its_modality_is_there(fusion: str) -> None:
    z_BMD, sign_BM = signs(300)
    z_BMD[:] = z_BMD[:, :1] + 0.1 * torch.randn(300, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    yes_B = sign_BM[:, 0] > 0
    seen_BM = torch.tensor([[True, True, False]]).repeat(300, 1)
    model = Behind(fusion, ONE)
    absent = [p.clone() for p in model.further[2].parameters()]
    fit(model, z_BMD, labelled(seen_BM, yes_B), steps=100)
    output = model(z_BMD, seen_BM)
    assert all(right(output.views_BVO[:, v], yes_B) > 0.95 for v in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(absent, model.further[2].parameters(), strict=True))


def test_mimo_answers_from_all_and_its_further_heads_are_not_asked() -> None:
    output = Behind("mimo")(torch.randn(8, 3, WIDTH), SEEN_8M)
    assert torch.equal(output.answer_BO, output.views_BVO[:, 0])
    assert torch.equal(output.trained_BV[:, 1:], SEEN_8M)


@pytest.mark.parametrize("change", [lambda o: o.answer_BO, lambda o: o.views_BVO], ids=["answer", "views"])
def test_the_loss_is_that_of_the_answer_and_the_mean_of_the_trained_views(change: Callable[[Output], Tensor]) -> None:
    whole = tiny.batch([1] * 8)
    output = Behind("mimo")(torch.randn(8, 3, WIDTH), SEEN_8M)
    views = [study_loss(output.views_BVO[:, 1 + m], whole) * SEEN_8M[:, m] for m in range(len(MODALITIES))]
    expected = study_loss(output.answer_BO, whole) + sum(views) / SEEN_8M.sum(1).clamp(min=1)
    torch.testing.assert_close(study_loss(output, whole), expected)
    assert change(output).requires_grad


def test_the_autoencoder_learns_to_imagine_the_absent() -> None:
    """All three modalities say the same: its error falls to a tenth, and what it imagines is near what was hidden."""
    model = Behind("autoencoder", ONE)
    assert isinstance(model.fusion, Autoencoder)
    chance = torch.Generator().manual_seed(5)
    z_BMD = torch.randn(200, 1, WIDTH, generator=chance).repeat(1, 3, 1)
    seen_BM = torch.rand(200, 3, generator=chance) < 0.8
    batch = labelled(seen_BM, z_BMD[:, 0, 0] > 0)
    before = float(model(z_BMD, seen_BM).penalty_B.detach().mean())
    fit(model, z_BMD, batch, steps=300)
    assert float(model(z_BMD, seen_BM).penalty_B.detach().mean()) < before / 10
    without_audio_BM = torch.tensor([[True, True, False]]).repeat(200, 1)
    shown_BMD = z_BMD * without_audio_BM.unsqueeze(-1)
    imagined_BD = model.fusion.reconstruct(shown_BMD, without_audio_BM)[:, 0, 2]
    assert float((imagined_BD.detach() - z_BMD[:, 2]).square().mean()) < 0.2 * float(z_BMD.square().mean())


def test_the_penalty_is_zero_where_nothing_can_be_imagined_from_anything() -> None:
    output = Behind("autoencoder")(torch.randn(8, 3, WIDTH), SEEN_8M)
    few_B = SEEN_8M.sum(1) < 2
    assert torch.equal(output.penalty_B > 0, ~few_B)


def test_reconstructing_does_not_pull_at_what_is_reconstructed() -> None:
    """With one modality hidden from the others' encoder, only what made the guess gets a gradient."""
    z_BMD = torch.randn(1, 3, WIDTH, requires_grad=True)
    fused = Behind("autoencoder").fusion(z_BMD, torch.tensor([[True, True, False]]))
    (gradient,) = torch.autograd.grad(fused.penalty_B.sum(), z_BMD)
    assert gradient[0, :2].any(1).all()
    assert not gradient[0, 2].any()
