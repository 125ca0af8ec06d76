"""The engine for one machine: the same replies with and without processes, and no process that stays behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.run import Run

from fedmm.errors import UNEXPECTED_CODE
from fedmm.federation.local import LocalGrid, take_gpu
from tests.federation.apps import SECRET

ROOT = Path(__file__).parents[2]
APP = "tests.federation.apps:obedient"
NODES = [{"site": "/data/aachen"}, {"site": "/data/basel"}, {"site": "/data/chur"}]
A, B, C = 2, 3, 4  # node ids; with two workers A and C share one
SOON = 30.0  # seconds until a process that was told to end must have ended; nothing waits that long


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalGrid]:
    with LocalGrid(APP, NODES, workers=2) as grid:
        yield grid


@pytest.fixture
def here() -> LocalGrid:
    return LocalGrid(APP, NODES)


@pytest.fixture(params=["here", "pool"])
def grid(request: pytest.FixtureRequest) -> LocalGrid:
    found: LocalGrid = request.getfixturevalue(request.param)
    return found


def order(node: int, do: str, *, floats: int = 0, kind: str = MessageType.TRAIN) -> Message:
    content = RecordDict({"order": ConfigRecord({"do": do})})
    if floats:
        content["numbers"] = ArrayRecord({"x": Array(np.arange(floats, dtype=np.float32))})
    return Message(content, node, kind)


def ask(grid: LocalGrid, *orders: Message, timeout: float | None = None) -> dict[int, Message]:
    replies = list(grid.send_and_receive(orders, timeout=timeout))
    found = {reply.metadata.src_node_id: reply for reply in replies}
    assert len(found) == len(replies)
    return found


def said(reply: Message) -> dict[str, object]:
    return dict(reply.content.config_records["said"])


def process_of(grid: LocalGrid, node: int) -> int:
    return int(said(ask(grid, order(node, "pid"))[node])["pid"])  # type: ignore[call-overload]


def running(pid: int) -> bool:
    """A process that nobody has collected yet has ended all the same."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    return False


def ends(pid: int) -> bool:
    return comes_true(lambda: not running(pid))


def comes_true(question: Callable[[], bool]) -> bool:
    until = time.monotonic() + SOON
    while not question():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# --- both ways --------------------------------------------------------------------------------------------------------


def test_replies_are_equal_with_and_without_processes(here: LocalGrid, pool: LocalGrid) -> None:
    def run(grid: LocalGrid) -> dict[tuple[int, int], bytes]:
        found = {}
        for number in range(2):  # 1.2 MB: more than a pipe holds
            replies = ask(grid, *(order(node, "echo", floats=300_000) for node in (A, B, C)))
            for node, reply in replies.items():
                found[node, number] = recorddict_to_proto(reply.content).SerializeToString(deterministic=True)
        return found

    assert run(here) == run(pool)


def test_each_node_has_its_own_config_and_its_state_stays(grid: LocalGrid) -> None:
    first = {node: said(reply) for node, reply in ask(grid, *(order(n, "count") for n in (A, B, C))).items()}
    assert {node: what["site"] for node, what in first.items()} == {
        A: "/data/aachen",
        B: "/data/basel",
        C: "/data/chur",
    }
    for number in (1, 2):
        again = said(ask(grid, order(B, "count"))[B])
        assert again["count"] == int(first[B]["count"]) + number  # type: ignore[call-overload]
    assert said(ask(grid, order(A, "count"))[A])["count"] == int(first[A]["count"]) + 1  # type: ignore[call-overload]


def test_a_reply_belongs_to_its_question(grid: LocalGrid) -> None:
    questions = [order(node, "echo") for node in (C, A, B)]
    replies = ask(grid, *questions)
    for question in questions:
        reply = replies[question.metadata.dst_node_id]
        assert reply.metadata.reply_to_message_id == question.metadata.message_id != ""
        assert reply.metadata.dst_node_id == question.metadata.src_node_id


def test_replies_can_be_pushed_and_pulled_once(grid: LocalGrid) -> None:
    ids = list(grid.push_messages([order(A, "echo"), order(B, "echo")]))
    assert len(set(ids)) == 2
    (reply,) = grid.pull_messages(ids[1:])
    assert reply.metadata.src_node_id == B
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids)] == [A]
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_replies_come_one_by_one_and_the_next_hospital_is_asked_only_then(here: LocalGrid) -> None:
    replies = iter(here.send_and_receive([order(A, "count"), order(B, "count")]))
    next(replies)
    assert said(ask(here, order(B, "count"))[B])["count"] == 1
    assert list(replies) == []  # who asks anew wants no more of these


def test_replies_that_are_no_longer_wanted_never_come_later(pool: LocalGrid) -> None:
    working = [process_of(pool, A), process_of(pool, B)]
    replies = iter(pool.send_and_receive([order(A, "count"), order(B, "hang"), order(C, "hang")]))
    assert next(replies).metadata.src_node_id == A
    question = order(B, "echo", floats=3)
    reply = ask(pool, question)[B]
    assert reply.metadata.reply_to_message_id == question.metadata.message_id
    assert all(ends(pid) for pid in working)
    assert list(replies) == []
    assert said(ask(pool, order(C, "count"))[C])["node"] == C


def test_closing_the_grid_ends_workers_whose_replies_nobody_took() -> None:
    grid = LocalGrid(APP, NODES, workers=2)
    pids = [process_of(grid, A), process_of(grid, B)]
    replies = iter(grid.send_and_receive([order(A, "echo"), order(B, "hang")]))
    next(replies)
    grid.close()
    assert all(ends(pid) for pid in pids)
    assert list(replies) == []


def test_nothing_to_send_gives_nothing_back(grid: LocalGrid) -> None:
    assert ask(grid) == {}


def test_a_typed_refusal_arrives_unchanged(grid: LocalGrid) -> None:
    error = ask(grid, order(A, "refuse"))[A].error
    assert (error.code, error.reason) == (1001, "BUDGET_EXHAUSTED: enough")


@pytest.mark.parametrize("what", ["raise", "exit", "nothing"])
def test_an_app_that_fails_is_an_error_reply_without_its_text(what: str, here: LocalGrid, pool: LocalGrid) -> None:
    errors = set()
    for grid in (here, pool):
        replies = ask(grid, order(A, what), order(B, "echo"), order(C, "echo"))
        assert replies[B].has_content()
        assert replies[C].has_content()
        errors.add((replies[A].error.code, replies[A].error.reason))
        assert ask(grid, order(A, "echo"))[A].has_content()
    ((code, reason),) = errors
    assert code == UNEXPECTED_CODE
    assert reason
    assert SECRET not in reason


def test_a_question_that_the_app_does_not_know_is_an_error_reply(grid: LocalGrid) -> None:
    assert ask(grid, order(A, "echo", kind=MessageType.EVALUATE))[A].error.code == UNEXPECTED_CODE


def test_what_an_app_changes_in_a_message_stays_there(here: LocalGrid) -> None:
    question = order(A, "echo", floats=4)
    reply = ask(here, question)[A]
    assert question.content.array_records["numbers"]["x"].numpy().tolist() == [0, 1, 2, 3]
    assert reply.content is not question.content


def test_an_array_that_an_app_or_the_caller_changes_is_not_changed_for_anybody_else(here: LocalGrid) -> None:
    content = order(A, "keep", floats=4).content
    kept = ask(here, Message(content, A, MessageType.TRAIN), Message(content, B, MessageType.TRAIN))
    for node in (A, B):  # `keep` puts another array in the place of the one that it was sent
        assert kept[node].content.array_records["numbers"]["x"].numpy().tolist() == [7.0]
    assert content.array_records["numbers"]["x"].numpy().tolist() == [0, 1, 2, 3]
    content.array_records["numbers"]["x"].data = b"changed"
    assert kept[A].content.array_records["numbers"]["x"].numpy().tolist() == [7.0]


def test_it_speaks_the_rest_of_flowers_interface(here: LocalGrid) -> None:
    assert list(here.get_node_ids()) == [A, B, C]
    run = Run.create_empty(7)
    here.set_run(run)
    assert here.run is run
    message = here.create_message(RecordDict(), MessageType.QUERY, B, "group", ttl=5.0)
    assert (message.metadata.dst_node_id, message.metadata.group_id, message.metadata.ttl) == (B, "group", 5.0)


# --- processes --------------------------------------------------------------------------------------------------------


def test_workers_are_other_processes_and_keep_their_hospitals(pool: LocalGrid) -> None:
    pids = {node: process_of(pool, node) for node in (A, B, C)}
    assert pids[A] == pids[C] != pids[B]
    assert os.getpid() not in pids.values()
    assert process_of(pool, A) == pids[A]


def test_a_worker_that_dies_at_work_is_an_error_reply_and_the_next_message_works(pool: LocalGrid) -> None:
    before = process_of(pool, B)
    replies = ask(pool, order(A, "echo"), order(B, "die"), order(C, "echo"))
    assert replies[B].error.code == UNEXPECTED_CODE
    assert replies[A].has_content()
    assert replies[C].has_content()
    after = process_of(pool, B)
    assert after != before
    assert not running(before)


def test_a_worker_that_died_idle_is_replaced_before_it_is_asked(pool: LocalGrid) -> None:
    pid = process_of(pool, B)
    os.kill(pid, signal.SIGKILL)
    assert comes_true(lambda: pid not in [child.pid for child in multiprocessing.active_children()])
    assert ask(pool, order(B, "echo"))[B].has_content()


def test_a_worker_that_dies_just_before_it_is_asked_is_an_error_reply(
    pool: LocalGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = process_of(pool, B)
    os.kill(pid, signal.SIGKILL)
    assert ends(pid)
    with monkeypatch.context() as patch:
        patch.setattr("fedmm.federation.local.Worker.alive", True)  # as it looked a moment ago
        replies = ask(pool, order(A, "echo"), order(B, "echo", floats=1_000_000))
    assert replies[A].has_content()
    assert replies[B].error.code == UNEXPECTED_CODE
    assert ask(pool, order(B, "echo"))[B].has_content()


def test_a_worker_that_dies_before_it_has_read_its_message_is_an_error_reply(pool: LocalGrid) -> None:
    pid = process_of(pool, B)
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    reply = ask(pool, order(B, "echo"))[B]
    killer.join()
    assert reply.error.code == UNEXPECTED_CODE


def test_an_app_that_hangs_is_stopped_and_the_other_replies_arrive(pool: LocalGrid) -> None:
    hanging, other = process_of(pool, A), process_of(pool, B)
    replies = ask(pool, order(A, "echo"), order(B, "echo"), order(C, "hang"), timeout=1.0)
    assert set(replies) == {A, B}
    assert ends(hanging)
    assert process_of(pool, B) == other
    assert ask(pool, order(C, "echo"))[C].has_content()


def test_no_more_workers_than_hospitals_and_none_after_leaving_by_ctrl_c() -> None:
    def run() -> None:
        with grid:
            pids.append(process_of(grid, A))
            names.extend(child.name for child in multiprocessing.active_children() if child.pid == pids[0])
            alive.append(sum(child.name == "fedmm-worker" for child in multiprocessing.active_children()) - before)
            raise KeyboardInterrupt

    pids: list[int] = []
    names: list[str] = []
    alive: list[int] = []
    before = sum(child.name == "fedmm-worker" for child in multiprocessing.active_children())
    grid = LocalGrid(APP, NODES[:1], workers=8)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (names, alive) == (["fedmm-worker"], [1])
    assert not running(pids[0])
    assert pids[0] not in [child.pid for child in multiprocessing.active_children()]
    grid.close()  # again


@pytest.mark.parametrize(("gpus", "taken"), [(0, []), (1, []), (3, [0, 1, 2, 0])])
def test_workers_go_round_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, taken: list[int]) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for index in range(4):
        take_gpu(index)
    assert chosen == taken


PARENT = """
from tests.federation.test_local import APP, NODES, A, LocalGrid, order, process_of
grid = LocalGrid(APP, NODES[:1], workers=1)
print(process_of(grid, A), flush=True)
list(grid.send_and_receive([order(A, "hang")]))
"""


def test_a_coordinator_that_is_killed_leaves_no_worker() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        worker = int(parent.stdout.readline())
        assert running(worker)
        parent.kill()
        parent.wait()
    assert ends(worker)
