"""A run's status: what people see while it runs, what is kept of it, and that nothing depends on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedmm.config import RunConfig
from fedmm.errors import REFUSALS, UNEXPECTED_CODE, ConfigError, RunFailed
from fedmm.federation.checks import Arrival, Failure, Heard
from fedmm.federation.local import LocalGrid
from fedmm.federation.members import introduce
from fedmm.federation.messages import PlanAsk
from fedmm.federation.rounds import run_rounds
from fedmm.federation.strategies import make_strategy
from fedmm.privacy.plan import make_plan
from fedmm.report.status import STATUS_FILE, StatusFile, describe_status, page_of, read_status, status_json
from fedmm.training.checkpoint import Checkpoint
from tests.federation.scripted import REFUSAL, RUN, SPEC, weights

ROOT = Path(__file__).resolve().parents[2]
APP = "tests.federation.scripted:app"
NAMES = ("aachen", "basel", "chur")  # nodes 2, 3, 4


@pytest.fixture(autouse=True)
def _coordinator() -> None:
    """Flower makes messages only where somebody is somebody."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Clock:
    """A second passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Seen(StatusFile):
    """Keeps what the file said after each write."""

    def __init__(self, folder: Path, *, rounds: int) -> None:
        self.said: list[dict[str, Any]] = []
        super().__init__(folder, rounds=rounds, clock=Clock())

    def _write(self) -> None:
        super()._write()
        self.said.append(status_json(self._folder))


class OneByOne(LocalGrid):
    """A grid that gives each reply when it is there; nobody hears what `deaf` nodes say; `away` are not connected."""

    deaf: tuple[int, ...] = ()
    away: tuple[int, ...] = ()

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message in messages:
            for reply in super().send_and_receive([message], timeout=timeout):
                if reply.metadata.src_node_id not in self.deaf:
                    yield reply


def run(folder: Path, *, deaf: tuple[int, ...] = (), away: tuple[int, ...] = (), **scripts: dict[str, str]) -> Seen:
    """Two rounds. scripts: name to what it does when."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    config = RunConfig.from_flat(
        {
            "privacy.enabled": False,
            "federation.rounds": 2,
            "federation.strategy": "fedavg",
            "federation.min_hospitals": 1,
        }
    )
    nodes = [{"name": name, "script": json.dumps(scripts.get(name, {}))} for name in NAMES]
    with Seen(folder, rounds=2) as watch, OneByOne(APP, nodes) as grid:
        members = introduce(grid, PlanAsk(plan={}, rounds=2), at_least=1, wait=5.0)
        watch.joined(members, run=RUN, round=0)
        grid.deaf, grid.away = deaf, away
        made = run_rounds(
            grid, make_strategy(config.federation), run=RUN, config=config, spec=SPEC, plan=make_plan(config),
            members=members, start=Checkpoint(0, weights(), {}, {}), save=lambda _: None, watch=watch,
        )  # fmt: skip
        list(made)
    return watch


def test_the_phases_of_a_run_are_those_of_its_rounds_in_their_order(tmp_path: Path) -> None:
    said = run(tmp_path / "run").said
    phases = [one["phase"] for one in said]
    steps = [phase for phase, before in zip(phases, [None, *phases], strict=False) if phase != before]
    one_round = ["ask", "collect", "check", "aggregate"]
    assert steps == ["introduce", *one_round, *one_round, "evaluate", "done"]
    assert [said[phases.index("ask")]["round"], said[-1]["round"], said[-1]["rounds"]] == [1, 2, 2]
    assert {h["phase"] for h in said[-1]["hospitals"].values()} == {"answered"}
    assert set(said[-1]["seconds"]) == {"introduce", "ask", "collect", "check", "aggregate", "evaluate"}
    assert all(value > 0 for value in said[-1]["seconds"].values())


def test_replies_are_noted_as_they_come_if_the_grid_gives_them_one_by_one(tmp_path: Path) -> None:
    said = run(tmp_path / "run").said
    in_round_1 = [{n: h["phase"] for n, h in s["hospitals"].items()} for s in said if s["phase"] == "collect"]
    answered = [sum(phase == "answered" for phase in phases.values()) for phases in in_round_1]
    assert answered[:4] == [0, 1, 2, 3]


def test_what_went_wrong_at_a_hospital_has_its_code_its_safe_sentence_and_its_page(tmp_path: Path) -> None:
    watch = run(
        tmp_path / "run", deaf=(4,), aachen={"train 2": "refuse", "evaluate 2": "refuse"}, basel={"evaluate 2": "raise"}
    )
    last = watch.said[-1]["hospitals"]
    assert {name: (h["phase"], h["code"]) for name, h in last.items()} == {
        "aachen": ("refused", 1001), "basel": ("failed", UNEXPECTED_CODE), "chur": ("silent", 0)
    }  # fmt: skip
    assert last["aachen"]["reason"] == REFUSAL
    assert "Anna Example" not in json.dumps(watch.said)
    assert watch.said[-1]["refusals"] == 2
    text = describe_status(tmp_path / "run")
    assert f"1001  {REFUSAL}  docs/errors.md#1001" in text
    assert "docs/errors.md#silent" in text
    assert all(sum(line.startswith(name) for line in text.splitlines()) == 1 for name in NAMES)


def test_who_is_not_connected_is_gone(tmp_path: Path) -> None:
    asked = [s for s in run(tmp_path / "run", away=(3,)).said if s["phase"] == "ask"]
    assert asked[0]["hospitals"]["basel"]["phase"] == "connected"
    assert asked[1]["hospitals"]["basel"]["phase"] == "gone"
    assert asked[1]["hospitals"]["basel"]["page"] == "docs/errors.md#gone"
    assert asked[1]["hospitals"]["basel"]["last_seen"]  # it was there for the introduction


def test_bytes_are_those_of_the_messages(tmp_path: Path) -> None:
    last = run(tmp_path / "run").said[-1]
    assert last["replies"] == 3 + 2 * 3 + 3  # introduced, trained twice, scored
    assert 0 < last["bytes_up"] < last["bytes_down"] + 10_000
    assert last["bytes_down"] > 9 * 4 * sum(value.numel() for value in weights().values())


def test_each_page_that_a_status_names_is_there() -> None:
    anchors = set(re.findall(r'<a id="(\w+)">', (ROOT / "docs/errors.md").read_text(encoding="utf-8")))
    pages = [page_of("refused", code) for code in REFUSALS] + [page_of("failed", UNEXPECTED_CODE)]
    pages += [page_of(kind, 0) for kind in ("silent", "gone", "failed", "invalid")] + [page_of("failed", 5)]
    assert {page.removeprefix("docs/errors.md#") for page in pages} <= anchors


@pytest.mark.parametrize(
    ("raised", "phase", "error"),
    [
        (
            RunFailed("round 3: 1 usable reply", why="basel: no answer in time"),
            "failed",
            "round 3: 1 usable reply: basel",
        ),
        (RuntimeError("Anna Example"), "failed", "RuntimeError"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_how_a_run_ended_is_said_and_nothing_of_an_unforeseen_error_but_its_type(
    tmp_path: Path, raised: BaseException, phase: str, error: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(type(raised)), StatusFile(tmp_path, rounds=4):
        raise raised
    status = read_status(tmp_path)
    assert (status.phase, status.error.startswith(error)) == (phase, True)
    assert "Anna" not in (tmp_path / STATUS_FILE).read_text()


def test_a_run_that_cannot_start_leaves_nothing_and_keeps_what_was_there_before(tmp_path: Path) -> None:
    for folder, left in ((tmp_path / "new", False), (tmp_path, True)):
        with pytest.raises(RunFailed), StatusFile(folder, rounds=4):
            raise RunFailed(f"nobody came, {read_status(folder).phase}")
        assert folder.exists() == left
    assert read_status(tmp_path).phase == "failed"


def test_a_run_that_goes_on_adds_to_its_status(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    heard = Heard([Failure("basel", "refused", 1001, REFUSAL)], [Arrival("aachen", "weights", 700)])
    for times in (1, 2):
        with StatusFile(tmp_path, rounds=4, clock=Clock()) as watch:
            watch.phase("collect", round=times)
            watch.asked(["aachen", "basel"], bytes=50)
            watch.heard(heard)
        status = read_status(tmp_path)
        assert (status.bytes_up, status.bytes_down, status.replies, status.refusals) == tuple(
            times * n for n in (700, 50, 1, 1)
        )
        assert status.seconds["collect"] == times
        assert status.round == times


def test_a_disk_that_refuses_the_status_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with StatusFile(tmp_path / "file" / "run", rounds=1) as watch:
        watch.phase("ask", round=1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"phase": "dancing"}', b"\xff"])
def test_a_status_that_is_none_is_an_error_with_a_fix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATUS_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        describe_status(tmp_path)
    with pytest.raises(ConfigError, match="no status"):
        describe_status(tmp_path / "nowhere")
