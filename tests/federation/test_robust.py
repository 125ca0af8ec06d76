"""Rules that withstand liars: what they compute, against plain numpy; what a liar can do to them; how many they need."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import MultiKrum, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.config import ROBUST, FederationConfig, RunConfig
from fedmm.errors import ConfigError, RunFailed
from fedmm.federation.aggregation import Aggregator, shorten, tensors
from fedmm.federation.checks import Fit
from fedmm.federation.fold import Everybody
from fedmm.federation.messages import ARRAYS, METRICS, WEIGHT, array_record, views
from fedmm.federation.robust import check_rule, geometric_median
from fedmm.federation.strategies import make_strategy
from fedmm.federation.tiles import distance
from fedmm.training.checkpoint import Checkpoint
from fedmm.training.local import still_parts
from tests.federation.scripted import SHAPES, fit_reply, weights
from tests.federation.test_rounds import Run, WatchedGrid
from tests.federation.test_rounds import settings as run_settings

Values = dict[str, np.ndarray]


def rule(name: str, *, liars: int = 1) -> Strategy:
    return make_strategy(FederationConfig.model_validate({"strategy": name, "byzantine": liars}))


def reply(values: Values, *, weight: float = 1.0, node: int = 2) -> Message:
    arrays = ArrayRecord({name: Array(np.asarray(value, "f4")) for name, value in values.items()})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: weight})})
    return Message(content, reply_to=Message(RecordDict(), node, MessageType.TRAIN))


def of(strategy: Strategy, sent: list[Values], *, weights_of: list[float] | None = None) -> Values:
    counts = weights_of or [1.0] * len(sent)
    arrays, _ = strategy.aggregate_train(1, [reply(s, weight=w) for s, w in zip(sent, counts, strict=True)])
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def honest(count: int, *, seed: int = 0, spread: float = 0.1, size: float = 1.0) -> list[Values]:
    """Replies around the same place, `size` far from zero."""
    rng = np.random.default_rng(seed)
    centre = {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return [
        {n: (c + spread * rng.standard_normal(c.shape)).astype("f4") for n, c in centre.items()} for _ in range(count)
    ]


def flat(values: Values) -> np.ndarray:
    return np.concatenate([np.ravel(values[name]) for name in sorted(values)]).astype("f8")


# --- against plain numpy ----------------------------------------------------------------------------------------------


def reference(name: str, rows: np.ndarray, liars: int) -> np.ndarray:
    """rows: (n, P)."""
    count = len(rows)
    if name == "fedmedian":
        return np.median(rows, axis=0)
    if name == "fedtrimmedavg":
        return np.sort(rows, axis=0)[liars : count - liars].mean(axis=0)
    if name in ("krum", "multikrum"):
        squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        close = count - liars - 2
        scores = [sum(sorted(squares[i][j] for j in range(count) if j != i)[:close]) for i in range(count)]
        best = np.argsort(scores, kind="stable")
        return rows[best[: close if name == "multikrum" else 1]].mean(axis=0)
    found = rows.mean(axis=0)  # from elsewhere and for longer than the code
    for _ in range(5000):
        pull = 1 / np.maximum(1e-6, np.linalg.norm(rows - found, axis=1))
        found = (pull[:, None] * rows).sum(0) / pull.sum()
    return found


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize(("count", "liars"), [(5, 1), (6, 1), (7, 2), (9, 3), (49, 1)])
def test_each_rule_computes_what_its_paper_says(name: str, count: int, liars: int) -> None:
    for seed in range(3):
        sent = honest(count, seed=seed)
        found = flat(of(rule(name, liars=liars), sent))
        np.testing.assert_allclose(found, reference(name, np.stack([flat(s) for s in sent]), liars), atol=2e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_a_rule_counts_all_hospitals_alike_and_forgets(name: str) -> None:
    sent, active = honest(5), rule(name)
    first = flat(of(active, sent))
    of(active, honest(5, seed=1))
    assert np.array_equal(flat(of(active, sent, weights_of=[1.0, 9.0, 1.0, 0.1, 1.0])), first)


@pytest.mark.parametrize("name", ROBUST)
def test_the_order_of_replies_changes_nothing_but_rounding(name: str) -> None:
    sent, orders = honest(5), list(itertools.permutations(range(5)))[::17]
    found = [flat(of(rule(name), [sent[i] for i in order])) for order in orders]
    assert np.ptp(np.stack(found), axis=0).max() < 1e-6


# --- against liars ----------------------------------------------------------------------------------------------------

LIES: dict[str, Any] = {
    "far away": lambda s: {n: np.full_like(v, 1e6) for n, v in s.items()},
    "as far as numbers go": lambda s: {n: np.full_like(v, 3e38) for n, v in s.items()},
    "the other way": lambda s: {n: -100 * v for n, v in s.items()},
    "just outside": lambda s: {n: v + 1.0 for n, v in s.items()},
    "nothing": lambda s: {n: np.zeros_like(v) for n, v in s.items()},
    "one weight": lambda s: {n: v + (1e9 if n == "scale" else 0) for n, v in s.items()},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("name", "liars"), [(name, liars) for name in ROBUST for liars in (1, 2)])
def test_as_many_liars_as_were_announced_move_the_weights_no_further_than_honest_ones_differ(
    name: str, liars: int, lie: str
) -> None:
    times, more = ROBUST[name]
    sent = honest(times * liars + more, size=2.0)
    good = np.stack([flat(s) for s in sent[liars:]])
    lied = [LIES[lie](s) for s in sent[:liars]]
    found = flat(of(rule(name, liars=liars), lied + sent[liars:]))
    assert np.isfinite(found).all()
    # the diameter of the honest ones bounds krum; the others are closer; the mean is a thousand times further
    diameter = max(np.linalg.norm(a - b) for a in good for b in good)
    assert np.linalg.norm(found - good.mean(axis=0)) < 2 * diameter
    assert np.array_equal(found, flat(of(rule(name, liars=liars), lied + sent[liars:])))


def test_the_mean_is_moved_by_one_liar_as_far_as_it_likes() -> None:
    sent = honest(5)
    lied = [LIES["far away"](sent[0]), *sent[1:]]
    moved = np.linalg.norm(flat(of(make_strategy(FederationConfig(strategy="fedavg")), lied)) - flat(sent[1]))
    assert moved > 1e5


def test_flowers_krum_takes_a_liar_where_updates_are_small_beside_the_weights_and_ours_does_not() -> None:
    """Its |x|² + |y|² - 2xy in float32 has an error as large as the square of the update."""
    rng = np.random.default_rng(0)
    theirs, ours = 0, 0
    for seed in range(20):
        centre = 3 * np.random.default_rng(seed).standard_normal(20_000)
        near = [(centre + 1e-5 * rng.standard_normal(20_000)).astype("f4") for _ in range(4)]
        liar = (centre + 1e-4 * rng.standard_normal(20_000)).astype("f4")
        sent = [{"w": liar}, *({"w": row} for row in near)]
        flower = MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1)
        theirs += np.array_equal(of(flower, sent)["w"], liar)
        ours += np.array_equal(of(rule("krum"), sent)["w"], liar)
    assert ours == 0
    assert theirs > 0


finite = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=60)
@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=5, max_size=7), st.sampled_from(sorted(ROBUST)))
def test_no_finite_replies_make_a_rule_give_anything_but_finite_weights(rows: list[list[float]], name: str) -> None:
    found = of(rule(name), [{"w": np.array(row, "f4")} for row in rows])["w"]
    assert np.isfinite(found).all()
    assert found.min() >= np.min(rows) - 1e-3 * abs(np.min(rows))
    assert found.max() <= np.max(rows) + 1e-3 * abs(np.max(rows))


@pytest.mark.parametrize(
    "rows", [[[0.0]] * 5, [[1.0], [1.0], [1.0], [1.0], [1e30]], [[0.0], [1.0], [0.0], [1.0], [0.5]]], ids=str
)
def test_a_geometric_median_among_equal_points_is_one_of_them(rows: list[list[float]]) -> None:
    found = geometric_median([{"w": np.array(row, "f4")} for row in rows])["w"]
    assert found[0] == pytest.approx(sorted(row[0] for row in rows)[2], abs=1e-5)


# --- how many they need -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "liars", "needed"),
    [("fedmedian", 1, 3), ("fedtrimmedavg", 1, 3), ("krum", 1, 5), ("multikrum", 2, 7), ("geomedian", 2, 5)],
)
def test_too_few_hospitals_for_the_rule_are_refused_at_the_start_with_the_numbers(
    name: str, liars: int, needed: int
) -> None:
    def asked(enough: int) -> FederationConfig:
        return FederationConfig.model_validate({"strategy": name, "byzantine": liars, "min_hospitals": enough})

    with pytest.raises(ConfigError) as refused:
        check_rule(asked(needed - 1))
    assert f"needs {needed} hospitals in every round; federation.min_hospitals is {needed - 1}" in refused.value.what
    assert f"min_hospitals = {needed}" in refused.value.fix
    check_rule(asked(needed))


@pytest.mark.parametrize("name", ROBUST)
def test_a_rule_against_nobody_is_refused_and_told_what_it_takes(name: str) -> None:
    with pytest.raises(ConfigError, match="without a number of hospitals that may lie") as refused:
        check_rule(FederationConfig.model_validate({"strategy": name}))
    times, more = ROBUST[name]
    assert f"min_hospitals = {times + more}" in refused.value.fix


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "scaffold"])
def test_rules_that_average_need_nobody_in_particular(name: str) -> None:
    check_rule(FederationConfig.model_validate({"strategy": name}))


def test_a_run_with_a_liar_ends_near_the_one_without() -> None:
    names = ("aachen", "basel", "chur", "davos", "essen")
    for name in ROBUST:
        config = run_settings(strategy=name, byzantine=1, min_hospitals=5)
        ends = []
        for script in ("{}", '{"train 1": "lie", "train 2": "lie", "train 3": "lie"}'):
            grid = WatchedGrid([{"name": n, "script": script if n == "basel" else "{}"} for n in names])
            run = Run(grid, config).finish()
            assert all(record.trained == list(names) for record in run.records)
            ends.append(run.saved[3].weights)
        apart = torch.sqrt(sum((ends[0][n] - ends[1][n]).square().sum() for n in SHAPES))
        assert float(apart) < 6, name  # an honest step is 0.8 long, the lie 800


# --- norm bounding ----------------------------------------------------------------------------------------------------


def fit(name: str, values: dict[str, torch.Tensor], *, weight: float = 1.0) -> Fit:
    arrays = array_record(values)
    return Fit(name, fit_reply(name), arrays, weight, distance(views(arrays), views(array_record(weights()))))


def test_longer_updates_are_shortened_to_the_norm_and_shorter_ones_stay_bit_by_bit() -> None:
    before = weights()
    long, short = (fit("aachen", {n: v + step for n, v in before.items()}, weight=0.5) for step in (2.0, 1e-3))
    kept = dict(short.arrays)
    for each in (long, short):
        shorten(each, array_record(before), 1.5)
    found = tensors(long.arrays)
    step = torch.cat([(found[n] - before[n]).flatten() for n in sorted(before)])
    assert float(step.norm()) == pytest.approx(1.5, rel=1e-5)
    assert float(step.std()) < 1e-6, "the direction stays"
    assert long.weight == 0.5
    assert all(array is kept[name] for name, array in short.arrays.items())


def test_with_a_bound_one_hospital_moves_the_mean_no_further_than_its_share_of_it() -> None:
    script = '{"train 1": "lie"}'
    grid = WatchedGrid([{"name": "aachen"}, {"name": "basel", "script": script}, {"name": "chur"}])
    ends = [Run(grid, run_settings(rounds=1, clip_norm=clip)).finish().saved[1].weights for clip in (0.0, 0.25)]
    moved = [float(torch.cat([(end[n] - v).flatten() for n, v in weights().items()]).norm()) for end in ends]
    assert moved[0] > 100
    assert moved[1] <= 0.25 * (1 + 1e-5)


# --- parts that some do not train -------------------------------------------------------------------------------------

AUDIO, HEAD = "encoders.audio.w", "head.w"
STILL = still_parts(("image", "report"))


def some(**audio: float) -> list[Fit]:
    return [
        Fit(name, fit_reply(name), array_record({AUDIO: torch.full((2,), value), HEAD: torch.zeros(2)}), 1.0, 1.0)
        for name, value in audio.items()
    ]


def handed_over(fits: list[Fit], still: dict[str, tuple[str, ...]], *, before: float = 0.0) -> list[Message]:
    """What a rule against one liar gets."""
    everybody = Everybody(still, liars=1)
    for each in reversed(fits):
        everybody.add(each)
    return everybody.replies(array_record({AUDIO: torch.full((2,), before), HEAD: torch.zeros(2)}))


def audio(message: Message) -> list[float]:
    return tensors(message.content.array_records[ARRAYS])[AUDIO].tolist()


def test_a_part_that_some_do_not_train_is_the_middle_of_those_who_do_where_some_may_lie() -> None:
    fits = some(aachen=1.0, basel=1.2, chur=1e6, davos=0.0, essen=0.0)
    still: dict[str, tuple[str, ...]] = {"aachen": (), "basel": (), "chur": (), "davos": STILL, "essen": STILL}
    found = handed_over(fits, still)
    assert [audio(message)[0] for message in found] == pytest.approx([1.0, 1.2, 1e6, 1.2, 1.2]), "by name"
    for name in ROBUST:
        arrays, _ = rule(name).aggregate_train(1, found)
        assert arrays is not None
        assert 0.9 < float(arrays[AUDIO].numpy()[0]) < 1.3, name


def test_a_part_that_too_few_trained_this_time_stays_as_it_was() -> None:
    found = handed_over(some(aachen=1.0, chur=1e6, davos=0.0), {"aachen": (), "chur": (), "davos": STILL}, before=7.0)
    assert [audio(message) for message in found] == [[7.0, 7.0]] * 3


def test_a_part_that_too_few_declare_for_a_liar_to_be_outvoted_ends_the_run_before_it_begins() -> None:
    def begin(liars: int, **declared: tuple[str, ...]) -> None:
        config = RunConfig.from_flat({"federation.strategy": "fedmedian", "federation.byzantine": liars})
        Aggregator(rule("fedmedian"), config, declared=declared, start=Checkpoint(0, weights(), {}, {}))

    every, no_audio = ("image", "report", "audio"), ("image", "report")
    with pytest.raises(RunFailed, match="aachen, basel alone train") as refused:
        begin(1, aachen=every, basel=every, chur=no_audio)
    assert "asks for 3 hospitals" in refused.value.what
    begin(1, aachen=every, basel=every, chur=every, davos=no_audio)
    begin(1, aachen=no_audio, basel=no_audio, chur=no_audio)
    begin(0, aachen=every, basel=no_audio)
