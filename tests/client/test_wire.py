"""A hospital's update in fewer bytes: the same one again when it is asked again, and nothing of it twice or lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType

from client.outbox import Made, Outbox, Question
from client.site import Site
from fedmm.config import load_site
from fedmm.federation.local import LocalGrid
from fedmm.federation.messages import ARRAYS, FitReply, array_record, decode, digest_of, encode, size_bytes, views
from fedmm.federation.wire import in_line, received
from fedmm.privacy.ledger import Ledger
from tests.client.test_client import PLAN, hospital, train_ask, weights
from tests.e2e.conftest import policy, write_hospital

__all__ = ["hospital"]
APP = "tests.fixed_noise:app"  # so that two codings are of one update
SENT = array_record(weights())


def trained(folder: Path, wire: str, *, round: int = 1, **settings: Any) -> Message:
    grid = LocalGrid(APP, [{"site": str(folder)}])
    content = encode(train_ask(round=round, federation__wire=wire, **settings), arrays=SENT)
    (reply,) = grid.send_and_receive([Message(content, 2, MessageType.TRAIN)])
    assert reply.has_content(), reply.error.reason
    return reply


def change(reply: Message, wire: str) -> np.ndarray:
    """(P,), as the coordinator decodes it."""
    return in_line(views(received(reply.content, SENT, views(SENT), (), wire)), views(SENT), ())


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    """A hospital with the same patients and noise."""
    return write_hospital(tmp_path / "exact" / "north")


@pytest.mark.parametrize(("wire", "bytes_of", "off"), [("fp16", 2, 1e-3), ("int8", 1, 0.02), ("topk", 0.06, 1.0)])
def test_the_update_that_leaves_is_the_noisy_one_rounded_and_the_ledger_pays_the_same(
    hospital: Path, exact: Path, wire: str, bytes_of: float, off: float
) -> None:
    whole, short = trained(exact, "fp32"), trained(hospital, wire)
    want, got = change(whole, "fp32"), change(short, wire)
    assert 0 < np.linalg.norm(got - want) < off * np.linalg.norm(want)
    said = decode(short.content, FitReply)
    assert said.epsilon == decode(whole.content, FitReply).epsilon
    assert said.release == digest_of(short.content.array_records[ARRAYS])
    assert size_bytes(short) < bytes_of * want.size + 3000
    with Ledger.open(hospital, load_site(hospital)) as ledger:
        ledger.verify()
        assert [(e["kind"], e["state"]) for e in ledger.events()] == [("train", "settled")]
        assert [row.bytes for row in ledger.sent() if row.charge] == [size_bytes(short)]


@pytest.mark.parametrize("wire", ["int8", "topk"])
def test_asked_again_a_hospital_sends_the_same_bytes_though_its_rounding_is_chance(hospital: Path, wire: str) -> None:
    first, again = (trained(hospital, wire).content.array_records[ARRAYS] for _ in range(2))
    assert {name: array.data for name, array in first.items()} == {name: array.data for name, array in again.items()}
    assert len(first) == (3 if wire == "topk" else 2)


@pytest.mark.parametrize("wire", ["fp16", "int8", "topk"])
def test_parts_of_a_modality_that_is_not_declared_do_not_leave(hospital: Path, wire: str) -> None:
    count = change(trained(hospital, "fp32"), "fp32").size
    (hospital / "site.toml").write_text(policy("north") + 'modalities = ["image", "report"]\n', encoding="utf-8")
    audio = sum(
        value.numel() for name, value in weights().items() if name.startswith(("encoders.audio.", "norms.audio."))
    )
    reply = trained(hospital, wire, round=2)
    sent = -(-(count - audio) // 100) if wire == "topk" else count - audio
    assert reply.content.array_records[ARRAYS]["codes"].shape == (sent,)


@pytest.mark.parametrize("wire", ["int8", "topk"])
def test_an_update_at_its_bound_passes_the_gate_in_any_coding(hospital: Path, wire: str) -> None:
    got = change(trained(hospital, wire, training__max_update_norm=0.5), wire)
    assert np.linalg.norm(got.astype("f8")) <= 0.5 * (1 + 1e-4)


# --- what topk leaves out ---------------------------------------------------------------------------------------------


def test_what_a_round_left_out_is_in_the_next_ones_update(hospital: Path, exact: Path) -> None:
    for number in (1, 2):
        whole, short = trained(exact, "fp32", round=number), trained(hospital, "topk", round=number)
    site = Site(hospital, load_site(hospital))
    left = {n: Outbox(site).carried(Question("train", "run1", n + 1, ""), change(whole, "fp32").size) for n in (1, 2)}
    site.close()
    assert np.linalg.norm(left[1]) > 0
    np.testing.assert_allclose(change(short, "topk") + left[2], change(whole, "fp32") + left[1], atol=1e-5)


def kept_round(site: Site, number: int, value: float, *, settle: bool = True) -> None:
    charge = site.ledger.reserve(PLAN.round_event(1), run="r", round=number)
    release = array_record({"codes": torch.ones(1)})
    Outbox(site).put(charge, Question("train", "r", number, "q"), Made(release, np.full(3, value, "f4")))
    if settle:
        charge.settle(sha256=digest_of(release), question="q")


def test_only_what_an_answer_left_out_counts_and_each_once(hospital: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = Site(hospital, load_site(hospital))

    def carried(number: int, *, count: int = 3) -> list[float]:
        return Outbox(site).carried(Question("train", "r", number, ""), count).tolist()

    assert carried(1) == [0.0] * 3
    kept_round(site, 1, 1.0)
    kept_round(
        site, 2, 2.0, settle=False
    )  # killed before it was settled, and never asked again: that update never left
    assert carried(1) == [0.0] * 3, "the same round again begins as it did"
    assert carried(2) == carried(3) == [1.0] * 3
    charge = site.ledger.reserve(PLAN.round_event(1), run="r", round=3)
    charge.settle(question="q")  # an error was answered
    assert carried(4) == [1.0] * 3
    kept_round(site, 4, 4.0)
    assert carried(5) == [4.0] * 3
    assert Outbox(site).carried(Question("train", "another", 5, ""), 3).tolist() == [0.0] * 3
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "fedmm.client"):
        assert carried(5, count=4) == [0.0] * 4, "other modalities are declared by now"
        for path in (site.state / "outbox").glob("*-4-*"):
            path.unlink()
        assert carried(5) == [0.0] * 3, "not what an earlier round left out: that is in round 4's update"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    site.close()


def test_what_is_left_out_never_leaves(hospital: Path) -> None:
    first = trained(hospital, "topk").content.array_records[ARRAYS]
    again = trained(hospital, "topk").content.array_records[ARRAYS]
    assert sorted(first) == sorted(again) == ["codes", "index", "scales"]
    (file,) = (hospital / ".fedmm" / "outbox").iterdir()
    assert file.stat().st_size > 4 * change(trained(hospital, "topk"), "topk").size, "it is there"
