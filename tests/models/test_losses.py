"""Heads, losses and probabilities of every kind of labels: by hand, study by study, missing, extreme."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.models import losses
from fedmm.models.heads import Doubt, Head, Objective, Output, answer, kinds, probabilities, study_loss
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.store import load_model, save_model
from fedmm.schema import Batch, Labels
from tests import tiny

NAN = math.nan
EVERY, FURTHER = tiny.EVERY, tiny.FURTHER
OBJECTIVES = {
    "default": Objective(EVERY),
    "focal": Objective(EVERY, loss="focal"),
    "steep focal": Objective(EVERY, loss="focal", focal_gamma=0.3),
    "smoothed": Objective(EVERY, label_smoothing=0.2),
    "weighted": Objective(EVERY, positive_weight=5.0),
    "all": Objective(EVERY, loss="focal", label_smoothing=0.1, positive_weight=0.3),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def logits_for(batch: Batch, labels: Labels = EVERY, *, size: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(batch.studies, len(labels.outputs), generator=generator)


def doubted(logits_BO: Tensor, doubts: list[float]) -> Output:
    model = Doubt(EVERY)
    with torch.no_grad():
        model.log_variance.weight.copy_(torch.tensor([doubts]))
    return model(logits_BO)


def without(batch: Batch, kind: str) -> Batch:
    """The labels of one kind are missing."""
    further_BK = batch.further_BK.clone()
    names = {"ordinal": ["stage"], "regression": ["risk"], "survival": ["time", "event"]}.get(kind, [])
    for name in names:
        further_BK[:, EVERY.further.index(name)] = NAN
    return replace(
        batch,
        finding_BF=torch.full_like(batch.finding_BF, NAN) if kind == "findings" else batch.finding_BF,
        class_B=torch.full_like(batch.class_B, -1) if kind == "class" else batch.class_B,
        further_BK=further_BK,
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- by hand ------------------------------------------------------------------------------------------------------------


def test_focal_loss_looks_away_from_what_is_easy() -> None:
    """Lin et al. 2017: at a probability of 0.9 and gamma 2 the loss is 100 times smaller than cross entropy."""
    x = math.log(9)
    for finding, sign in ((1.0, 1), (0.0, -1)):
        logits_BF, truth_BF = torch.tensor([[sign * x]]), torch.tensor([[finding]])
        part = losses.of_findings(logits_BF, truth_BF, gamma=2.0, smoothing=0.0, positive_weight=1.0)
        assert float(part.sum_B) == pytest.approx(0.01 * -math.log(0.9), rel=1e-5)
    logits_BC = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    part = losses.of_class(logits_BC, torch.tensor([0]), gamma=2.0, smoothing=0.0)
    assert float(part.sum_B) == pytest.approx(0.3**2 * -math.log(0.7), rel=1e-5)


def test_smoothing_spreads_a_part_of_the_target_evenly() -> None:
    x = 0.7
    part = losses.of_findings(torch.tensor([[x]]), torch.tensor([[1.0]]), gamma=0, smoothing=0.2, positive_weight=1.0)
    assert float(part.sum_B) == pytest.approx(-0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x)), rel=1e-5)
    logits_BC = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    part = losses.of_class(logits_BC, torch.tensor([0]), gamma=0, smoothing=0.3)
    assert float(part.sum_B) == pytest.approx(
        -0.8 * math.log(0.7) - 0.1 * math.log(0.2) - 0.1 * math.log(0.1), rel=1e-5
    )
    expected = nn.functional.cross_entropy(logits_BC, torch.tensor([0]), label_smoothing=0.3)
    assert float(part.sum_B) == pytest.approx(float(expected), rel=1e-5)


def test_a_positive_weight_weighs_present_findings_alone() -> None:
    logits_BF, truth_BF = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.0]])
    part = losses.of_findings(logits_BF, truth_BF, gamma=0, smoothing=0, positive_weight=3.0)
    assert float(part.sum_B) == pytest.approx(-3 * math.log(sigmoid(0.4)) - math.log(sigmoid(-0.4)), rel=1e-5)
    assert float(part.count_B) == 2


def test_a_level_is_a_yes_or_no_at_each_threshold() -> None:
    logits_BK = torch.tensor([[1.0, 0.2, -2.0]])
    part = losses.of_level(logits_BK, torch.tensor([2.0]), smoothing=0.0)
    expected = -(math.log(sigmoid(1.0)) + math.log(sigmoid(0.2)) + math.log(sigmoid(2.0))) / 3
    assert float(part.sum_B) == pytest.approx(expected, rel=1e-5)
    everything = losses.of_level(logits_BK, torch.tensor([0.0]), smoothing=1 - 1e-7)
    evenly = [0.75, 0.5, 0.25]  # of four levels
    expected = -sum(
        t * math.log(sigmoid(x)) + (1 - t) * math.log(sigmoid(-x))
        for t, x in zip(evenly, [1.0, 0.2, -2.0], strict=True)
    )
    assert float(everything.sum_B) == pytest.approx(expected / 3, rel=1e-5)


def test_a_value_is_compared_on_its_public_range_and_cut_to_it() -> None:
    value_B = torch.tensor([20.0, 50.0, -3.0, NAN])
    part = losses.of_value(torch.tensor([0.25, 0.25, 0.25, 9.0]), value_B, (10.0, 30.0))
    assert part.sum_B.tolist() == pytest.approx([0.0625, 0.5625, 0.0625, 0.0])
    assert part.count_B.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("time", "event", "lived", "hit"),
    [
        (10.0, 1.0, [], 0),
        (30.0, 1.0, [], 0),  # an edge belongs to the interval that it ends
        (31.0, 1.0, [0], 1),
        (90.0, 0.0, [0, 1], None),
        (89.0, 0.0, [0], None),
        (365.0, 1.0, [0, 1], 2),
        (366.0, 1.0, [0, 1, 2], None),  # beyond the last edge: lived through all
        (9999.0, 0.0, [0, 1, 2], None),
        (10.0, 0.0, [], None),  # lost in the first interval: says nothing
    ],
)
def test_a_time_is_the_intervals_that_were_lived_and_the_hazard_of_the_event(
    time: float, event: float, lived: list[int], hit: int | None
) -> None:
    x = [0.3, -0.5, 1.1]
    part = losses.of_time(torch.tensor([x]), torch.tensor([time]), torch.tensor([event]), (30.0, 90.0, 365.0))
    expected = -sum(math.log(1 - sigmoid(x[t])) for t in lived) - (math.log(sigmoid(x[hit])) if hit is not None else 0)
    assert float(part.sum_B) == pytest.approx(expected, rel=1e-5)
    assert float(part.count_B) == (1 if lived or hit is not None else 0)


def test_probabilities_of_each_kind_by_hand() -> None:
    logits_BO = torch.tensor([[1.0, 0.2, -2.0, 0.25, 0.3, -0.5, 1.1]])
    lived = [sigmoid(-0.3), sigmoid(0.5), sigmoid(-1.1)]
    gone = [1 - lived[0], 1 - lived[0] * lived[1], 1 - lived[0] * lived[1] * lived[2]]
    expected = [sigmoid(1.0), sigmoid(0.2), sigmoid(-2.0), 15.0, *gone]
    assert probabilities(logits_BO, FURTHER)[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert len(FURTHER.outputs) == len(expected)
    outside = torch.tensor([[0.0, 0, 0, 7.0, 0, 0, 0], [0, 0, 0, -7.0, 0, 0, 0]])
    assert probabilities(outside, FURTHER)[:, 3].tolist() == [30.0, 10.0]


def test_all_labels_count_alike_without_doubt() -> None:
    batch = replace(
        tiny.batch([1], labels=EVERY),
        finding_BF=torch.tensor([[1.0, NAN]]),
        class_B=torch.tensor([2]),
        further_BK=torch.tensor([[1.0, 20.0, 40.0, 1.0]]),
    )
    logits_BO = logits_for(batch)
    parts = {kind: logits_BO[:, columns] for kind, columns in kinds(EVERY).items()}
    expected = [
        -math.log(sigmoid(float(parts["findings"][0, 0]))),
        -float(parts["class"][0].log_softmax(0)[2]),
        float(losses.of_level(parts["ordinal"], torch.tensor([1.0]), smoothing=0).sum_B),
        (float(parts["regression"]) - 0.5) ** 2,
        -math.log(1 - sigmoid(float(parts["survival"][0, 0]))) - math.log(sigmoid(float(parts["survival"][0, 1]))),
    ]
    assert float(Objective(EVERY)(logits_BO, batch)) == pytest.approx(sum(expected) / 5, rel=1e-5)
    doubts = [0.3, -0.4, 0.0, 1.0, -1.0]
    bounded = [4 * math.tanh(doubt / 4) for doubt in doubts]
    shared = sum(math.exp(-s) * part + s for s, part in zip(bounded, expected, strict=True))
    assert Objective(EVERY)(doubted(logits_BO, doubts), batch).item() == pytest.approx(shared, rel=1e-5)


def test_the_default_objective_of_findings_and_a_class_is_study_loss() -> None:
    batch = tiny.batch([3, 2, 4])
    logits_BO = logits_for(batch, tiny.LABELS)
    ours = Objective.from_config(TrainingConfig(), tiny.LABELS)
    assert torch.equal(ours(logits_BO, batch), study_loss(logits_BO, batch))
    known_BF = ~batch.finding_BF.isnan()
    binary_BF = nn.functional.binary_cross_entropy_with_logits(
        logits_BO[:, :2], batch.finding_BF.nan_to_num(), reduction="none"
    )
    class_B = nn.functional.cross_entropy(logits_BO[:, 2:], batch.class_B, reduction="none", ignore_index=-1)
    count_B = known_BF.sum(1) + (batch.class_B >= 0)
    torch.testing.assert_close(
        ours(logits_BO, batch), ((binary_BF * known_BF).sum(1) + class_B) / count_B.clamp(min=1), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="further"):
        study_loss(logits_for(batch), tiny.batch([3, 2, 4], labels=EVERY))


def test_every_setting_reaches_the_objective() -> None:
    training = TrainingConfig(loss="focal", focal_gamma=1.5, label_smoothing=0.1, positive_weight=4.0)
    assert Objective.from_config(training, EVERY) == Objective(EVERY, "focal", 1.5, 0.1, 4.0)


# --- a study alone, labels that are missing, numbers that are large ---------------------------------------------------


@each_objective
@pytest.mark.parametrize("doubts", [None, [0.5, -0.5, 0.0, 2.0, -2.0]])
@settings(max_examples=15, deadline=None)
@given(studies=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_a_studys_loss_does_not_change_with_the_others(
    objective: Objective, doubts: list[float] | None, studies: list[int], seed: int
) -> None:
    batch = tiny.batch(studies, seed=seed, labels=EVERY)
    logits_BO = logits_for(batch, seed=seed)

    def loss(rows: list[int]) -> Tensor:
        one = replace(
            batch, finding_BF=batch.finding_BF[rows], class_B=batch.class_B[rows], further_BK=batch.further_BK[rows]
        )
        return objective(logits_BO[rows] if doubts is None else doubted(logits_BO[rows], doubts), one)

    everyone = list(range(batch.studies))
    whole = loss(everyone)
    assert whole.shape == (batch.studies,)
    assert whole.isfinite().all()
    for row in everyone:
        torch.testing.assert_close(loss([row])[0], whole[row])
    torch.testing.assert_close(loss(everyone[::-1]), whole.flip(0))


@each_objective
@pytest.mark.parametrize("kind", kinds(EVERY))
@pytest.mark.parametrize("sharing", ["equal", "uncertainty"])
def test_missing_labels_give_their_kind_neither_loss_nor_gradient(
    objective: Objective, kind: str, sharing: str
) -> None:
    batch = without(tiny.batch([3, 5, 2], labels=EVERY), kind)
    logits_BO = logits_for(batch).requires_grad_()
    model, columns, doubtful = Doubt(EVERY), kinds(EVERY)[kind], sharing == "uncertainty"
    loss_B = objective(model(logits_BO) if doubtful else logits_BO, batch)
    loss_B.sum().backward()
    assert not logits_BO.grad[:, columns].any()
    assert logits_BO.grad.any(), "the other kinds are trained"
    if doubtful:
        assert model.log_variance.weight.grad[0, list(kinds(EVERY)).index(kind)] == 0
    moved = logits_BO.detach().clone()
    moved[:, columns] += 3
    assert torch.equal(
        objective(model(moved) if doubtful else moved, batch), loss_B.detach() if not doubtful else loss_B
    )
    for other in kinds(EVERY):
        batch = without(batch, other)
    nothing = objective(model(logits_BO) if doubtful else logits_BO, batch)
    assert torch.equal(nothing, torch.zeros(10))


def test_a_time_without_an_event_is_no_label() -> None:
    for time, event in ((100.0, NAN), (NAN, 1.0)):
        part = losses.of_time(torch.ones(1, 3), torch.tensor([time]), torch.tensor([event]), (30.0, 90.0, 365.0))
        assert (float(part.sum_B), float(part.count_B)) == (0, 0)


@each_objective
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4, 1e10])
def test_loss_and_gradient_stay_finite_for_large_logits_and_doubts(objective: Objective, size: float) -> None:
    batch = tiny.batch([5, 5, 5], labels=EVERY)
    logits_BO = logits_for(batch, size=size).requires_grad_()
    model = Doubt(EVERY)
    with torch.no_grad():
        model.log_variance.weight.copy_(torch.tensor([[size, -size, size, -size, size]]))
    loss_B = objective(model(logits_BO), batch)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert logits_BO.grad.isfinite().all()
    assert model.log_variance.weight.grad.isfinite().all()


# --- head and model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_levels_never_rise_and_times_never_fall(levels: int) -> None:
    labels = Labels(
        **FURTHER.model_dump(exclude={"ordinal_levels"}), ordinal_levels=tuple(str(level) for level in range(levels))
    )
    torch.manual_seed(0)
    head = Head(5, labels)
    logits_BO = head(torch.randn(40, 5) * 10)
    assert logits_BO.shape == (40, len(labels.outputs))
    ordinal, survival = kinds(labels)["ordinal"], kinds(labels)["survival"]
    assert (logits_BO[:, ordinal].diff(dim=1) < 0).all()
    values = probabilities(torch.randn(200, len(labels.outputs)) * 30, labels)  # also of an answer that crosses
    assert (values[:, ordinal].diff(dim=1) <= 0).all()
    assert (values[:, survival].diff(dim=1) >= 0).all()
    assert ((values[:, survival] >= 0) & (values[:, survival] <= 1)).all()


def test_a_head_of_findings_and_a_class_is_one_linear_layer() -> None:
    assert [name for name, _ in Head(4, tiny.LABELS).named_parameters()] == ["output.weight", "output.bias"]


@pytest.mark.parametrize(
    "labels", [EVERY, FURTHER, Labels(value_name="v"), Labels(ordinal_name="o", ordinal_levels=("a", "b"))]
)
@pytest.mark.parametrize("sharing", ["equal", "uncertainty"])
@pytest.mark.parametrize("fusion", ["concat", "mimo", "weighted_decision"])
def test_the_model_predicts_every_kind_and_trains_every_weight_of_its_head(
    labels: Labels, sharing: str, fusion: str
) -> None:
    spec = ModelSpec(inputs=tiny.INPUTS, model=ModelConfig(width=4, fusion=fusion, task_weights=sharing), labels=labels)
    model = build_model(spec, 3)
    for studies in ([], [1], [3, 2, 4]):
        batch = tiny.batch(studies, labels=labels)
        output = model(batch.inputs, batch.seen_BM)
        assert answer(output).shape == (batch.studies, len(labels.outputs))
        assert probabilities(output, labels).shape == answer(output).shape
        loss_B = Objective(labels)(output, batch)
        assert loss_B.shape == (batch.studies,)
        assert loss_B.isfinite().all()
    loss_B.sum().backward()
    heads = [dict(head.named_parameters()) for head in (model.head, *model.further)]
    for name in heads[0]:  # the base rate of a decision fusion has no input: its bias alone is trained
        assert any(head[name].grad is not None and head[name].grad.any() for head in heads), name
    assert (model.doubt is not None) == (sharing == "uncertainty")
    assert model.doubt is None or model.doubt.log_variance.weight.grad.all()


def test_a_saved_model_of_every_kind_says_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = ModelSpec(inputs=tiny.INPUTS, model=ModelConfig(width=4, task_weights="uncertainty"), labels=EVERY)
    model, batch = build_model(spec, 4), tiny.batch([2, 1], labels=EVERY)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    said = [probabilities(m.eval()(batch.inputs, batch.seen_BM), EVERY) for m in (model, again)]
    assert torch.equal(*said)


def test_training_learns_each_kind() -> None:
    """A head on inputs that tell everything: each kind's own loss falls far below that of a constant answer."""
    generator = torch.Generator().manual_seed(0)
    z_BD = torch.randn(400, 3, generator=generator)
    batch = replace(
        tiny.batch([1] * 400, labels=EVERY),
        finding_BF=(z_BD[:, :2] > 0).float(),
        class_B=(z_BD[:, 0] > -0.5).long() + (z_BD[:, 0] > 0.5).long(),
        further_BK=torch.stack(
            [
                torch.bucketize(z_BD[:, 1].contiguous(), torch.tensor([-0.7, 0.0, 0.7])).float(),
                20 + 5 * z_BD[:, 2].clamp(-2, 2),
                100 * (2 * z_BD[:, 0]).exp(),
                (z_BD[:, 1] < 1).float(),
            ],
            dim=1,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    head, doubt, objective = Head(3, EVERY), Doubt(EVERY), Objective(EVERY)
    optimizer = torch.optim.Adam([*head.parameters(), *doubt.parameters()], lr=0.05)

    def by_kind(logits_BO: Tensor) -> dict[str, float]:
        parts = {kind: objective._part(kind, logits_BO[:, columns], batch) for kind, columns in kinds(EVERY).items()}
        return {kind: float(part.sum_B.sum() / part.count_B.sum()) for kind, part in parts.items()}

    for _ in range(300):
        optimizer.zero_grad()
        objective(doubt(head(z_BD)), batch).mean().backward()
        optimizer.step()
    learnt = by_kind(head(z_BD).detach())
    constant = {"findings": math.log(2), "class": math.log(3), "ordinal": 0.5, "regression": 0.06, "survival": 0.9}
    assert all(learnt[kind] < 0.6 * constant[kind] for kind in constant), learnt
