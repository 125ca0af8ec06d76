"""Which plan a run gets, and who is in it: from epsilon, from the ledgers' rest, or from the run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmm.config import RunConfig
from fedmm.errors import ConfigError, RunFailed
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import PlanAsk
from fedmm.models.store import save_spec
from fedmm.privacy import plan as plans
from fedmm.privacy.plan import PrivacyPlan, make_plan
from fedmm.training.checkpoint import Checkpoint
from server import app
from server.app import describe, plan_with_members
from server.grid import LinkGrid
from tests import tiny
from tests.federation.scripted import LABELS, OTHER_LABELS, SPEC

TRAINING, LESS, SCORES = 1.0, 1.25, 3.0  # noise of training alone, of training beside scores, of scores


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated in no time."""

    def calibrate(*, steps: int, before: tuple[object, ...] = (), **_: object) -> float:
        return SCORES if steps == 1 else LESS if before else TRAINING

    monkeypatch.setattr(plans, "calibrate", calibrate)


def settings(**changes: Any) -> RunConfig:
    return RunConfig.from_flat({"federation.rounds": 5, "federation.min_hospitals": 2, **changes})


def hospitals(*says: dict[str, str]) -> LocalGrid:
    nodes = [{"name": f"h{i}", **said} for i, said in enumerate(says)]
    return LocalGrid("tests.federation.scripted:app", nodes)


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> list[PlanAsk]:
    """What hospitals are asked at first."""
    found: list[PlanAsk] = []
    introduce: Callable[..., Any] = app.introduce

    def watched(grid: LocalGrid, ask: PlanAsk, **rest: Any) -> Any:
        found.append(ask)
        return introduce(grid, ask, **rest)

    monkeypatch.setattr(app, "introduce", watched)
    return found


EXACT, NOISY, NO = {"metrics": "exact"}, {"metrics": "noisy"}, {"metrics": "no"}


@pytest.mark.parametrize("who", [(EXACT, EXACT), (NO, NO), (EXACT, NO)])
def test_where_nobody_gives_noisy_scores_training_has_the_whole_epsilon(who: tuple[Any, ...], tmp_path: Path) -> None:
    plan, members = plan_with_members(hospitals(*who), settings(), tmp_path, None)
    assert (plan.noise_multiplier, plan.evaluation_noise) == (TRAINING, 0.0)
    assert sorted(members.names.values()) == ["h0", "h1"]


def test_one_hospital_with_noisy_scores_takes_their_share_off_everybodys_epsilon(tmp_path: Path) -> None:
    plan, _ = plan_with_members(hospitals(EXACT, NOISY, NO), settings(), tmp_path, None)
    assert (plan.noise_multiplier, plan.evaluation_noise) == (LESS, SCORES)


def test_no_share_of_epsilon_means_no_noisy_scores(tmp_path: Path) -> None:
    config = settings(**{"privacy.evaluation_share": 0.0})
    plan, _ = plan_with_members(hospitals(NOISY, NOISY), config, tmp_path, None)
    assert (plan.noise_multiplier, plan.evaluation_noise) == (TRAINING, 0.0)


def test_labels_of_which_no_histogram_is_made_cost_no_epsilon_for_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "cells", lambda _: 0)  # a level, a value or a time alone
    plan, _ = plan_with_members(hospitals(NOISY, NOISY), settings(), tmp_path, None)
    assert (plan.noise_multiplier, plan.evaluation_noise) == (TRAINING, 0.0)


def test_an_interrupted_run_goes_on_only_with_the_labels_and_pretrained_folders_that_it_began_with(
    tmp_path: Path,
) -> None:
    spec = tiny.spec().model_copy(update={"pretrained": {"bert": "a" * 64}})
    save_spec(spec, tmp_path)
    app.check_same_model(tmp_path, spec)
    other = spec.labels.model_copy(update={"findings": ("pneumothorax",)})
    for changed in ({"labels": other}, {"pretrained": {"bert": "b" * 64}}):
        with pytest.raises(ConfigError, match="unfinished run with other"):
            app.check_same_model(tmp_path, spec.model_copy(update=changed))


def test_a_run_without_privacy_asks_for_no_noise(tmp_path: Path, asks: list[PlanAsk]) -> None:
    plan, _ = plan_with_members(hospitals(NOISY, EXACT), settings(**{"privacy.enabled": False}), tmp_path, None)
    assert (plan.private, plan.noise_multiplier, plan.evaluation_noise) == (False, 0.0, 0.0)
    assert asks[0].plan["private"] is False


def test_hospitals_are_asked_about_the_whole_run_scores_included(tmp_path: Path, asks: list[PlanAsk]) -> None:
    plan_with_members(hospitals(EXACT, NO), settings(), tmp_path, None)
    (ask,) = asks
    assert (ask.rounds, ask.plan["evaluation_noise"], ask.plan["noise_multiplier"]) == (5, SCORES, TRAINING)


def test_a_ledger_with_little_left_raises_the_noise_and_one_with_less_is_left_out(tmp_path: Path) -> None:
    grid = hospitals(EXACT, {**EXACT, "least_noise": "1.7"}, {**EXACT, "least_noise": "70.0"})
    plan, members = plan_with_members(grid, settings(), tmp_path, None)
    assert plan.noise_multiplier == 1.7
    assert sorted(members.names.values()) == ["h0", "h1"]
    assert [(f.hospital, f.code) for f in members.failures] == [("h2", 1001)]
    assert len(members.arrived) == 3, "the one that is left out has said something too"
    with pytest.raises(RunFailed, match="have budget left"):
        plan_with_members(grid, settings(**{"federation.min_hospitals": 3}), tmp_path, None)


def stored(folder: Path, plan: PrivacyPlan) -> Path:
    (folder / "config.json").write_text(json.dumps({"settings": {}, "labels": {}, "plan": plan.to_flat()}))
    return folder


def test_a_run_that_goes_on_keeps_its_plan_whatever_a_new_one_would_be(tmp_path: Path, asks: list[PlanAsk]) -> None:
    plan = make_plan(settings(), noisy_scores=True)
    plan = PrivacyPlan.from_flat(plan.to_flat() | {"noise_multiplier": 2.75})
    grid = hospitals(EXACT, {**NO, "least_noise": "70.0"})
    found, members = plan_with_members(grid, settings(), stored(tmp_path, plan), Checkpoint(3, {}, {}, {"run": "r"}))
    assert found == plan
    assert (asks[0].rounds, asks[0].plan, asks[0].run) == (2, plan.to_flat(), "r")
    assert sorted(members.names.values()) == ["h0", "h1"], "whoever has too little left refuses when it is asked"


def test_a_run_that_goes_on_needs_the_plan_that_it_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        plan_with_members(hospitals(EXACT, EXACT), settings(), tmp_path, Checkpoint(3, {}, {}, {}))


class Across(LinkGrid):
    """Hospitals of this machine, as across sites."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self._grid.send_and_receive(messages, timeout=timeout)

    def names(self) -> dict[int, str]:
        return {node: f"h{node - 2}" for node in self.get_node_ids()}


OTHER = {**EXACT, "labels": "other"}


def test_across_sites_the_federation_says_what_is_predicted_and_who_differs_is_left_out(tmp_path: Path) -> None:
    grid = Across(hospitals(OTHER, EXACT, EXACT), labels=LABELS)
    _, members = plan_with_members(grid, settings(), tmp_path, None)
    assert (sorted(members.names.values()), members.labels) == (["h1", "h2"], LABELS)
    assert [(f.hospital, f.kind) for f in members.failures] == [("h0", "invalid")]


def test_across_sites_a_run_that_goes_on_keeps_its_labels_whatever_the_federation_says_now(tmp_path: Path) -> None:
    save_spec(SPEC, tmp_path, extra={"plan": make_plan(settings()).to_flat(), "settings": {}})
    grid = Across(hospitals(OTHER, EXACT, EXACT), labels=OTHER_LABELS)
    _, members = plan_with_members(grid, settings(), tmp_path, Checkpoint(3, {}, {}, {"run": "r"}))
    assert (sorted(members.names.values()), members.labels) == (["h1", "h2"], LABELS)


def test_on_one_machine_hospitals_with_different_labels_are_told_who_differs(tmp_path: Path) -> None:
    _, members = plan_with_members(hospitals(OTHER, EXACT), settings(), tmp_path, None)
    with pytest.raises(RunFailed, match="h0 and h1 predict different labels"):
        _ = members.labels


def test_the_run_folder_says_what_hospitals_said_first(tmp_path: Path) -> None:
    config = settings()
    grid = hospitals(EXACT, NOISY, {"script": '{"hello": "refuse"}'})
    plan, members = plan_with_members(grid, config, tmp_path, None)
    content = json.loads(json.dumps(describe(config, plan, members, run="r")))
    assert PrivacyPlan.from_flat(content["plan"]) == plan
    assert content["hospitals"] == ["h0", "h1"]
    assert [(a["hospital"], a["what"]) for a in content["arrived"]] == [
        ("h0", "hello"),
        ("h1", "hello"),
        ("node 4", "refusal 1001"),
    ]
    assert [a["bytes"] for a in content["arrived"]] == [a.bytes for a in members.arrived]
    assert members.labels == LABELS
