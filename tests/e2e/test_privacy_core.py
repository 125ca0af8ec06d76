"""The hospital decides, seen from the command line: what left, what a ledger has room for, keys, cohorts, records."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto

import client.gate
from fedmm.federation.local import LocalGrid
from fedmm.report.record import read_config, read_rounds
from tests.e2e.conftest import fedmm, policy, set_flags, simulate, write_hospital


def spent(hospital: Path) -> float:
    """By dp-accounting alone, over the exported events."""
    exported = fedmm("ledger", "export", hospital).json
    accountant = PLDAccountant()
    for e in exported["events"]:
        step = PoissonSampledDpEvent(e["sampling_rate"], GaussianDpEvent(e["noise_multiplier"]))
        accountant.compose(SelfComposedDpEvent(step, e["steps"]))
    return float(accountant.get_epsilon(exported["delta"]))


def shown(hospital: Path) -> Any:
    return fedmm("ledger", "show", hospital, "--format", "json").json


def set_policy(hospitals: Path, **changes: str) -> None:
    for hospital in hospitals.iterdir():
        (hospital / "site.toml").write_text(policy(hospital.name, research=False, **changes), encoding="utf-8")


# --- what left --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_what_left_is_the_same_in_ledgers_run_folder_and_on_the_grid(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Counted three times: by each hospital before it leaves, by the coordinator, and here, on the wire."""
    set_policy(hospitals, metrics='"noisy"', counts='"noisy"')
    (hospitals / "south" / "site.toml").write_text(
        policy("south", research=False), encoding="utf-8"
    )  # refuses the count
    crossed: Counter[tuple[int, int]] = Counter()
    honest = LocalGrid.send_and_receive

    def listening(grid: LocalGrid, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(honest(grid, messages, timeout=timeout))
        for reply in replies:
            size = len((reply.error.reason or "").encode()) if reply.has_error() else 0
            size = size or len(recorddict_to_proto(reply.content).SerializeToString())
            crossed[reply.metadata.src_node_id, size] += 1
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", listening)
    flags = set_flags(federation__weights="noisy")
    ran = fedmm("simulate", hospitals, "--out", tmp_path / "run", "--workers", workers, *flags)
    assert ran.code == 0, ran.said
    run = [*read_config(tmp_path / "run")["arrived"], *(a for r in read_rounds(tmp_path / "run") for a in r["arrived"])]
    for node, name in enumerate(sorted(h.name for h in hospitals.iterdir()), start=2):
        listed = Counter((a["what"], a["bytes"]) for a in run if a["hospital"] == name)
        sent = Counter((s["what"], s["bytes"]) for s in fedmm("ledger", "export", hospitals / name).json["sent"])
        wire = Counter({size: n for (source, size), n in crossed.items() if source == node})
        sizes: Counter[int] = Counter()
        for (_, size), n in listed.items():
            sizes[size] += n
        assert sizes == wire
        assert set(sent) == set(listed)  # a refusal in the same words is one row
        charged = {what for what, _ in listed} - {"hello", "refusal 1002"}
        assert charged == ({"weights", "score histogram"} if name != "south" else set())
    assert sum(r["bytes_up"] for r in read_rounds(tmp_path / "run")) == sum(
        a["bytes"] for r in read_rounds(tmp_path / "run") for a in r["arrived"]
    )


def test_noisy_scores_are_charged_once_and_the_run_keeps_its_epsilon(hospitals: Path, tmp_path: Path) -> None:
    set_policy(hospitals, metrics='"noisy"')
    assert simulate(hospitals, tmp_path / "run", federation__evaluate_every=1).code == 0
    for hospital in hospitals.iterdir():
        kinds = [event["kind"] for event in fedmm("ledger", "export", hospital).json["events"]]
        assert kinds == ["train", "train", "evaluate"]
        assert spent(hospital) == pytest.approx(shown(hospital)["epsilon"], abs=1e-6)
        assert 3.9 < spent(hospital) <= 4.0
    first, last = read_rounds(tmp_path / "run")
    assert (first["evaluated"], first["scores"]) == (True, {})
    assert set(last["scores"]) == {"north", "middle", "south"}
    assert all(score["noisy"] and "studies" not in score for score in [*last["scores"].values(), last["pooled"]])
    assert last["epsilon"]["north"]["spent"] == pytest.approx(spent(hospitals / "north"), abs=1e-6)
    assert shown(hospitals / "north")["not_private"] == 0


# --- what a ledger has room for ---------------------------------------------------------------------------------------


def test_a_run_is_planned_for_what_the_fullest_ledger_has_left(hospitals: Path, tmp_path: Path) -> None:
    assert simulate(hospitals, tmp_path / "one").code == 0
    before = shown(hospitals / "middle")["epsilon"]
    ceiling = before + 1.0
    (hospitals / "middle" / "site.toml").write_text(
        policy("middle", epsilon=f"{ceiling}", metrics='"no"'), encoding="utf-8"
    )
    ran = simulate(hospitals, tmp_path / "two")
    assert ran.code == 0
    assert "the ledger of middle has no room for less" in ran.out
    assert all(r["trained"] == ["middle", "north", "south"] for r in read_rounds(tmp_path / "two"))
    plans = [read_config(tmp_path / run)["plan"]["noise_multiplier"] for run in ("one", "two")]
    assert plans[1] > plans[0]
    assert ceiling - 0.01 < spent(hospitals / "middle") <= ceiling


def test_a_run_that_goes_on_keeps_its_plan(hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.app

    append, stop = server.app.append_round, [True]

    def stop_after_round_1(folder: Path, record: Any) -> None:
        append(folder, record)
        if stop.pop() if stop else False:
            raise KeyboardInterrupt

    monkeypatch.setattr(server.app, "append_round", stop_after_round_1)
    assert simulate(hospitals, tmp_path / "run").code == 130
    plan = read_config(tmp_path / "run")["plan"]
    assert simulate(hospitals, tmp_path / "run").code == 0
    assert read_config(tmp_path / "run")["plan"] == plan
    noises = {e["noise_multiplier"] for e in fedmm("ledger", "export", hospitals / "north").json["events"]}
    assert noises == {plan["noise_multiplier"]}
    arrived = [a["what"] for a in read_config(tmp_path / "run")["arrived"] if a["hospital"] == "north"]
    assert arrived == ["hello", "hello"]


# --- keys and cohorts -------------------------------------------------------------------------------------------------


def test_a_rotated_key_breaks_neither_the_chain_nor_the_next_run(hospitals: Path, tmp_path: Path) -> None:
    assert simulate(hospitals, tmp_path / "one").code == 0
    north = hospitals / "north"
    old, before = (north / "ledger.key").read_bytes(), shown(north)
    ran = fedmm("ledger", "rotate", north, "--format", "json")
    assert ran.code == 0
    assert (north / "ledger.key").read_bytes() != old
    assert shown(north)["public_key"] == ran.json["public_key"] != before["public_key"]
    assert shown(north)["epsilon"] == before["epsilon"]
    assert simulate(hospitals, tmp_path / "two").code == 0
    for run in ("one", "two"):
        assert fedmm("ledger", "verify", north, "--against", tmp_path / run).code == 0
    assert read_rounds(tmp_path / "two")[0]["epsilon"]["north"]["ledger_key"] == ran.json["public_key"]
    (north / "ledger.key").write_bytes(old)
    assert fedmm("ledger", "verify", north).code == 1


def test_rotating_a_ledger_that_was_never_used_makes_none(hospitals: Path) -> None:
    assert fedmm("ledger", "rotate", hospitals / "north").code == 3
    assert not (hospitals / "north" / "ledger.sqlite").exists()


def test_a_ledger_is_split_off_for_other_patients_only(hospitals: Path, tmp_path: Path) -> None:
    assert simulate(hospitals, tmp_path / "run").code == 0
    north = hospitals / "north"
    new = write_hospital(tmp_path / "later" / "north_2027", patients=3)
    same = fedmm("ledger", "split", north, new)
    assert same.code == 3
    assert "a patient of the new folder is under this ledger" in same.err
    assert not (new / "ledger.sqlite").exists()
    manifest = new / "manifest.csv"
    text = manifest.read_text(encoding="utf-8").replace("mrn7731", "later").replace("acc5512", "later")
    manifest.write_text(text, encoding="utf-8")
    ran = fedmm("ledger", "split", north, new)
    assert ran.code == 0, ran.said
    for hospital in (north, new):
        assert fedmm("ledger", "verify", hospital).code == 0
        assert b"mrn7731" not in (hospital / "ledger.patients").read_bytes()
        assert (hospital / "ledger.patients").stat().st_mode & 0o077 == 0
    assert (shown(new)["epsilon"], shown(new)["releases"]) == (0, 0)
    assert simulate(new.parent, tmp_path / "run2").code == 0
    # a patient of the old folder in the new one, and the other way round
    for here, there in ((new, north), (north, new)):
        kept = (here / "manifest.csv").read_text(encoding="utf-8")
        shutil.copytree(
            there, here, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ledger*", "site.toml", "manifest*")
        )
        rows = (there / "manifest.csv").read_text(encoding="utf-8").splitlines()[1:]
        (here / "manifest.csv").write_text(kept + "\n".join(rows) + "\n", encoding="utf-8")
        before = shown(here)["epsilon"]
        client.gate._explain_once.cache_clear()
        ran = simulate(here, tmp_path / f"again_{here.name}")
        assert ran.code == 4
        assert "a patient here is under another ledger" in ran.log
        assert "under another ledger" not in ran.out + ran.err, "outside it is a folder that fails its check"
        assert shown(here)["epsilon"] == before
        (here / "manifest.csv").write_text(kept, encoding="utf-8")


def test_no_ledger_is_split_off_into_a_folder_that_has_one_and_lost_its_list(hospitals: Path, tmp_path: Path) -> None:
    """Whom the other ledger has covered is not known from its manifest alone."""
    assert simulate(hospitals, tmp_path / "run").code == 0
    (hospitals / "south" / "ledger.patients").unlink()
    ran = fedmm("ledger", "split", hospitals / "north", hospitals / "south")
    assert (ran.code, "no list of the patients under it" in ran.err) == (3, True)
    assert not (hospitals / "south" / "ledger.patients").exists()


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_run_that_hides_records_says_so_and_is_charged_for_patients(hospitals: Path, tmp_path: Path) -> None:
    flags = {"privacy__unit": "record", "training__max_studies": 2, "privacy__epsilon": 1}
    refused = simulate(hospitals, tmp_path / "refused", **flags)
    assert refused.code == 4
    assert refused.err.count("unit 'record' is not accepted") == 3
    for hospital in hospitals.iterdir():
        text = (hospital / "site.toml").read_text(encoding="utf-8")
        (hospital / "site.toml").write_text(
            text.replace("[privacy]", "[privacy]\nallow_record_unit = true"), encoding="utf-8"
        )
    ran = simulate(hospitals, tmp_path / "run", **flags)
    assert ran.code == 0, ran.said
    assert "RECORD LEVEL" in ran.out
    assert "RECORD LEVEL" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").upper()
    plan = read_config(tmp_path / "run")["plan"]
    event = fedmm("ledger", "export", hospitals / "north").json["events"][0]
    assert event["noise_multiplier"] == plan["noise_multiplier"] / 2
    assert event["sampling_rate"] == pytest.approx(1 - (1 - plan["sampling_rate"]) ** 2)
    assert spent(hospitals / "north") > 1.5
    assert shown(hospitals / "north")["unit"] == "patient"
