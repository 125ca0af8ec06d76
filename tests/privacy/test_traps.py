"""One test for each row of the table of traps in ../shared/privacy.md: our door refuses, or our code cannot fall in."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from fedmm.config import ModelConfig, TrainingConfig
from fedmm.errors import BudgetExhausted, PlanInvalid
from fedmm.federation.messages import FitReply, Hello
from fedmm.models.heads import study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model
from fedmm.privacy.accounting import epsilon_pld
from fedmm.privacy.clip import clip_factors
from fedmm.privacy.crosscheck import prv_epsilon
from fedmm.privacy.engine import CLIPPING, HookedModel, PrivateEngine, quiet_hooks, wrap
from fedmm.privacy.ghost import parts_of
from fedmm.privacy.ledger import Ledger
from fedmm.privacy.noise import SystemNoise
from fedmm.privacy.parts import DotPart, Groups
from fedmm.privacy.plan import Event, PrivacyPlan, Rate
from fedmm.privacy.rehearsal import rehearse
from fedmm.schema import Batch, InputSpec
from fedmm.training.loop import Nobody, Workbench, train
from tests import tiny
from tests.pretrained_folders import folder_spec
from tests.privacy.ledger_worker import site
from tests.privacy.measure import (
    LIMIT,
    C,
    clipped_sum,
    engine_for,
    engine_on,
    hospital,
    ledger_gap,
    plan,
    sensitivity,
)
from tests.privacy.test_sensitivity import Head, Sequences, squares

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT.parent / "shared" / "privacy.md"
SOURCES = sorted(path for room in ("fedmm", "client", "server") for path in (ROOT / room).rglob("*.py"))
STUDIES = (1, 5, 2, 3, 1)
both_ways = pytest.mark.parametrize("clipping", CLIPPING)


# --- helpers --------------------------------------------------------------------------------------------------------------


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(ROOT)), node


def spoken() -> dict[str, set[str]]:
    """By file, every name, attribute, module and imported name in its code; not what stands in comments and strings."""
    found: dict[str, set[str]] = {}
    for file, node in nodes():
        words = found.setdefault(file, set())
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.update((node.attr, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            words.update(f"{node.module}.{alias.name}" for alias in node.names)
            words.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            words.update(alias.name.split(".")[0] for alias in node.names)
    return found


def nobody_says(*words: str) -> None:
    for file, said in spoken().items():
        assert not said & set(words), f"{file} uses {said & set(words)}"


def two_batches(studies: tuple[int, ...] = (1, 2, 1)) -> tuple[Batch, Batch]:
    return tiny.batch(studies, seed=1), tiny.batch(studies, seed=2)


def refused_in_rehearsal(loss: Callable[[Tensor, Batch], Tensor], *, match: str = "depends on") -> None:
    for clipping in CLIPPING:
        with pytest.raises(PlanInvalid, match=match):
            rehearse(wrap(build_model(tiny.spec()).train(), clipping), loss, *two_batches())


class Wrapped(nn.Module):
    """The tiny model, whose report encoder is called in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model(tiny.spec(), 3)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        out: Tensor = self.model(inputs, seen_BM)
        return out


# --- accounting and sampling ----------------------------------------------------------------------------------------------


def test_trap_new_accountant_each_round(tmp_path: Path) -> None:
    """The ledger is closed and opened again in each round and still shows the composition."""
    assert ledger_gap(tmp_path, site(), 8) == pytest.approx(0, abs=1e-9)


def test_trap_shuffled_batches() -> None:
    with pytest.raises(PlanInvalid, match="sampler"):
        PrivacyPlan(**{**vars(plan()), "sampling": "shuffle"})
    nobody_says("DataLoader", "RandomSampler", "BatchSampler", "random_split")


@both_ways
def test_trap_several_records_of_a_patient(clipping: str) -> None:
    assert max(sensitivity(engine_for(tiny.spec(), clipping=clipping), tiny.batch(STUDIES))) <= LIMIT
    event = plan(unit="record", most=5, noise=2.0).round_event(1)
    assert event.noise_multiplier == pytest.approx(0.4), "of unit record, a patient is charged for all records"


def test_trap_rate_of_the_loader() -> None:
    """The sampler takes the plan's rate alone, and that is what the loop gives it."""
    for rate in (1 / 2, int(1 / (1 / 50)), 64 / 100):
        with pytest.raises(PlanInvalid, match="takes a Rate"):
            SystemNoise().sample(100, rate)  # type: ignore[arg-type]
    calls = [
        ast.unparse(node.args[1])
        for file, node in nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sample"
        if file.startswith("fedmm/training") and len(node.args) == 2
    ]
    assert calls == ["plan.sampling_rate"]


def test_trap_cut_batch() -> None:
    cohort = hospital(tiny.batch(STUDIES)).cohort("all")
    for limit in (1, 2, 7):
        parts = list(cohort.physical(range(cohort.patients), limit=limit))
        assert (sum(part.patients for part in parts), sum(part.studies for part in parts)) == (5, 12)


# --- losses ---------------------------------------------------------------------------------------------------------------


@both_ways
def test_trap_loss_of_shape_b_1(clipping: str) -> None:
    engine = engine_for(tiny.spec(), clipping=clipping)
    with pytest.raises(PlanInvalid, match="shape"):
        engine.accumulate(tiny.batch(STUDIES), lambda z, batch: study_loss(z, batch).unsqueeze(1))


def test_trap_class_weights_with_a_mean() -> None:
    def weighted(logits_BO: Tensor, batch: Batch) -> Tensor:
        weight = torch.tensor([1.0, 5.0, 20.0])
        return nn.functional.cross_entropy(logits_BO[:, 2:], batch.class_B.clamp(min=0), weight=weight)

    refused_in_rehearsal(weighted, match="shape")
    refused_in_rehearsal(lambda z, batch: weighted(z, batch).expand(batch.studies))
    refused_in_rehearsal(lambda z, batch: study_loss(z, batch) / batch.studies)


def test_trap_mean_over_valid_labels() -> None:
    refused_in_rehearsal(lambda z, b: study_loss(z, b) * 100 / (1 + (~b.finding_BF.isnan()).sum()))
    whole = tiny.batch(STUDIES)
    logits_BO = torch.randn(whole.studies, 5)
    before = study_loss(logits_BO, whole)
    whole.finding_BF[1:], whole.class_B[1:] = torch.nan, -1
    assert float(study_loss(logits_BO, whole)[0]) == float(before[0])


def contrastive(logits_BO: Tensor, batch: Batch) -> Tensor:
    similar_BB = logits_BO @ logits_BO.T
    return nn.functional.cross_entropy(similar_BB, torch.arange(batch.studies), reduction="none")


def supervised_contrastive(logits_BO: Tensor, batch: Batch) -> Tensor:
    same_BB = (batch.class_B.unsqueeze(0) == batch.class_B.unsqueeze(1)).to(logits_BO.dtype)
    return -((logits_BO @ logits_BO.T).log_softmax(1) * same_BB).sum(1) / same_BB.sum(1)


def mixup(logits_BO: Tensor, batch: Batch) -> Tensor:
    return 0.7 * study_loss(logits_BO, batch) + 0.3 * study_loss(logits_BO.roll(1, 0), batch)


def hardest_negative(logits_BO: Tensor, batch: Batch) -> Tensor:
    distance_BB = (logits_BO.unsqueeze(0) - logits_BO.unsqueeze(1)).square().sum(-1)
    return (1 - (distance_BB + 1e9 * torch.eye(batch.studies)).amin(1)).relu() + logits_BO.square().sum(1)


@pytest.mark.parametrize("loss", [contrastive, supervised_contrastive, mixup, hardest_negative])
def test_trap_loss_between_studies(loss: Callable[[Tensor, Batch], Tensor]) -> None:
    refused_in_rehearsal(loss)


# --- layers ---------------------------------------------------------------------------------------------------------------


class Permuted(nn.Module):
    """As ConvNeXt and AST do it: a norm over the last axis, then back, which leaves a permuted tensor for the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.LayerNorm(4)
        self.second, self.output = nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        map_BHWC = self.norm(
            self.first(inputs["image"].contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        )
        out: Tensor = self.output(self.second(map_BHWC.permute(0, 3, 1, 2)).mean((2, 3)))
        return out


def gradients_are_right(engine: PrivateEngine, batch: Batch) -> bool:
    """Unclipped, the sum is autograd's own."""
    engine.max_grad_norm = engine.optimizer.max_grad_norm = 1e6
    ours = clipped_sum(engine, batch, loss=squares)
    with engine.model.without_hooks():
        loss_S = squares(engine.model(batch.inputs, batch.seen_BM), batch)
        total = sum(loss_S[batch.patient_B == p].mean() for p in range(batch.patients))
        plain = torch.autograd.grad(total, engine.optimizer.params)
    return torch.allclose(ours, torch.cat([g.flatten() for g in plain]).double(), rtol=1e-3, atol=1e-4)


@both_ways
def test_trap_channels_last(clipping: str) -> None:
    assert gradients_are_right(engine_on(Permuted(), clipping=clipping), tiny.batch(STUDIES))


def test_opacus_alone_falls_into_the_trap_of_channels_last() -> None:
    """Positive control: if this fails, Opacus has mended it and our guard is no longer needed."""
    model, batch = Permuted(), tiny.batch((1, 1, 1))
    alone = GradSampleModule(model, loss_reduction="sum")
    with quiet_hooks():
        squares(alone(batch.inputs, batch.seen_BM), batch).sum().backward()
    weight = model.second.weight
    assert not torch.allclose(weight.grad_sample.sum(0), weight.grad, rtol=1e-2, atol=1e-3)  # type: ignore[attr-defined]


def test_the_rehearsal_sees_gradients_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse(wrap(Permuted().train()), squares, *two_batches())
    monkeypatch.setattr(HookedModel, "rearrange_grad_samples", GradSampleModule.rearrange_grad_samples)
    with pytest.raises(PlanInvalid, match="do not add up"):
        rehearse(wrap(Permuted().train()), squares, *two_batches())


@both_ways
def test_the_rehearsal_sees_statistics_that_would_leave_with_the_model(clipping: str) -> None:
    model = Permuted()
    model.first = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Conv2d(1, 4, 3))
    with pytest.raises(PlanInvalid, match="changed by a pass"):
        rehearse(wrap(model.train(), clipping), squares, *two_batches())


@both_ways
def test_trap_frozen_batch_norm_in_train_mode(clipping: str) -> None:
    model = Wrapped()
    model.norm = nn.BatchNorm2d(1).requires_grad_(False)
    with pytest.raises(PlanInvalid, match="statistics of the batch"):
        wrap(model.train(), clipping)
    model.norm.eval()
    engine = PrivateEngine(
        wrap(model, clipping), torch.optim.SGD(model.parameters(), lr=1), plan=plan(), batch_size=8, noise=SystemNoise()
    )
    engine.accumulate(tiny.batch(STUDIES), study_loss)
    engine.model.train()
    with pytest.raises(PlanInvalid, match="statistics of the batch"):
        engine.accumulate(tiny.batch(STUDIES), study_loss)


@pytest.mark.parametrize(("heads", "first"), [(2, True), (2, False), (1, False)])
def test_trap_attention_with_several_heads(heads: int, first: bool) -> None:  # noqa: FBT001
    model = Wrapped()
    model.attention = DPMultiheadAttention(4, heads, batch_first=first)
    for clipping in CLIPPING:
        with pytest.raises(PlanInvalid, match="scaled_dot_product_attention"):
            wrap(model.train(), clipping)


@both_ways
def test_trap_two_copies_of_the_clip(clipping: str) -> None:
    """A scheduler that changes C in one place: refused before it clips, and before it adds noise."""
    for changed in (0.1 * C, 10 * C, float("nan")):
        engine = engine_for(tiny.spec(), clipping=clipping)
        engine.optimizer.max_grad_norm = changed
        with pytest.raises(PlanInvalid, match="clipping norm"):
            engine.accumulate(tiny.batch(STUDIES), study_loss)
        with pytest.raises(PlanInvalid, match="clipping norm"):
            engine.step()


class Skipping(Wrapped):
    """The second head runs only when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.skip = nn.Linear(5, 5), False

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        z_BO = super().forward(inputs, seen_BM)
        return z_BO if self.skip else self.extra(z_BO)


def test_trap_encoder_skipped() -> None:
    """Our model runs every encoder always. A model that does not is refused with hooks; ghost keeps nothing to be stale."""
    model, ran = build_model(tiny.spec()), []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: ran.append(name))
    batch = tiny.batch((1, 1))
    batch.seen_BM[:] = False
    model(batch.inputs, batch.seen_BM)
    assert ran == ["image", "report", "audio"]
    engines = {clipping: engine_on(Skipping(), clipping=clipping) for clipping in CLIPPING}
    for engine in engines.values():
        engine.accumulate(tiny.batch(STUDIES), study_loss)
        engine.model._module.skip = True
    with pytest.raises(PlanInvalid, match="one gradient for each study"):
        engines["hooks"].accumulate(tiny.batch(STUDIES), study_loss)
    assert max(sensitivity(engines["ghost"], tiny.batch(STUDIES))) <= LIMIT
    clipped_sum(engines["ghost"], tiny.batch(STUDIES))
    assert not engines["ghost"].model._module.extra.weight.summed_grad.any()


class Masked(Wrapped):
    """An encoder on the rows that have the modality."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 5)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        z_BO = super().forward(inputs, seen_BM)
        return z_BO.index_add(0, seen_BM[:, 0].nonzero().flatten(), self.extra(z_BO[seen_BM[:, 0]]))


@both_ways
def test_trap_encoder_on_some_rows(clipping: str) -> None:
    batch = tiny.batch(STUDIES)
    batch.seen_BM[0, 0], batch.seen_BM[1, 0] = True, False
    with pytest.raises(PlanInvalid, match="each study"):
        engine_on(Masked(), clipping=clipping).accumulate(batch, study_loss)


class Token(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(5))


@both_ways
def test_trap_parameter_of_its_own(clipping: str) -> None:
    with pytest.raises(PlanInvalid, match="cannot be bounded") as caught:
        wrap(Token().train(), clipping)
    assert "Embedding(1, d)" in caught.value.why


# --- records and rounds ---------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_trap_one_nan_record(clipping: str, value: float) -> None:
    engine, whole = engine_for(tiny.spec(), clipping=clipping), tiny.batch((1, 3, 1, 2))
    whole.seen_BM[2, 0] = True
    clean = clipped_sum(engine, tiny.pick(whole, [0, 2, 3]))
    whole.inputs["image"][2] = value
    torch.testing.assert_close(clipped_sum(engine, whole), clean, rtol=1e-5, atol=1e-9)
    assert engine.optimizer.zeroed == 1


def test_trap_manual_seed() -> None:
    def update() -> Tensor:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        bench = Workbench(tiny.spec(), torch.device("cpu"))
        bench.load(build_model(tiny.spec(), 1).state_dict())
        train(bench, Nobody(), plan(), config=TrainingConfig(), noise=SystemNoise())
        return torch.cat([value.flatten() for value in bench.weights().values()])

    assert float((update() == update()).double().mean()) < 0.01


@both_ways
def test_trap_leaving_in_mid_batch(clipping: str) -> None:
    """A round that ends between two physical batches, or in the middle of one, leaves nothing for the next engine."""
    model, whole = build_model(tiny.spec(), 3).train(), tiny.batch(STUDIES)
    wrapped, fresh = wrap(model, clipping), lambda: torch.optim.SGD(model.parameters(), lr=1.0)

    def engine() -> PrivateEngine:
        return PrivateEngine(wrapped, fresh(), plan=plan(), batch_size=8, noise=SystemNoise())

    clean = clipped_sum(engine(), whole)
    left = engine()
    left.accumulate(tiny.pick(whole, [0, 1]), study_loss)
    assert not engine().clipped_sum().any()

    def fails(logits_BO: Tensor, batch: Batch) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        left.accumulate(tiny.pick(whole, [2, 3]), fails)
    again = engine()
    again.accumulate(whole, study_loss)
    torch.testing.assert_close(again.clipped_sum().double(), clean)


@both_ways
def test_trap_empty_batch(clipping: str) -> None:
    """The first batch empty, only empty ones, an empty one between others; also with an Embedding."""
    whole = tiny.batch(STUDIES)
    for model in (build_model(tiny.spec()), Sequences(4)):
        engine = engine_on(model, clipping=clipping)
        engine.accumulate(tiny.pick(whole, []), squares)
        before = [p.detach().clone() for p in engine.optimizer.params]
        engine.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, engine.optimizer.params, strict=True))
        parts = [tiny.pick(whole, chosen) for chosen in ([], [0, 1], [], [2, 3, 4])]
        torch.testing.assert_close(
            clipped_sum(engine, *parts, loss=squares), clipped_sum(engine, whole, loss=squares), rtol=1e-4, atol=1e-7
        )


def test_trap_hooks_on_a_wide_head() -> None:
    """training.clipping = ghost: a wide linear layer is clipped by dot products, without a gradient of any study."""
    engine, batch = engine_on(Head(3000, 200), clipping="ghost"), tiny.batch(STUDIES)
    batch.inputs["image"] = torch.randn(batch.studies, 3000)  # type: ignore[index]
    logits_BO = engine.clipper.logits(batch)
    clip = engine.clipper.clip  # type: ignore[attr-defined]
    parts = parts_of(engine.model, logits_BO.sum(), Groups(batch.patient_B, batch.patients), clip)
    assert any(isinstance(part, DotPart) and part.weight.shape == (200, 3000) for part in parts)
    assert not hasattr(engine.model._module.output.weight, "grad_sample")


@both_ways
def test_trap_physical_batch_of_one(clipping: str) -> None:
    cohort = hospital(tiny.batch(STUDIES)).cohort("all")
    for model in (build_model(tiny.spec(), 3), Sequences(4)):
        engine = engine_on(model, clipping=clipping)
        sums = [clipped_sum(engine, *cohort.physical(range(5), limit=n), loss=squares) for n in (1, 2, 3, 1000)]
        for other in sums[1:]:
            torch.testing.assert_close(other, sums[0], rtol=1e-4, atol=1e-7)


# --- architectures that we do not ship -------------------------------------------------------------------------------------


class Positions(Sequences):
    """As BERT does it: one row of position ids for all studies."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.positions = nn.Embedding(8, 2)

    def forward(self, inputs: Mapping[str, Tensor], seen_BM: Tensor, timeline: object = None) -> Tensor:
        return super().forward(inputs, seen_BM) + self.positions(torch.arange(8).unsqueeze(0)).mean(1)


@both_ways
def test_trap_position_ids_of_bert(clipping: str, pretrained: Path) -> None:
    """Shared ids are refused; the encoders from a folder give each study its own, and bound it exactly."""
    with pytest.raises(PlanInvalid, match="each study"):
        engine_on(Positions(4), clipping=clipping).accumulate(tiny.batch(STUDIES), squares)
    for name in ("bert", "wav2vec2"):
        spec = folder_spec(name, "full", tiny.INPUTS)
        batch = tiny.batch(STUDIES, inputs=spec.inputs)
        assert 0.5 < max(sensitivity(engine_for(spec, clipping=clipping), batch)) <= LIMIT


@both_ways
def test_trap_ast_and_convnext(clipping: str, pretrained: Path) -> None:
    """Their permuted tensors pass the rehearsal because the samplers see contiguous ones."""
    rehearse(wrap(Permuted().train(), clipping), squares, *two_batches())
    assert max(sensitivity(engine_on(Permuted(), clipping=clipping), tiny.batch(STUDIES), loss=squares)) <= LIMIT
    spec = folder_spec("ast", "full", tiny.INPUTS)
    batch = tiny.batch(STUDIES, inputs=spec.inputs)
    assert 0.5 < max(sensitivity(engine_for(spec, clipping=clipping), batch)) <= LIMIT
    nobody_says("timm")


# --- what we keep out ------------------------------------------------------------------------------------------------------


def test_trap_load_checkpoint_of_opacus() -> None:
    nobody_says("PrivacyEngine", "opacus.PrivacyEngine", "torch.load", "pickle")


def test_trap_length_of_the_accountant() -> None:
    for file, node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
            assert "accountant" not in ast.unparse(node), file


def test_trap_prv_at_hundreds() -> None:
    assert prv_epsilon([Event("train", 0.3, Rate(1.0), 50)], 1e-5) is None


def test_trap_exact_numbers_in_the_reply() -> None:
    """No message of a hospital has a field for a number of patients or studies, or for a loss."""
    for message in (FitReply, Hello):
        for name in message.model_fields:
            assert not any(word in name for word in ("example", "count", "studies", "patients", "loss", "num"))


def test_trap_constants_learnt_from_private_data() -> None:
    """What is read of a file, and how long training runs, is in the public spec and plan."""
    nobody_says(
        "StandardScaler", "TfidfVectorizer", "CountVectorizer", "sklearn", "WeightedRandomSampler", "pos_weight"
    )
    nobody_says("compute_class_weight", "early_stopping", "best_round", "ReduceLROnPlateau")
    assert not list(MultimodalModel(ModelSpec(inputs=InputSpec(), model=ModelConfig(), labels=tiny.LABELS)).buffers())


def test_trap_tuning_runs(tmp_path: Path) -> None:
    """Ten runs with ten names on the same patients: one ledger, one epsilon, one ceiling."""
    event = Event("train", 2.0, Rate(0.1), 20)
    with Ledger.open(tmp_path, site()) as ledger:
        for number in range(10):
            with ledger.reserve(event, run=f"tuning-{number}", round=1) as charge:
                charge.start()
                charge.settle()
        assert ledger.spent().epsilon == pytest.approx(epsilon_pld([event] * 10, 1e-5), abs=1e-9)
        with pytest.raises(BudgetExhausted):
            ledger.reserve(Event("train", 0.5, Rate(1.0), 20), run="tuning-10", round=1)


def test_trap_central_noise_of_numpy() -> None:
    nobody_says("np.random.normal", "np.random.randn", "np.random.seed", "torch.randn", "torch.normal", "normal_")
    for file, said in spoken().items():
        if file.startswith(("fedmm/privacy", "client")) and file != "fedmm/privacy/noise.py":
            assert not said & {"standard_normal", "np.random.default_rng"}, file


def test_trap_local_dp_mod() -> None:
    nobody_says("LocalDpMod", "fixedclipping_mod", "adaptiveclipping_mod", "flwr.clientapp.mod", "flwr.client.mod")


def test_trap_clip_helper_of_flower() -> None:
    norm_GP = torch.tensor([[0.0, torch.nan, torch.inf, 2.0, 0.1]], dtype=torch.float64)
    factor_GP, zeroed = clip_factors(norm_GP, 0.5)
    assert factor_GP.tolist() == [[1.0, 0.0, 0.0, 0.25, 1.0]]
    assert zeroed == 2
    nobody_says(
        "compute_clip_model_update", "DifferentialPrivacyServerSideFixedClipping", "flwr.common.differential_privacy"
    )


def test_trap_charge_after_release(tmp_path: Path) -> None:
    """The charge is on disk before training starts, so that whoever is killed in between has paid."""
    event = Event("train", 2.0, Rate(0.5), 3)
    with Ledger.open(tmp_path, site()) as ledger:
        ledger.reserve(event, run="r", round=1).start()
    with Ledger.open(tmp_path, site()) as ledger:
        assert ledger.spent().epsilon == pytest.approx(epsilon_pld([event], 1e-5), abs=1e-9)
    app = {n.name: ast.unparse(n) for f, n in nodes() if f == "client/app.py" and isinstance(n, ast.FunctionDef)}
    paying, making = app["paid_once"], app["fit"]
    assert paying.index(".reserve(") < paying.index("make(charge)") < paying.index(".put(") < paying.index(".settle(")
    assert making.index(".start()") < making.index("train_or_noise(") < making.index("paid_once(")


# --- the table ------------------------------------------------------------------------------------------------------------

# Words of each row, in the order of the table, and the test.
MAPPED = {
    "a new accountant each round": test_trap_new_accountant_each_round,
    "shuffled batches": test_trap_shuffled_batches,
    "k records of one patient": test_trap_several_records_of_a_patient,
    "`q` from Opacus' loader": test_trap_rate_of_the_loader,
    "cutting a Poisson batch": test_trap_cut_batch,
    "loss of shape (B,1)": test_trap_loss_of_shape_b_1,
    "class-weighted cross entropy": test_trap_class_weights_with_a_mean,
    "mean over valid labels": test_trap_mean_over_valid_labels,
    "in-batch contrastive loss": test_trap_loss_between_studies,
    "`channels_last`": test_trap_channels_last,
    "frozen BatchNorm": test_trap_frozen_batch_norm_in_train_mode,
    "`DPMultiheadAttention": test_trap_attention_with_several_heads,
    "two copies of `max_grad_norm`": test_trap_two_copies_of_the_clip,
    "an encoder skipped": test_trap_encoder_skipped,
    "an encoder called on `x[mask]`": test_trap_encoder_on_some_rows,
    "`nn.Parameter`": test_trap_parameter_of_its_own,
    "one NaN record": test_trap_one_nan_record,
    "`torch.manual_seed`": test_trap_manual_seed,
    "leaving BatchMemoryManager": test_trap_leaving_in_mid_batch,
    "empty Poisson batch": test_trap_empty_batch,
    "hooks mode on a wide head": test_trap_hooks_on_a_wide_head,
    "a physical batch of size 1": test_trap_physical_batch_of_one,
    "Hugging Face BERT": test_trap_position_ids_of_bert,
    "AST, ConvNeXt": test_trap_ast_and_convnext,
    "`PrivacyEngine.load_checkpoint`": test_trap_load_checkpoint_of_opacus,
    "`len(accountant)`": test_trap_length_of_the_accountant,
    "PRV at epsilon in the hundreds": test_trap_prv_at_hundreds,
    "exact `num-examples`": test_trap_exact_numbers_in_the_reply,
    "scaler, vocabulary": test_trap_constants_learnt_from_private_data,
    "ten tuning runs": test_trap_tuning_runs,
    "server central noise": test_trap_central_noise_of_numpy,
    "`LocalDpMod`": test_trap_local_dp_mod,
    "clip helper": test_trap_clip_helper_of_flower,
    "charge after release": test_trap_charge_after_release,
}


def test_every_row_of_the_table_has_its_test() -> None:
    if not TABLE.exists():
        pytest.skip(f"{TABLE} is not here")
    text = TABLE.read_text(encoding="utf-8")
    table = text[text.index("| trap |") :].split("\n\n")[0].splitlines()[2:]
    rows = [row.split("|")[1] for row in table]
    assert len(rows) == len(MAPPED)
    for row, (words, test) in zip(rows, MAPPED.items(), strict=True):
        assert words in row, f"{words!r} is not in the row {row!r}"
        assert test.__name__.startswith("test_trap_")
