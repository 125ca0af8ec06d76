"""Reports read in order: the contract of every sequence encoder, its recurrence, and tasks that order alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmm.config import ModelConfig
from fedmm.data.text import tokenize
from fedmm.models import text_sequence
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.recurrent import GRU, LSTM, Bidirectional, Cell
from fedmm.models.store import load_model, save_model
from fedmm.models.transformer import Block, cut_windows, masked_mean
from fedmm.privacy.engine import CLIPPING
from fedmm.schema import InputSpec
from fedmm.training.loop import Workbench
from tests import tiny
from tests.privacy.measure import LIMIT, clipped_sum, engine_for, hospital, sensitivity

NAMES = ("lstm", "gru", "transformer")
BUCKETS = 64
every_encoder = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, width: int = 4, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return encoders["report"].get(name)(InputSpec(report_buckets=BUCKETS), width)


def reports(*shape: int, seed: int = 0) -> Tensor:
    """Ids without padding."""
    return torch.randint(1, BUCKETS, shape, generator=torch.Generator().manual_seed(seed))


def model_spec(name: str, inputs: InputSpec = tiny.INPUTS) -> ModelSpec:
    return ModelSpec(inputs=inputs, model=ModelConfig(report=name, width=4), labels=tiny.LABELS)


# --- contract -----------------------------------------------------------------------------------------------------------


@every_encoder
@pytest.mark.parametrize("studies", [0, 1, 7])
@pytest.mark.parametrize("tokens", [1, 3, 8, 64, 65, 300])
def test_any_batch_and_length_gives_finite_output_and_gradient(name: str, studies: int, tokens: int) -> None:
    encoder, report_BT = make(name), reports(studies, tokens)
    report_BT[::2] = 0
    out = encoder(report_BT)
    assert out.shape == (studies, 4)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@every_encoder
def test_a_report_does_not_see_the_others_in_its_batch(name: str) -> None:
    encoder, report_BT = make(name), reports(5, 300)
    report_BT[1, 3:], report_BT[2, :], report_BT[3, 70:] = 0, 0, 0
    whole = encoder(report_BT)
    for i in range(5):
        torch.testing.assert_close(encoder(report_BT[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-6)


@every_encoder
@pytest.mark.parametrize("tokens", [1, 6, 64, 100])
def test_more_padding_changes_neither_result_nor_gradient(name: str, tokens: int) -> None:
    results = []
    for padding in (0, 1, 200):
        encoder = make(name)
        report_BT = nn.functional.pad(reports(3, tokens), [0, padding])
        report_BT[0, tokens // 2 + 1 :] = 0
        # a neighbour that fills the row, so that the padding is not simply dropped
        neighbour = reports(1, tokens + padding, seed=1)
        out = encoder(torch.cat([report_BT, neighbour]))[:3]
        out.square().sum().backward()
        results.append((out.detach(), torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-5)


@every_encoder
def test_padding_is_never_learnt(name: str) -> None:
    encoder, report_BT = make(name), reports(3, 12)
    report_BT[:, 7:] = 0
    encoder(report_BT).square().sum().backward()
    gradient_VE = encoder.tokens.table.weight.grad
    assert gradient_VE.any()
    assert not gradient_VE[0].any()


@every_encoder
def test_nothing_but_weights_is_stored_and_what_is_stored_says_the_same(name: str, tmp_path: Path) -> None:
    model, batch = build_model(model_spec(name), 4), tiny.batch([2, 1])
    assert not list(make(name).buffers())
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    save_model(model, tmp_path)
    assert torch.equal(model(batch.inputs, batch.seen_BM), load_model(tmp_path)(batch.inputs, batch.seen_BM))


# --- privacy ------------------------------------------------------------------------------------------------------------


@every_encoder
@pytest.mark.parametrize("tokens", [8, 72])
def test_one_patient_moves_the_sum_by_at_most_c_and_both_ways_agree(name: str, tokens: int) -> None:
    inputs = tiny.INPUTS.model_copy(update={"report_tokens": tokens})
    whole, sums = tiny.batch((1, 5, 2), inputs=inputs), {}
    whole.inputs["report"][whole.patient_B == 0, 5:] = 0
    for clipping in CLIPPING:
        Workbench(model_spec(name, inputs), torch.device("cpu"), clipping=clipping).private_model  # noqa: B018  (rehearsed)
        engine = engine_for(model_spec(name, inputs), clipping=clipping)
        moved = sensitivity(engine, hospital(whole).cohort("all"), limit=20)
        assert max(moved) <= LIMIT
        assert max(moved) >= 1 - 1e-4, "nobody was clipped: the test shows nothing"
        sums[clipping] = clipped_sum(engine, whole)
    assert float((sums["hooks"] - sums["ghost"]).norm()) <= 1e-4 * engine.max_grad_norm * whole.patients


@pytest.mark.slow
@every_encoder
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("seed", range(5))
def test_long_reports_of_several_windows_keep_the_bound(name: str, clipping: str, seed: int) -> None:
    inputs = tiny.INPUTS.model_copy(update={"report_tokens": 600})
    engine = engine_for(model_spec(name, inputs), clipping=clipping)
    whole = tiny.batch((3, 1, 7, 2, 5), inputs=inputs, seed=seed)
    assert max(sensitivity(engine, hospital(whole).cohort("all"), limit=4)) <= LIMIT


# --- parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "kind"), [(LSTM, nn.LSTM), (GRU, nn.GRU)])
def test_the_recurrence_and_its_gradients_are_those_of_torch(cell: Cell, kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    ours = Bidirectional(cell, 6, 5).double()
    theirs = kind(6, 5, batch_first=True, bidirectional=True).double()  # type: ignore[call-arg]
    pairs = []
    for direction, suffix in enumerate(("l0", "l0_reverse")):
        rows = slice(direction * cell.gates * 5, (direction + 1) * cell.gates * 5)
        getattr(theirs, f"weight_ih_{suffix}").data.copy_(ours.enter.weight[rows])
        getattr(theirs, f"bias_ih_{suffix}").data.copy_(ours.enter.bias[rows])
        getattr(theirs, f"weight_hh_{suffix}").data.copy_(ours.recur[direction].weight)
        getattr(theirs, f"bias_hh_{suffix}").data.zero_()
        pairs += [(ours.enter.weight, rows, f"weight_ih_{suffix}"), (ours.enter.bias, rows, f"bias_ih_{suffix}")]
        pairs += [(ours.recur[direction].weight, slice(None), f"weight_hh_{suffix}")]
    x_BVLX = torch.randn(3, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 2, 7, 10, dtype=torch.float64)
    h_BVLX = ours(x_BVLX, torch.ones(3, 2, 7, dtype=torch.bool))
    (inward,) = torch.autograd.grad((h_BVLX * target).sum(), x_BVLX, retain_graph=True)
    (h_BVLX * target).sum().backward()
    expected = theirs(x_BVLX.reshape(6, 7, 6))[0].reshape(h_BVLX.shape)
    torch.testing.assert_close(h_BVLX, expected)
    torch.testing.assert_close(inward, torch.autograd.grad((expected * target).sum(), x_BVLX, retain_graph=True)[0])
    (expected * target).sum().backward()
    for weight, rows, name in pairs:
        torch.testing.assert_close(weight.grad[rows], getattr(theirs, name).grad)


def test_training_and_prediction_compute_the_same_states() -> None:
    encoder, report_BT = make("lstm"), reports(3, 40)
    with torch.no_grad():
        quiet = encoder(report_BT)
    assert torch.equal(quiet, encoder(report_BT).detach())


def test_a_block_hides_masked_steps_and_is_finite_where_all_are() -> None:
    torch.manual_seed(0)
    block = Block(8, 2)
    mask_BT = torch.tensor([[True, True, False], [False, False, False]])
    x_BTW = torch.randn(2, 3, 8)
    other = torch.where(mask_BT.unsqueeze(-1), x_BTW, torch.full_like(x_BTW, 9.0))
    torch.testing.assert_close(block(x_BTW, mask_BT)[0, :2], block(other, mask_BT)[0, :2])
    assert block(x_BTW, mask_BT).isfinite().all()
    torch.testing.assert_close(block(x_BTW), block(x_BTW, torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="do not divide"):
        Block(8, 3)


def test_windows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    block, x_BVLW = Block(8, 2), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(block(x_BVLW)[:, 1], block(x_BVLW[:, 1]))


def test_the_mean_is_over_what_is_there_first_in_windows_then_over_them() -> None:
    x_BT1 = torch.tensor([[1.0, 3, 8, 9, 9, 9]]).unsqueeze(-1)
    mask_BT = torch.tensor([[True, True, True, False, False, False]])
    x_BVL1, mask_BVL = cut_windows(x_BT1, 2), cut_windows(mask_BT, 2)
    assert x_BVL1.shape == (1, 3, 2, 1)
    assert masked_mean(x_BVL1, mask_BVL).item() == 5.0  # of (1 + 3) / 2 and 8; the third window has nothing
    assert masked_mean(x_BVL1, torch.zeros_like(mask_BVL)).item() == 0.0
    assert cut_windows(x_BT1, 4).shape == (1, 2, 4, 1)
    assert cut_windows(x_BT1, 100).shape == (1, 1, 6, 1)


def test_columns_that_only_pad_are_not_read() -> None:
    report_BT = torch.tensor([[1, 0, 0, 0], [0, 0, 2, 0]])
    assert torch.equal(text_sequence.used(report_BT), report_BT[:, :3])
    assert text_sequence.used(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 1)
    assert text_sequence.used(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 1)


# --- order --------------------------------------------------------------------------------------------------------------


@every_encoder
def test_word_order_changes_the_result(name: str) -> None:
    spec = InputSpec(report_tokens=8, report_buckets=BUCKETS)
    one, other = (torch.from_numpy(tokenize(text, spec)).unsqueeze(0) for text in ("no effusion", "effusion no"))
    encoder = make(name)
    assert (encoder(one) - encoder(other)).norm() > 1e-3


def order_task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two words far from each other among twelve; which is first decides. No bag of words or pairs can tell."""
    chance = torch.Generator().manual_seed(seed)
    report_BT = torch.randint(10, 30, (count, 12), generator=chance)
    first_B, second_B = (torch.randint(low, low + 6, (count,), generator=chance) for low in (0, 6))
    answer_B = torch.randint(0, 2, (count,), generator=chance)
    rows = torch.arange(count)
    report_BT[rows, first_B] = torch.where(answer_B == 1, 5, 7)
    report_BT[rows, second_B] = torch.where(answer_B == 1, 7, 5)
    return report_BT, answer_B


@pytest.mark.parametrize(("name", "steps"), [("ngrams", 60), ("lstm", 70), ("gru", 70), ("transformer", 30)])
def test_what_reads_in_order_learns_a_task_of_order_and_a_bag_does_not(name: str, steps: int) -> None:
    model = nn.Sequential(make(name, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    report_BT, answer_B = order_task(384, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(report_BT), answer_B).backward()
        optimizer.step()
    unseen_BT, right_B = order_task(256, 2)
    accuracy = float((model(unseen_BT).argmax(1) == right_B).float().mean())
    if name == "ngrams":
        assert accuracy < 0.6
    else:
        assert accuracy > 0.9
