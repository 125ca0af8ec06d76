"""Fusions over time: what a study may look at, that no other patient comes in, and the tasks that show their use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.app import prepare
from fedmm.config import RunConfig
from fedmm.errors import ConfigError, PlanInvalid
from fedmm.models.encoder import encoders
from fedmm.models.fusion import Concat
from fedmm.models.fusion_time import Aligned, OverStudies, history
from fedmm.models.multimodal import ModelSpec, build_model, check_leaves
from fedmm.models.sequence import Sequence, SequenceEncoder, relative_time
from fedmm.privacy.engine import CLIPPING
from fedmm.privacy.plan import PrivacyPlan
from fedmm.schema import Timeline
from fedmm.training.loop import Workbench, check_unit, train
from server.app import coordinate
from tests import tiny
from tests.fixed_noise import FixedNoise
from tests.privacy.measure import LIMIT, clipped_sum, engine_for, hospital, plan, sensitivity

NAN = math.nan
WIDTH = 8
both = pytest.mark.parametrize("clipping", CLIPPING)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timeline(*studies: tuple[int, float]) -> Timeline:
    return Timeline(torch.tensor([p for p, _ in studies]), torch.tensor([day for _, day in studies]))


def over_studies() -> OverStudies:
    torch.manual_seed(4)
    return OverStudies(WIDTH)


# --- several studies of a patient ---------------------------------------------------------------------------------------


def test_a_study_asks_its_own_patients_studies_of_the_same_or_an_earlier_day() -> None:
    visits = timeline((0, 5.0), (1, 1.0), (0, 5.0), (0, 90.0), (1, NAN), (0, NAN), (1, 0.0))
    row_BS, asked_BS, apart_BS = history(visits)
    asked = [set(row[here].tolist()) for row, here in zip(row_BS, asked_BS, strict=True)]
    assert asked == [{0, 2}, {1, 6}, {0, 2}, {0, 2, 3}, {4}, {5}, {6}]
    patient_BS = visits.patient_B[row_BS]
    assert torch.equal(patient_BS, visits.patient_B.unsqueeze(1).expand_as(patient_BS)), "another patient's row is read"
    months = dict(zip(row_BS[3].tolist(), apart_BS[3].expm1().tolist(), strict=True))
    assert months == pytest.approx({0: 85 / 30, 2: 85 / 30, 3: 0, 5: 0}, rel=1e-5)


def test_each_study_stands_alone_without_a_timeline_without_days_and_in_a_batch_of_its_own() -> None:
    fusion, z_BMD, seen_BM = over_studies(), torch.randn(3, 3, WIDTH), torch.ones(3, 3, dtype=torch.bool)
    alone = torch.cat([fusion(z_BMD[i : i + 1], seen_BM[:1]) for i in range(3)])
    torch.testing.assert_close(fusion(z_BMD, seen_BM), alone)
    torch.testing.assert_close(fusion(z_BMD, seen_BM, timeline((0, NAN), (0, NAN), (0, NAN))), alone)
    joined = fusion(z_BMD, seen_BM, timeline((0, 0.0), (0, 1.0), (0, 2.0)))
    torch.testing.assert_close(joined[0], alone[0])
    assert not torch.allclose(joined[1], alone[1])


def test_what_comes_later_changes_nothing() -> None:
    fusion, z_BMD, seen_BM = over_studies(), torch.randn(3, 3, WIDTH), torch.ones(3, 3, dtype=torch.bool)
    visits = timeline((0, 0.0), (0, 10.0), (0, 20.0))
    before = fusion(z_BMD, seen_BM, visits)
    z_BMD[2] = 100.0
    after = fusion(z_BMD, seen_BM, visits)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_how_long_ago_it_was_makes_a_difference() -> None:
    fusion, z_BMD, seen_BM = over_studies(), torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.bool)
    week, year = (fusion(z_BMD, seen_BM, timeline((0, 0.0), (0, days)))[1] for days in (7.0, 365.0))
    assert not torch.allclose(week, year, atol=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e38])
def test_a_patient_whose_numbers_are_broken_reaches_nobody_else_forwards_or_backwards(broken: float) -> None:
    fusion, seen_BM = over_studies(), torch.ones(4, 3, dtype=torch.bool)
    visits = timeline((0, 0.0), (1, 1.0), (1, 2.0), (0, 3.0))
    results = []
    for value in (0.0, broken):
        z_BMD = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))
        z_BMD[visits.patient_B == 0] = value
        z_BMD.requires_grad_()
        out = fusion(z_BMD, seen_BM, visits)
        (gradient,) = torch.autograd.grad(out.square().sum(), z_BMD)
        results.append(torch.stack([out[1], out[2], *gradient[1:3].sum(1)]))
    assert torch.equal(*results)


@both
@pytest.mark.parametrize("fusion", ["timeline", "aligned"])
def test_a_patient_moves_the_sum_by_at_most_the_clipping_norm_however_many_studies(fusion: str, clipping: str) -> None:
    engine = engine_for(tiny.spec(fusion), clipping=clipping)
    whole = tiny.batch((1, 12, 2, 5), seed=3)
    assert 1 - 1e-4 < max(sensitivity(engine, hospital(whole).cohort("all"), limit=8)) <= LIMIT


@both
def test_a_patient_with_nan_in_a_record_adds_nothing_and_moves_nobody(clipping: str) -> None:
    engine = engine_for(tiny.spec("timeline"), clipping=clipping)
    whole = tiny.batch((2, 3, 2), seed=6)
    whole.seen_BM[0] = True
    whole.inputs["image"][0] = math.nan
    others = clipped_sum(engine, tiny.pick(whole, [1, 2]))
    assert float(others.norm()) > 0
    torch.testing.assert_close(clipped_sum(engine, whole), others, rtol=1e-4, atol=1e-7)


def test_if_studies_were_units_one_of_them_would_move_more_than_the_clipping_norm() -> None:
    """Why record-level runs are refused: grouped by record, a study also changes what the others contribute."""
    engine = engine_for(tiny.spec("timeline"), clipping="ghost")
    whole = replace(tiny.batch([6], seed=2), day_B=torch.arange(6.0))
    as_records = replace(whole, patient_B=torch.arange(6), patients=6)
    given = whole.timeline

    class Unguarded(nn.Module):
        """Looks at the patient's studies although each is clipped alone."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.rows = torch.arange(6)

        def forward(self, inputs: dict[str, Tensor], seen_BM: Tensor, timeline: Timeline) -> object:
            return self.model(inputs, seen_BM, Timeline(given.patient_B[self.rows], given.day_B[self.rows]))

    guard = Unguarded(engine.clipper.model._module)  # type: ignore[attr-defined]
    engine.clipper.model._module = guard  # type: ignore[attr-defined]
    everything = clipped_sum(engine, as_records)
    moved = []
    for gone in range(6):
        guard.rows = torch.tensor([row for row in range(6) if row != gone])
        rest = tiny.pick(as_records, guard.rows.tolist())
        moved.append(float((everything - clipped_sum(engine, rest)).norm()) / engine.max_grad_norm)
        guard.rows = torch.arange(6)
    assert max(moved) > 1.02  # measured 1.056


def test_record_level_runs_are_refused_before_a_step() -> None:
    bench = Workbench(tiny.spec("timeline"), torch.device("cpu"))
    before = bench.weights()
    record: PrivacyPlan = plan(unit="record")
    config = RunConfig().training
    with pytest.raises(PlanInvalid, match=r"timeline does not go with privacy\.unit = record"):
        train(bench, hospital(tiny.batch([2, 1])).cohort("all"), record, config=config, noise=FixedNoise(0))
    assert all(torch.equal(before[name], value) for name, value in bench.weights().items())
    check_unit(tiny.spec("timeline").model, "patient")
    check_unit(tiny.spec("concat").model, "record")


def test_coordinator_and_hospital_refuse_such_a_run_before_they_look_at_anything() -> None:
    config = RunConfig().replace(**{"model.fusion": "timeline", "privacy.unit": "record"})
    nothing: Any = None
    with pytest.raises(PlanInvalid, match="does not go with"):
        coordinate(nothing, config)
    with pytest.raises(PlanInvalid, match="does not go with"):
        prepare(nothing, tiny.spec("timeline"), config, private=True)


@pytest.mark.parametrize("fusion", ["timeline", "concat"])
def test_a_change_between_two_studies_is_learnt_from_the_timeline_alone(fusion: str) -> None:
    """The label of the second study: is the hidden value higher than in the first? Every level is as often up as down."""
    chance = torch.Generator().manual_seed(0)
    level_P2 = torch.randn(300, 1, generator=chance) + torch.randn(300, 2, generator=chance)
    z_BMD = 0.1 * torch.randn(600, 3, WIDTH, generator=chance)
    z_BMD[:, :, 0] += level_P2.reshape(-1, 1)
    seen_BM = torch.ones(600, 3, dtype=torch.bool)
    visits = Timeline(torch.arange(300).repeat_interleave(2), torch.tensor([0.0, 60.0]).repeat(300))
    rose_P = level_P2[:, 1] > level_P2[:, 0]
    torch.manual_seed(3)
    join: nn.Module = over_studies() if fusion == "timeline" else Concat(WIDTH)
    head = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.Adam([*join.parameters(), *head.parameters()], lr=0.01)

    def answers() -> Tensor:
        z_BD = join(z_BMD, seen_BM, visits) if fusion == "timeline" else join(z_BMD, seen_BM)
        out: Tensor = head(z_BD)[1::2, 0]
        return out

    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(answers()[:200], rose_P[:200].float()).backward()
        optimizer.step()
    found = float(((answers()[200:] > 0) == rose_P[200:]).float().mean())
    assert found > 0.9 if fusion == "timeline" else found < 0.8  # the second level alone tells about 70 %


# --- words and sounds ---------------------------------------------------------------------------------------------------

STEPPED = [
    (modality, name)
    for modality, registry in encoders.items()
    for name in registry.names()
    if issubclass(registry.get(name), SequenceEncoder)
]


def test_recurrent_and_transformer_encoders_give_sequences() -> None:
    expected = {("report", "lstm"), ("report", "gru"), ("report", "transformer"), ("audio", "recurrent")}
    assert expected | {("audio", "transformer")} <= set(STEPPED)


@pytest.mark.parametrize(("modality", "name"), STEPPED)
@pytest.mark.parametrize("tokens", [8, 150])
def test_the_mean_of_the_sequence_is_what_the_encoder_gives(modality: str, name: str, tokens: int) -> None:
    inputs = tiny.INPUTS.model_copy(update={"report_tokens": tokens, "audio_seconds": tokens / 50})
    torch.manual_seed(0)
    encoder = encoders[modality].get(name)(inputs, WIDTH)
    assert isinstance(encoder, SequenceEncoder)
    value = tiny.batch([4], inputs=inputs).inputs[modality]
    value[0, ..., 5:] = 0 if modality == "report" else -2.0  # a short one
    made = encoder.sequence(value)
    torch.testing.assert_close(made.mean(), encoder(value), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.share_BL.sum(1), torch.ones(4))
    assert ((made.time_BL >= 0) & (made.time_BL <= 1)).all()
    assert (made.time_BL.diff(dim=1) >= 0).all()
    coarse = made.coarse(3)
    assert coarse.z_BLD.shape[1] <= 3
    torch.testing.assert_close(coarse.mean(), made.mean(), rtol=1e-4, atol=1e-5)


def test_time_runs_from_the_beginning_to_the_last_step_that_holds_something() -> None:
    mask_BL = torch.tensor([[True, True, False, True], [True, True, False, False], [False] * 4])
    expected = torch.tensor([[0.125, 0.375, 0.625, 0.875], [0.25, 0.75, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(relative_time(mask_BL), expected)


def test_neighbours_are_averaged_with_their_times_and_padding_counts_for_nothing() -> None:
    share_BL = torch.tensor([[0.25, 0.25, 0.5, 0.0]])
    z_BLD = torch.tensor([[[1.0], [3.0], [5.0], [99.0]]])
    made = Sequence(z_BLD, share_BL, torch.tensor([[0.1, 0.3, 0.6, 0.9]])).coarse(2)
    torch.testing.assert_close(made.z_BLD, torch.tensor([[[2.0], [5.0]]]))
    torch.testing.assert_close(made.time_BL, torch.tensor([[0.2, 0.6]]))
    torch.testing.assert_close(made.share_BL, torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(("report", "audio", "named"), [("ngrams", "recurrent", "gru"), ("gru", "cnn", "recurrent")])
def test_alignment_refuses_an_encoder_without_steps_and_names_those_that_have_some(
    report: str, audio: str, named: str
) -> None:
    model = tiny.leaves(fusion="aligned", report=report, audio=audio)
    with pytest.raises(ConfigError, match="cannot use") as refused:
        check_leaves(model)
    assert named in refused.value.fix
    with pytest.raises(ConfigError):
        build_model(ModelSpec(inputs=tiny.INPUTS, model=model, labels=tiny.LABELS))


def test_an_encoder_runs_once_in_a_pass() -> None:
    model, calls = build_model(tiny.spec("aligned")), []
    for name in ("report", "audio"):
        model.encoders[name].project.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    batch = tiny.batch([3])
    model(batch.inputs, batch.seen_BM)
    assert len(calls) == 2


def test_an_absent_sequence_is_asked_by_nobody_and_adds_nothing() -> None:
    torch.manual_seed(1)
    fusion = Aligned(WIDTH)
    words, sounds = made_up_steps(torch.randn(2, 4, WIDTH)), made_up_steps(torch.randn(2, 3, WIDTH))
    absent = sounds.where(torch.tensor([True, False]))
    heard_B2D, other_B2D = (
        fusion.listen([words, absent._replace(z_BLD=absent.z_BLD + shift)])
        for shift in (0.0, torch.tensor([[[0.0]], [[9.0]]]))
    )
    assert torch.equal(heard_B2D, other_B2D)
    assert not heard_B2D[1, 1].any()
    assert heard_B2D[1, 0].any()
    nothing = words.where(torch.zeros(2, dtype=torch.bool))
    assert not fusion.listen([nothing, nothing]).any()


def made_up_steps(z_BLD: Tensor) -> Sequence:
    studies, steps, _ = z_BLD.shape
    share_BL = torch.full((studies, steps), 1 / steps)
    return Sequence(z_BLD, share_BL, relative_time(share_BL > 0))


@pytest.mark.parametrize("fusion", ["aligned", "concat"])
def test_whether_a_word_coincides_with_its_sound_is_learnt_by_alignment_alone(fusion: str) -> None:
    """Two words and two sounds, each early or late. The means are the same for both answers: only the times tell."""
    chance = torch.Generator().manual_seed(0)
    order_BM = torch.randint(0, 2, (300, 2), generator=chance)
    together_B = order_BM[:, 0] == order_BM[:, 1]
    sequences = {}
    for m, name in enumerate(("report", "audio")):
        z_BLD = 0.1 * torch.randn(300, 8, WIDTH, generator=chance)
        for kind in range(2):  # kind 0 stands early where the order is 0, else late
            early_B = order_BM[:, m] == kind
            z_BLD[torch.arange(300), torch.where(early_B, 1, 6), kind] += 2.0
        sequences[name] = made_up_steps(z_BLD)
    z_BMD = torch.stack([torch.zeros(300, WIDTH), sequences["report"].mean(), sequences["audio"].mean()], dim=1)
    seen_BM = torch.tensor([[False, True, True]]).repeat(300, 1)
    torch.manual_seed(3)
    join: nn.Module = Aligned(WIDTH) if fusion == "aligned" else Concat(WIDTH)
    head = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.Adam([*join.parameters(), *head.parameters()], lr=0.01)

    def answers() -> Tensor:
        out: Tensor = head(join(z_BMD, seen_BM, sequences) if fusion == "aligned" else join(z_BMD, seen_BM))[:, 0]
        return out

    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(answers()[:200], together_B[:200].float()).backward()
        optimizer.step()
    found = float(((answers()[200:] > 0) == together_B[200:]).float().mean())
    assert found > 0.9 if fusion == "aligned" else found < 0.7
