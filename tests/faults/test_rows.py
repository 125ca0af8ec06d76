"""What else goes wrong between real sites: silence, late answers, stops, full disks, half-open sockets, a power cut."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import pytest

import server.operate
from fedmm.errors import LedgerUnusable, RunStopped
from fedmm.report.record import read_rounds
from tests.e2e.sites import until
from tests.faults import stage
from tests.faults.books import charges, check_books, run_id
from tests.faults.federation import GIVEN, NAMES, ROUNDS, STRUCK, Faulty

WAITS = 40.0  # seconds of a round that somebody is silent in: a fresh worker imports torch meanwhile
pytestmark = pytest.mark.slow


def site_status(faulty: Faulty) -> dict[str, Any]:
    return dict(json.loads((faulty.struck / ".fedmm" / "status.json").read_text(encoding="utf-8")))


def failures(faulty: Faulty, name: str) -> list[tuple[int, str, str, int]]:
    records = read_rounds(faulty.run(name))
    return [(r["round"], f["hospital"], f["kind"], f["code"]) for r in records for f in r["failures"]]


@contextmanager
def no_space(pid: int) -> Iterator[None]:
    """No file of this process can grow, as on a full disk: Python and SQLite get an error, as they would there."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_hospital_that_never_answers_is_ended_by_its_own_executor_and_the_others_go_on(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin({**GIVEN, "federation.min_hospitals": 2, "federation.round_timeout": WAITS})
    faulty.held("train-step")
    hanging = faulty.pid("worker")
    assert faulty.over(name).status == "finished:completed"
    until(lambda: faulty.pid("worker") != hanging, what="the executor ends the worker that hangs")
    check_books(faulty.run(name), faulty.hospitals)
    assert failures(faulty, name)[0] == (1, STRUCK, "silent", 0)
    first, last = read_rounds(faulty.run(name))
    assert (STRUCK in first["trained"], STRUCK in last["trained"]) == (False, True)
    assert charges(faulty.struck, run_id(faulty.run(name))) == [(1, "reserved"), (2, "settled")]


def test_an_answer_that_comes_too_late_is_told_as_silence_and_given_again_at_no_cost(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-sent", "hold")
    name = faulty.begin({**GIVEN, "federation.round_timeout": WAITS})
    faulty.held("train-sent")
    assert charges(faulty.struck, run_id(faulty.run(name))) == [(1, "settled")]
    assert faulty.completes(name) == 0
    assert failures(faulty, name)[0] == (1, STRUCK, "silent", 0)


def test_a_supernode_that_sleeps_is_not_waited_for_beyond_the_round(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin({**GIVEN, "federation.min_hospitals": 2, "federation.round_timeout": WAITS})
    faulty.held("train-step")
    asleep = faulty.pid("supernode")
    os.kill(asleep, signal.SIGSTOP)
    try:
        stage.let_go(faulty.struck)
        assert faulty.over(name).status == "finished:completed"
    finally:
        os.kill(asleep, signal.SIGCONT)
    check_books(faulty.run(name), faulty.hospitals)
    assert [len(record["trained"]) for record in read_rounds(faulty.run(name))] == [2] * ROUNDS


# --- a person stops it ------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_stops_hospitals_at_their_next_step_and_goes_on_under_their_charges(
    faulty: Faulty,
) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin()
    faulty.held("train-step")
    server.operate.stop_run(faulty.sites.kit(), name)
    stop_file = faulty.sites.kit(STRUCK).state / "stop"
    until(stop_file.exists, what="the executor hears of it")
    stage.let_go(faulty.struck)
    until(lambda: site_status(faulty)["code"] == RunStopped.code, what="the training stops")
    assert charges(faulty.struck, run_id(faulty.run(name))) == [(1, "reserved")]
    until(lambda: not faulty.pid("serverapp"), what="the ServerApp ends")
    assert faulty.completes(name) == 1


def test_runs_queue_at_a_hospital_and_both_end_as_if_alone(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    first = faulty.begin()
    faulty.held("train-step")
    second = faulty.begin()
    until(lambda: (faulty.status(second) or faulty.status(first)).run, what="the second run begins")  # type: ignore[union-attr]
    stage.let_go(faulty.struck)
    assert [faulty.completes(first), faulty.completes(second)] == [0, 0]


# --- Flower notices by itself -----------------------------------------------------------------------------------------


def test_a_serverapp_that_died_is_noticed_and_the_run_can_go_on(faulty: Faulty) -> None:
    """Without `coordinator stop`, which the other cases use to have it at once."""
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin()
    faulty.held("train-step")
    faulty.kill("serverapp")
    assert faulty.over(name).status.startswith("finished:failed")
    stage.let_go(faulty.struck)
    server.operate.resume(faulty.sites.kit(), name)
    assert faulty.completes(name) == 0


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_at_a_hospital_refuses_before_a_charge_and_the_run_goes_on_when_there_is_room(
    faulty: Faulty,
) -> None:
    stage.order(faulty.struck, "train-begin", "hold")
    name = faulty.begin()
    faulty.held("train-begin")
    with no_space(faulty.pid("worker")):
        stage.let_go(faulty.struck)
        assert faulty.over(name).status == "finished:failed"
    status = faulty.status(name)
    assert status is not None
    assert (status.hospitals[STRUCK].code, status.phase) == (LedgerUnusable.code, "failed")
    assert "2 usable replies, federation.min_hospitals is 3" in status.error
    assert charges(faulty.struck, run_id(faulty.run(name))) == []
    assert faulty.completes(name) == 1


def test_a_full_disk_at_the_coordinator_ends_the_run_and_it_goes_on_without_a_further_charge(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin()
    faulty.held("train-step")
    with no_space(faulty.pid("serverapp")):
        stage.let_go(faulty.struck)
        assert faulty.over(name).status == "finished:failed"
    assert charges(faulty.struck, run_id(faulty.run(name))) == [(1, "settled")]
    assert read_rounds(faulty.run(name)) == []
    assert faulty.completes(name) == 1


def test_a_full_disk_under_the_superlink_is_waited_for(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin()
    faulty.held("train-step")
    with no_space(faulty.pid("superlink")):
        stage.let_go(faulty.struck)
        time.sleep(10)  # what a person needs at the least to make room
    faulty.completes(name)


# --- the network and the power ----------------------------------------------------------------------------------------


def test_half_open_sockets_at_the_proxy_keep_nobody_out(faulty: Faulty) -> None:
    port = faulty.sites.kit().federation.coordinator.port
    with ExitStack() as opened:
        half = [opened.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)]
        for one in half[::2]:
            one.sendall(bytes.fromhex("1603010200010001fc0303"))  # a ClientHello that ends in the middle
        name = faulty.begin()
        assert faulty.completes(name) == 0
        for one in half:
            one.settimeout(60)
            assert one.recv(1) == b"", "the proxy closes it"


def test_a_power_cut_everywhere_costs_nothing_twice(faulty: Faulty) -> None:
    stage.order(faulty.struck, "train-step", "hold")
    name = faulty.begin()
    faulty.held("train-step")
    places = ("coordinator", *NAMES)
    for one in [process for place in places for process in faulty.processes(place)]:
        one.kill()
    for place in places:
        supervisor = faulty.sites.started[place]
        supervisor.kill()
        supervisor.wait(30)
    stage.let_go(faulty.struck)
    for place in places:
        until(lambda place=place: not faulty.processes(place), what=f"nothing of {place} is left")  # type: ignore[misc]
    faulty.sites.up()
    faulty.connected()
    assert faulty.completes(name) == 1
