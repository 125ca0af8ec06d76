"""`fedmm evaluate` as a clinician and a researcher read it, and what of it never leaves in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmm.cli_scores import collapsed, lines
from fedmm.report.record import read_rounds
from fedmm.schema import SUBSETS
from fedmm.training.home import score_at_home
from tests.e2e.conftest import Finished, fedmm, simulate
from tests.training.cohorts import LABELS, predictions


@pytest.fixture(scope="module")
def both(finished: Finished) -> dict[str, object]:
    ran = fedmm("evaluate", finished.run, finished.one, finished.two, "--split", "all", "--format", "json")
    assert ran.code == 0, ran.said
    return ran.json


def test_every_subset_has_its_scores_and_its_interval(both: dict[str, dict[str, dict[str, float]]]) -> None:
    assert set(both["by_subset"]) == set(both["intervals"]["by_subset"]) == set(SUBSETS)
    assert both["by_subset"]["image"]["studies"] > both["by_subset"]["image+report+audio"]["studies"] > 0
    low, high = both["intervals"]["mean_auroc"]
    assert low <= both["mean_auroc"] <= high


def test_hospitals_scored_together_are_groups_with_their_own_numbers(
    finished: Finished, both: dict[str, dict[str, dict[str, dict[str, float]]]]
) -> None:
    groups = both["by_group"]["hospital"]
    one = fedmm("evaluate", finished.run, finished.one, "--split", "all", "--intervals", "0", "--format", "json").json
    assert "hospital" not in one.get("by_group", {})
    part = groups["hospital_1"]
    assert {key: one[key] for key in part} == part


def test_no_draws_no_intervals_and_nothing_else_changes(finished: Finished, both: dict[str, object]) -> None:
    ran = fedmm("evaluate", finished.run, finished.one, finished.two, "--split", "all", "--intervals", "0",
                "--format", "json")  # fmt: skip
    assert ran.json == {key: value for key, value in both.items() if key != "intervals"}


@pytest.mark.parametrize("draws", ["-1", "many", "1000000"])
def test_an_absurd_number_of_draws_is_wrong_use(finished: Finished, draws: str) -> None:
    assert fedmm("evaluate", finished.run, finished.one, "--intervals", draws).code == 2


def test_the_text_has_a_row_for_each_output_subset_and_group(finished: Finished, both: dict[str, object]) -> None:
    said = fedmm("evaluate", finished.run, finished.one, finished.two, "--split", "all").out
    rows = [line.split("  ")[1].strip() for line in said.splitlines() if line.startswith("  ")]
    assert set(rows) >= {*SUBSETS, "effusion", "severity=mild", "all but image", "hospital_1", "hospital_2"}
    assert "None" not in said
    assert max(len(line) for line in said.splitlines() if line.startswith("  ")) <= 132


def test_a_collapsed_model_is_said_in_one_plain_sentence() -> None:
    p = predictions([1] * 50, skill=0.6)
    assert collapsed(score_at_home(p, LABELS, draws=0)) == []
    p.probability_BO[:] = [0.9, 0.1, 0.2, 0.7, 0.1]
    warned = [line for line in lines(score_at_home(p, LABELS, draws=0), split="test") if line.startswith("Warning: ")]
    assert len(warned) == 3
    assert any("c gets the answer 'y' in 100% of the studies" in line for line in warned)


def test_exact_scores_of_a_run_have_no_group_and_no_interval_and_evaluate_at_home_has(
    hospitals: Path, tmp_path: Path
) -> None:
    """`north` writes down sex: its own people see it, and of six patients only that they are six."""
    manifest = hospitals / "north" / "manifest.csv"
    head, *rows = manifest.read_text(encoding="utf-8").splitlines()
    manifest.write_text("\n".join([f"{head},sex", *(f"{row},F" for row in rows)]) + "\n", encoding="utf-8")
    assert simulate(hospitals, tmp_path / "run").code == 0
    sent = read_rounds(tmp_path / "run")[-1]["scores"]["north"]
    assert sent["studies"] > 0
    assert not {"by_group", "intervals"} & set(sent)
    home = fedmm("evaluate", tmp_path / "run", hospitals / "north", "--split", "all", "--format", "json").json
    assert home["by_group"]["sex"] == {"F": {"patients": 6, "too_few": True}}
