"""One round, one charge: kill -9 anywhere, the same ask again, and the answer is there once, paid once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord

import client.outbox
from client.outbox import Made, Outbox, Question, closing
from client.site import Site
from fedmm.config import load_site
from fedmm.errors import LedgerUnusable, PolicyRefused
from fedmm.federation.messages import ScoreReply, array_record, decode, digest_of
from fedmm.privacy import ledger as ledger_module
from fedmm.privacy.ledger import Ledger
from tests.client.dying import POINTS, Clients, asked, clients
from tests.client.test_client import PLAN, hospital
from tests.client.test_gate import set_policy
from tests.e2e.conftest import write_hospital

__all__ = ["hospital"]
BUSY, POLICY = 1012, 1002


@pytest.fixture(scope="module")
def mortals() -> Iterator[Clients]:
    with clients() as found:
        yield found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arrays(reply: Any) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.content.array_records["arrays"].items()}


def books(folder: Path) -> tuple[list[tuple[str, int, str]], int, float]:
    """Charges, messages that left under one, epsilon."""
    with Ledger.open(folder, load_site(folder)) as ledger:
        ledger.verify()
        events = [(str(e["kind"]), int(e["round"]), str(e["state"])) for e in ledger.events()]
        return events, sum(bool(sent.charge) for sent in ledger.sent()), ledger.epsilon()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def status(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ".fedmm" / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"phase": ""}


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_a_training_killed_anywhere_is_charged_once_and_answers_as_if_it_never_was(
    tmp_path: Path, mortals: Clients, point: str
) -> None:
    calm, killed = (write_hospital(tmp_path / name / "north") for name in ("calm", "killed"))
    expected = arrays(asked(calm))
    assert mortals.wait(mortals.start(killed, point=point)) == -signal.SIGKILL
    assert arrays(asked(killed)) == expected
    events, left, epsilon = books(killed)
    assert events == [("train", 1, "settled")]
    assert left == 1 + (point == "after sent")
    assert epsilon == books(calm)[2]


@pytest.mark.parametrize("point", [p for p in POINTS if p != "in training"])
def test_scores_of_a_killed_evaluation_are_charged_once(tmp_path: Path, mortals: Clients, point: str) -> None:
    calm, killed = (write_hospital(tmp_path / name / "north") for name in ("calm", "killed"))
    for folder in (calm, killed):
        set_policy(folder, metrics="noisy")
    assert mortals.wait(mortals.start(killed, point=point, kind="evaluate")) == -signal.SIGKILL
    one, other = (decode(asked(folder, kind="evaluate").content, ScoreReply) for folder in (calm, killed))
    assert one.histogram == other.histogram
    assert books(killed)[0] == [("evaluate", 1, "settled")]
    assert other.epsilon == one.epsilon


def test_a_count_whose_buyer_was_killed_is_bought_once(tmp_path: Path, mortals: Clients) -> None:
    folder = write_hospital(tmp_path / "north")
    set_policy(folder, counts="noisy")
    assert mortals.wait(mortals.start(folder, point="after reserve")) == -signal.SIGKILL
    assert books(folder)[0] == [("count", 1, "reserved")]
    assert asked(folder).has_content()
    assert books(folder)[0] == [("count", 1, "settled"), ("train", 1, "settled")]


def test_attempts_under_one_charge_are_numbered_and_end(hospital: Path, mortals: Clients, monkeypatch: Any) -> None:
    """That an attempt ended, and when, can be seen: it must not be free for ever."""
    assert mortals.wait(mortals.start(hospital, point="in training")) == -signal.SIGKILL
    assert mortals.wait(mortals.start(hospital, point="in training")) == -signal.SIGKILL
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        assert [charge.attempts for charge in ledger.charges_of("run1")] == [2]
    monkeypatch.setattr(ledger_module, "MOST_ATTEMPTS", 2)
    assert asked(hospital).has_content()
    assert books(hospital)[0] == [("train", 1, "reserved"), ("train", 1, "settled")]


# --- an orphan and its successor ----------------------------------------------------------------------------------------


def journal(folder: Path) -> list[str]:
    file = folder / "journal"
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []


@pytest.mark.parametrize("orphan", ["ends", "is killed"])
def test_an_orphan_and_its_successor_never_train_at_once(
    hospital: Path, tmp_path: Path, mortals: Clients, orphan: str
) -> None:
    go = tmp_path / "go"
    first = mortals.start(hospital, go=str(go))
    until(lambda: journal(hospital) == [f"begin {first}"])
    second = mortals.start(hospital, go=str(go))
    until(lambda: status(hospital)["phase"] == "waiting")
    assert journal(hospital) == [f"begin {first}"]
    if orphan == "is killed":
        os.kill(first, signal.SIGKILL)
    go.touch()
    assert mortals.wait(first) == (-signal.SIGKILL if orphan == "is killed" else 0)
    assert mortals.wait(second) == 0
    trained = {
        "ends": [f"begin {first}", f"end {first}"],
        "is killed": [f"begin {first}", f"begin {second}", f"end {second}"],
    }
    assert journal(hospital) == trained[orphan]
    events, left, _ = books(hospital)
    assert events == [("train", 1, "settled")]
    assert left == {"ends": 2, "is killed": 1}[orphan]


def test_runs_queue_and_one_that_waits_too_long_is_refused_without_a_charge(
    hospital: Path, tmp_path: Path, mortals: Clients
) -> None:
    go = tmp_path / "go"
    first = mortals.start(hospital, go=str(go))
    until(lambda: journal(hospital) == [f"begin {first}"])
    late = asked(hospital, run="run2", federation__round_timeout=0.3)
    assert (late.error.code, status(hospital)["code"]) == (BUSY, BUSY)
    queued = mortals.start(hospital, run="run3")
    until(lambda: status(hospital)["phase"] == "waiting")
    go.touch()
    assert [mortals.wait(first), mortals.wait(queued)] == [0, 0]
    assert len(books(hospital)[0]) == 2


def test_two_runs_may_train_at_once_where_the_hospital_says_so(
    hospital: Path, tmp_path: Path, mortals: Clients
) -> None:
    with (hospital / "site.toml").open("a", encoding="utf-8") as file:
        file.write("\n[limits]\ntrainings = 64\n")
    go = tmp_path / "go"
    first = mortals.start(hospital, go=str(go))
    until(lambda: journal(hospital) == [f"begin {first}"])
    assert asked(hospital, run="run2").has_content()
    assert journal(hospital) == [f"begin {first}"]
    go.touch()
    assert mortals.wait(first) == 0


# --- the same question, another one, an old one -------------------------------------------------------------------------


def test_the_same_question_gets_the_same_bytes_at_no_cost_wherever_folders_lie(hospital: Path) -> None:
    one, two = asked(hospital), asked(hospital, federation__out="/elsewhere", data__hospitals="/elsewhere")
    assert arrays(one) == arrays(two)
    assert books(hospital)[:2] == ([("train", 1, "settled")], 2)


@pytest.mark.parametrize("change", [{"training__learning_rate": 0.2}, {"federation__seed": 2}], ids=str)
def test_another_question_in_an_answered_round_is_refused(hospital: Path, change: dict[str, Any]) -> None:
    assert asked(hospital).has_content()
    reply = asked(hospital, **change)
    assert (reply.error.code, "to another question" in reply.error.reason) == (POLICY, True)
    assert books(hospital)[:2] == ([("train", 1, "settled")], 1)


def test_rounds_of_a_run_only_go_up(hospital: Path) -> None:
    assert asked(hospital, round=2).has_content()
    reply = asked(hospital, round=1)
    assert (reply.error.code, "a later one of this run was answered" in reply.error.reason) == (POLICY, True)
    assert asked(hospital, round=1, run="run2").has_content()
    assert [state for *_, state in books(hospital)[0]] == ["settled"] * 2


@pytest.mark.parametrize("how", ["removed", "changed", "damaged"])
def test_an_answer_that_is_not_what_was_paid_for_is_not_given_again(hospital: Path, how: str) -> None:
    assert asked(hospital).has_content()
    (file,) = (hospital / ".fedmm" / "outbox").iterdir()
    if how == "removed":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1 if how == "changed" else 0] ^= 1
        file.write_bytes(content)
    reply = asked(hospital)
    assert (reply.error.code, "not given again" in reply.error.reason) == (POLICY, True)
    assert books(hospital)[:2] == ([("train", 1, "settled")], 1)


def test_an_answer_is_sent_so_often_and_not_for_ever(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.outbox, "MOST_SENT", 2)
    assert [asked(hospital).has_content() for _ in range(3)] == [True, True, False]


def test_a_charge_under_which_an_error_was_answered_is_not_tried_again(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says something about the noisy result: asked for again and again it would tell more than was paid for."""
    with monkeypatch.context() as patch:
        patch.setattr("client.app.all_finite", lambda _: False)
        assert asked(hospital).error.code == POLICY
    reply = asked(hospital)
    assert (reply.error.code, "not given again" in reply.error.reason) == (POLICY, True)
    assert books(hospital)[:2] == ([("train", 1, "settled")], 0)


def test_a_charge_that_cannot_be_closed_does_not_hide_the_error(hospital: Path) -> None:
    site = Site(hospital, load_site(hospital))
    charge = site.ledger.reserve(PLAN.round_event(1), run="r", round=1)
    site.ledger._close_charge(charge.seq, "settle")
    with pytest.raises(PolicyRefused), closing(charge, Question("train", "r", 1, "")):
        raise PolicyRefused("diverged")
    site.close()


# --- what is kept -------------------------------------------------------------------------------------------------------


def fill(site: Site, count: int, *, runs: int = 1) -> Outbox:
    outbox = Outbox(site)
    for number in range(1, count + 1):
        run = f"run{number % runs}"
        charge = site.ledger.reserve(PLAN.round_event(1), run=run, round=number)
        outbox.put(charge, Question("train", run, number, "q"), Made(array_record({"w": torch.ones(3) * number})))
    return outbox


def kept(site: Site) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (site.state / "outbox").iterdir())


def test_only_what_can_still_be_asked_for_is_kept_and_nobody_else_reads_it(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(hospital, load_site(hospital))
    (site.state / "outbox").mkdir(parents=True)
    (site.state / "outbox" / "notes.txt").touch()
    outbox = fill(site, 3)
    charge = site.ledger.reserve(PLAN.round_event(1), run="run0", round=3)
    for path in list((site.state / "outbox").glob("*-3-*")):
        path.with_name(path.name + ".new").write_bytes(b"half")  # a process was killed as it wrote
    outbox.put(charge, Question("evaluate", "run0", 3, "q"), Made((1.0, 2.0)))
    assert kept(site) == ["", "evaluate-3-5.json", "train-2-3.safetensors", "train-3-4.safetensors"]
    for path in (site.state / "outbox").glob("*-*"):
        assert path.stat().st_mode & 0o077 == 0
    release = outbox.left_by(charge, Question("evaluate", "run0", 3, "q"))
    assert release is not None
    assert digest_of(release) == digest_of((1.0, 2.0))
    assert outbox.left_by(charge, Question("evaluate", "run0", 3, "another")) is None
    monkeypatch.setattr(client.outbox, "MOST_RUNS", 2)
    fill(site, 6, runs=6)
    assert len(kept(site)) == 3
    monkeypatch.setattr(client.outbox, "MOST_BYTES", 1)
    fill(site, 1)
    assert len(kept(site)) == 2, "the new one stays"
    site.close()


def test_a_disk_that_takes_no_answer_refuses_and_the_charge_waits(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = client.outbox.vault.write_private

    def full(file: Path, content: bytes) -> None:
        if file.parent.name == "outbox":
            raise OSError(28, "No space left on device")
        honest(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(client.outbox.vault, "write_private", full)
        assert asked(hospital).error.code == LedgerUnusable.code
    assert books(hospital)[0] == [("train", 1, "reserved")]
    assert asked(hospital).has_content()
    assert books(hospital)[0] == [("train", 1, "settled")]


def test_a_release_is_read_as_it_was_written() -> None:
    made = array_record({"w": torch.tensor([[1.0, -0.0], [3e-39, 2.0]]), "v": torch.tensor(2.0)})
    assert isinstance(made, ArrayRecord)
    assert digest_of(array_record({n: torch.from_numpy(made[n].numpy().copy()) for n in made})) == digest_of(made)
