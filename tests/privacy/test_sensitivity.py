"""Noise off: one patient more or less moves the clipped sum by at most C. Comes first for every model, loss and mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmm.config import RunConfig
from fedmm.data.dataset import load_hospital
from fedmm.data.synthetic import synthesize
from fedmm.errors import PlanInvalid
from fedmm.models.fusion import fusions
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.privacy import parts
from fedmm.privacy.clip import RULES
from fedmm.privacy.engine import CLIPPING, PrivateEngine
from fedmm.schema import Batch
from tests import tiny
from tests.privacy.measure import (
    FORMS,
    LIMIT,
    TASKS,
    UP_TO_12,
    C,
    clipped_sum,
    engine_for,
    engine_on,
    force,
    hospital,
    sensitivity,
)

both_ways = pytest.mark.parametrize("clipping", CLIPPING)
every_rule = pytest.mark.parametrize(
    ("rule", "groups"), [(rule, groups) for rule in RULES for groups in ("all", "modality")]
)


def fusions_and_tasks() -> Iterator[object]:
    """Every fusion with all kinds of labels together, as it is clipped by default; the first two with each kind alone and both
    ways; the others when there is time."""
    for clipping, fusion, task in itertools.product(CLIPPING, fusions.names(), TASKS):
        by_default = fusion in ("concat", "weighted") or (task == "multi-task" and clipping == "ghost")
        yield pytest.param(clipping, fusion, task, marks=[] if by_default else pytest.mark.slow)


@pytest.mark.parametrize(("clipping", "fusion", "task"), list(fusions_and_tasks()))
def test_one_patient_of_1_to_12_studies_moves_the_sum_by_at_most_c(clipping: str, fusion: str, task: str) -> None:
    labels = TASKS[task]
    patients = hospital(tiny.batch(UP_TO_12, labels=labels), labels).cohort("all")
    moved = sensitivity(engine_for(tiny.spec(fusion, labels), clipping=clipping), patients, limit=20)
    assert max(moved) <= LIMIT
    assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"
    few = hospital(tiny.batch((1, 5, 12, 2), labels=labels), labels).cohort("all")
    loose = sensitivity(engine_for(tiny.spec(fusion, labels), clipping=clipping, max_grad_norm=1e3), few)
    assert 0 < max(loose) < 0.5, "somebody was clipped, who should not have been"


@both_ways
@every_rule
def test_every_rule_and_grouping_keeps_the_bound_whole_and_in_each_share(clipping: str, rule: str, groups: str) -> None:
    patients = tiny.batch(UP_TO_12)
    engine = engine_for(tiny.spec(), clipping=clipping, rule=rule, groups=groups)
    moved = sensitivity(engine, patients, limit=20)
    assert (
        0.99 <= max(moved) <= LIMIT
    )  # C is small: nearly everybody is clipped in every share, or brought to C by auto
    clip, params = engine.clipper.clip, engine.optimizer.params  # type: ignore[attr-defined]
    assert clip.shares == (4 if groups == "modality" else 1)
    share_W = torch.cat([torch.full((p.numel(),), clip.share_of(p)) for p in params])
    for patient in range(patients.patients):
        alone = clipped_sum(engine, tiny.pick(patients, [patient])) / C
        parts = [float(alone[share_W == share].norm()) for share in range(clip.shares)]
        assert max(parts) <= LIMIT / clip.shares**0.5


@both_ways
def test_what_a_hospital_does_not_train_takes_no_share_of_the_bound(clipping: str) -> None:
    model = build_model(tiny.spec(), 3)
    for name, weight in model.named_parameters():
        weight.requires_grad = not name.startswith(("encoders.audio.", "norms.audio."))
    engine = engine_on(model, clipping=clipping, groups="modality")
    assert engine.clipper.clip.shares == 3  # type: ignore[attr-defined]
    assert 0.99 <= max(sensitivity(engine, tiny.batch(UP_TO_12), limit=20)) <= LIMIT


@both_ways
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-30, 0.0])
def test_a_small_gradient_is_made_at_most_a_hundred_times_longer(clipping: str, size: float) -> None:
    def small(logits_BO: Tensor, batch: Batch) -> Tensor:
        return study_loss(logits_BO, batch) * size

    flat, auto = (engine_for(tiny.spec(), max_grad_norm=1.0, clipping=clipping, rule=rule) for rule in RULES)
    before, after = (max(sensitivity(engine, tiny.batch((1, 5, 2)), loss=small)) for engine in (flat, auto))
    assert after <= min(LIMIT, 100 * before * LIMIT)
    assert after >= 99 * before * (size < 1e-6)


@both_ways
@pytest.mark.parametrize(("rule", "groups"), [("flat", "all"), ("auto", "modality")])
def test_the_shipped_model_loader_and_loss_have_sensitivity_1_c(
    tmp_path: Path, clipping: str, rule: str, groups: str
) -> None:
    config = RunConfig()
    (folder,) = synthesize(tmp_path, count=1, patients=16, seed=5, missing=0.5)
    data = load_hospital(folder, config.data.inputs)
    cohort = data.cohort("all")
    (whole,) = cohort.physical(range(cohort.patients), limit=10_000)
    assert set(torch.bincount(whole.patient_B).tolist()) >= {1, 5}
    assert not whole.seen_BM.all(0).any(), "every modality is missing somewhere"
    spec = ModelSpec(inputs=config.data.inputs, model=config.model, labels=data.labels)
    engine = engine_for(spec, clipping=clipping, rule=rule, groups=groups)
    moved = sensitivity(engine, cohort, limit=7, cap=config.training.max_studies)
    assert max(moved) <= LIMIT
    assert max(moved) >= (1 - 1e-4 if rule == "flat" else 0.99)


@lru_cache
def prepared(clipping: str, fusion: str, task: str, rule: str, groups: str) -> PrivateEngine:
    return engine_for(tiny.spec(fusion, TASKS[task]), clipping=clipping, rule=rule, groups=groups)


def any_hospital(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        drawn = given(
            studies=st.lists(st.integers(1, 12), min_size=1, max_size=5),
            fusion=st.sampled_from(fusions.names()),
            task=st.sampled_from(sorted(TASKS)),
            rule=st.sampled_from(RULES),
            groups=st.sampled_from(["all", "modality"]),
            seen=st.sampled_from(["some", "none", "all", "image", "report", "audio"]),
            size=st.floats(-6, 6),
            cap=st.none() | st.integers(1, 12),
            limit=st.integers(1, 30),
            seed=st.integers(0, 10**6),
        )
        return settings(max_examples=examples, deadline=None)(drawn(test))

    return decorate


def check_any_hospital(
    studies: list[int],
    fusion: str,
    task: str,
    rule: str,
    groups: str,
    seen: str,
    size: float,
    cap: int | None,
    limit: int,
    seed: int,
) -> None:
    """Both ways, for any C: the bound holds, and ghost's sum is that of the hooks."""
    whole = tiny.batch(studies, seed=seed, labels=TASKS[task])
    if seen != "some":
        whole.seen_BM[:] = torch.tensor([seen in ("all", name) for name in ("image", "report", "audio")])
    cohort = hospital(whole, TASKS[task]).cohort("all")
    sums = {}
    for clipping in CLIPPING:
        engine = prepared(clipping, fusion, task, rule, groups)
        engine.max_grad_norm = engine.optimizer.max_grad_norm = bound = 10**size
        assert max(sensitivity(engine, cohort, limit=limit, cap=cap)) <= LIMIT
        rng = np.random.default_rng(seed)
        batches = cohort.physical(range(cohort.patients), limit=limit, max_studies=cap, rng=rng)
        sums[clipping] = clipped_sum(engine, *batches)
    assert float((sums["hooks"] - sums["ghost"]).norm()) <= 1e-4 * bound * len(studies)


@any_hospital(20)
def test_any_hospital_keeps_the_bound_and_both_ways_agree(**drawn: object) -> None:
    check_any_hospital(**drawn)  # type: ignore[arg-type]


@pytest.mark.slow
@any_hospital(1000)
def test_a_thousand_hospitals_keep_the_bound_and_both_ways_agree(**drawn: object) -> None:
    check_any_hospital(**drawn)  # type: ignore[arg-type]


@both_ways
def test_physical_batches_do_not_change_the_sum(clipping: str) -> None:
    engine, whole = engine_for(tiny.spec(), clipping=clipping), tiny.batch((1, 5, 2, 3, 4, 1, 12))
    parts = [tiny.pick(whole, [0, 1]), tiny.pick(whole, []), tiny.pick(whole, [2]), tiny.pick(whole, [3, 4, 5, 6])]
    torch.testing.assert_close(clipped_sum(engine, *parts), clipped_sum(engine, whole), rtol=1e-5, atol=1e-8)


@both_ways
@every_rule
def test_the_sum_equals_gradients_taken_patient_by_patient_without_opacus(
    clipping: str, rule: str, groups: str
) -> None:
    whole, spec = tiny.batch(UP_TO_12), tiny.spec()
    ours = clipped_sum(engine_for(spec, max_grad_norm=1.0, clipping=clipping, rule=rule, groups=groups), whole)
    model = build_model(spec, 3).double()
    names = [name.split(".")[1] if name.startswith(("enc", "norms")) else "" for name, _ in model.named_parameters()]
    shares = [[i for i, n in enumerate(names) if n == own] for own in set(names)]
    shares, bound = (shares, 0.5) if groups == "modality" else ([list(range(len(names)))], 1.0)
    expected = torch.zeros_like(ours)
    clipped = 0
    for i in range(whole.patients):
        one = tiny.pick(whole, [i])
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in one.inputs.items()}
        target = Batch(**{**vars(one), "finding_BF": one.finding_BF.double()})
        loss = study_loss(model(inputs, one.seen_BM), target).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        done = list(grads)
        for share in shares:
            norm = float(torch.cat([grads[k].flatten() for k in share]).norm())
            factor = bound / (norm + 0.01 * bound) if rule == "auto" else min(1.0, bound / max(norm, 1e-12))
            for k in share:
                done[k] = grads[k] * factor
        expected += torch.cat([g.flatten() for g in done])
        clipped += float(torch.cat([g.flatten() for g in grads]).norm()) > 1
    assert 0 < clipped < whole.patients
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("clipping", "form"), [("hooks", "as chosen"), ("ghost", "as chosen"), ("ghost", "dots")])
@pytest.mark.parametrize(("rule", "groups"), [("flat", "all"), ("auto", "modality")])
@pytest.mark.parametrize("bound", [1e-6, 0.4])
@pytest.mark.parametrize("size", [1e17, 1e20, 1e25, 1e29, 1e37])
def test_crafted_weights_do_not_stretch_the_sensitivity(
    monkeypatch: pytest.MonkeyPatch, form: str, bound: float, size: float, clipping: str, rule: str, groups: str
) -> None:
    """A coordinator's weights made the clip factor a denormal, which was rounded up: 1.98 C."""
    force(monkeypatch, form)
    engine = engine_for(tiny.spec(), max_grad_norm=bound, clipping=clipping, rule=rule, groups=groups)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
        dict(engine.model.named_parameters())["_module.fusion.join.bias"].fill_(size)
        dict(engine.model.named_parameters())["_module.head.output.weight"].fill_(1 / size)
    assert max(sensitivity(engine, tiny.batch((1, 5, 2, 3, 4, 1, 12)))) <= LIMIT


@pytest.mark.parametrize(
    ("clipping", "form"), [("hooks", "as chosen"), ("ghost", "as chosen"), ("ghost", "dots"), ("ghost", "held twice")]
)
@pytest.mark.parametrize(("rule", "groups"), [("flat", "all"), ("auto", "modality")])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_studies_that_cancel_each_other_do_not_hide_a_gradient(
    monkeypatch: pytest.MonkeyPatch, form: str, clipping: str, size: float, rule: str, groups: str
) -> None:
    """Same inputs, opposite labels, large weights: the patient's norm is a small difference of large numbers."""
    force(monkeypatch, form)
    one = tiny.batch((1,), labels=TASKS["binary"])
    one.seen_BM[:] = True
    whole = tiny.pick(tiny.batch((6, 6, 6), labels=TASKS["binary"]), [0, 1, 2])
    for name, value in whole.inputs.items():
        value[:12] = one.inputs[name]
    whole.seen_BM[:] = True
    whole.finding_BF[:, 0] = torch.tensor([0.0, 1.0] * 9)
    engine = engine_for(tiny.spec(labels=TASKS["binary"]), clipping=clipping, rule=rule, groups=groups)
    with torch.no_grad():
        dict(engine.model.named_parameters())["_module.head.output.weight"].zero_()
        dict(engine.model.named_parameters())["_module.fusion.join.weight"].mul_(size)
    moved = sensitivity(engine, hospital(whole, TASKS["binary"]).cohort("all"))
    assert max(moved) <= LIMIT
    assert moved[2] > (0.99 if groups == "all" else 0.49), "the third does not cancel; it moves the head's share alone"


# --- one record as unit -------------------------------------------------------------------------------------------------


@both_ways
def test_of_unit_record_a_record_moves_the_sum_by_c_and_a_patient_by_as_many_as_the_cap(clipping: str) -> None:
    """What plan.round_event charges to a patient: max_studies shifts of C, and no more."""
    labels = TASKS["class"]
    whole = tiny.batch((1, 5, 12), labels=labels)
    cohort = hospital(whole, labels).cohort("all").records(4, np.random.default_rng(1))
    assert cohort.patients == 9
    engine = engine_for(tiny.spec(labels=labels), clipping=clipping)
    assert max(sensitivity(engine, cohort)) == pytest.approx(1, abs=1e-4)
    total = clipped_sum(engine, cohort.batch(range(9)))
    for own in (range(1), range(1, 5), range(5, 9)):
        rest = clipped_sum(engine, cohort.batch([i for i in range(9) if i not in own]))
        assert float((total - rest).norm()) <= 4 * C * LIMIT


# --- layers that the shipped models do not have yet ---------------------------------------------------------------------


class Sequences(nn.Module):
    """Tokens, attention from linear layers, norms over positions, a convolution over time: (B, T) to (B, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, width)
        self.mix = nn.ModuleList(nn.Linear(width, width, bias=i > 0) for i in range(3))
        self.norm = nn.LayerNorm(width)
        self.root = nn.RMSNorm(width)
        self.over_time = nn.Conv1d(width, 4, 3)
        self.output = nn.Linear(4, 2)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        z_BTD = self.norm(self.tokens(inputs["report"]))
        query, key, value = (layer(z_BTD) for layer in self.mix)
        z_BTD = self.root(nn.functional.scaled_dot_product_attention(query, key, value))
        out: Tensor = self.output(self.over_time(z_BTD.transpose(1, 2)).mean(-1))
        return out


def squares(logits_BO: Tensor, batch: Batch) -> Tensor:
    return (logits_BO - 1).square().sum(1)


@both_ways
@pytest.mark.parametrize("width", [4, 32])  # with 8 positions: gradient first, and dot products first
@pytest.mark.parametrize("held", [100, 2**23])
def test_layers_over_sequences_keep_the_bound_and_both_ways_agree(
    monkeypatch: pytest.MonkeyPatch, width: int, held: int, clipping: str
) -> None:
    monkeypatch.setattr(parts, "HELD", held)
    whole = tiny.batch((1, 5, 2, 7))
    torch.manual_seed(1)
    model = Sequences(width)
    engine = engine_on(model, max_grad_norm=0.5, clipping=clipping)
    assert max(sensitivity(engine, whole, loss=squares)) == pytest.approx(1, abs=1e-4)
    torch.manual_seed(1)
    other = engine_on(Sequences(width), max_grad_norm=0.5, clipping="hooks" if clipping == "ghost" else "ghost")
    there, here = (clipped_sum(e, whole, loss=squares) for e in (other, engine))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_of_book_keeping_has_sensitivity_1_c(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Models of a test are small, and small layers take one form: here they take the forms of wide ones."""
    force(monkeypatch, form)
    for fusion in ("concat", "cross_attention"):
        moved = sensitivity(engine_for(tiny.spec(fusion), clipping="ghost"), tiny.batch(UP_TO_12), limit=20)
        assert 1 - 1e-4 <= max(moved) <= LIMIT
    torch.manual_seed(1)
    engine = engine_on(Sequences(32), max_grad_norm=0.5, clipping="ghost")
    assert max(sensitivity(engine, tiny.batch((1, 5, 2, 7)), loss=squares)) == pytest.approx(1, abs=1e-4)


def test_no_gradient_of_a_study_is_in_memory_under_ghost_clipping() -> None:
    """The widest tensor that ghost clipping of a wide head makes is far below studies x weights."""
    model = Head(2000, 500)
    engine = engine_on(model, clipping="ghost")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    batch = tiny.batch((2,) * 8)
    batch.inputs["image"] = torch.randn(16, 2000)  # type: ignore[index]
    with Watch():
        engine.accumulate(batch, squares)
    assert largest <= 2000 * 500


class Head(nn.Module):
    """A wide linear head over cached features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(inputs, outputs)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        out: Tensor = self.output(inputs["image"])
        return out


class Twice(Head):
    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        return super().forward(inputs, seen_BM) + super().forward(inputs, seen_BM)


class InPlace(Head):
    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        return super().forward(inputs, seen_BM).mul_(2)


@pytest.mark.parametrize("kind", [Twice, InPlace])
def test_what_ghost_clipping_cannot_bound_is_refused(kind: type[Head]) -> None:
    batch = tiny.batch((2, 1))
    batch.inputs["image"] = torch.randn(3, 5)  # type: ignore[index]
    with pytest.raises(PlanInvalid, match=r"used twice|changed in place"):
        engine_on(kind(5, 2), clipping="ghost").accumulate(batch, squares)
