"""Arrays between processes: every byte arrives, what is common is written once, and no name stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.federation import segments
from fedmm.federation.messages import digest_of
from fedmm.federation.segments import Segment, detached, receive, send, share
from tests.federation.test_local import ROOT, ends

PARTS = st.lists(st.binary(max_size=40), max_size=6)


def message(**arrays: ArrayRecord) -> Message:
    return Message(
        RecordDict({**arrays, "fedmm": ConfigRecord({"body": "x"}), "metrics": MetricRecord({"w": 1.0})}), 2, "train"
    )


def record(*values: float) -> ArrayRecord:
    return ArrayRecord({str(i): Array(np.full((3, 2), value, dtype=np.float32)) for i, value in enumerate(values)})


def passed(*messages: Message) -> tuple[list[Message], int]:
    """As one process would receive them, and the bytes in what they share."""
    here, there = Pipe()
    shared, own = Segment(), Segment()
    share(messages, shared)
    found = []
    for one in messages:
        send(one, here, own, shared)
        found.append(receive(there, own, shared))
    size = os.fstat(shared._handle).st_size
    for end in (here, there, shared, own):
        end.close()
    return found, size


@settings(max_examples=50, deadline=None, derandomize=True)
@given(parts=PARTS, again=PARTS)
def test_a_segment_gives_back_what_was_put_into_it_also_when_it_is_used_again(
    parts: list[bytes], again: list[bytes]
) -> None:
    segment = Segment()
    for turn in (parts, again):
        segment.clear()
        places = [segment.put(part) for part in turn]
        assert [segment.take(at, len(part)) for at, part in zip(places, turn, strict=True)] == turn
    segment.close()


def test_more_than_the_system_moves_in_one_call_is_moved_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST", 7)
    segment, data = Segment(), bytes(range(100))
    assert segment.take(segment.put(data), 100) == data
    with pytest.raises(OSError, match="shorter"):
        segment.take(1, 100)
    segment.close()


def test_a_message_arrives_as_it_left() -> None:
    common, first, second = record(1, 2), record(3), record(4)
    sent = [message(arrays=common, correction=first), message(arrays=common, correction=second), message()]
    for before, after in zip(sent, passed(*sent)[0], strict=True):
        assert set(after.content) == set(before.content)
        for name, arrays in before.content.array_records.items():
            assert digest_of(after.content.array_records[name]) == digest_of(arrays)
            assert list(after.content.array_records[name]) == list(arrays)
        assert dict(after.content.config_records["fedmm"]) == {"body": "x"}
        assert after.metadata.dst_node_id == 2
    refusal = Message(Error(1001, "enough"), reply_to=sent[0])
    (found,), _ = passed(refusal)
    assert (found.error.code, found.error.reason) == (1001, "enough")


def test_what_many_are_sent_is_written_once_and_what_one_is_sent_is_not_kept() -> None:
    common = record(1, 2)
    size = sum(len(array.data) for array in common.values())
    assert passed(*(message(arrays=common, correction=record(k)) for k in range(20)))[1] == size
    # Flower's strategies and our corrections put the same arrays into records of their own
    assert passed(*(message(arrays=ArrayRecord(dict(common))) for _ in range(20)))[1] == size
    assert passed(message(arrays=common))[1] == 0


def test_a_message_that_was_sent_is_not_changed_and_can_be_sent_again() -> None:
    one = message(arrays=record(1))
    before = set(one.content)
    found, _ = passed(one, one)
    assert set(one.content) == before == set(found[1].content)


def test_a_peer_cannot_say_where_its_arrays_lie() -> None:
    lying = message()
    lying.content["fedmm places"] = ConfigRecord({"at": "[[false, 0]]"})
    lying.content["fedmm packed"] = ConfigRecord({"index": '[["arrays", "a", "float32", [1], "numpy.ndarray", 4]]'})
    found, _ = passed(message(arrays=record(5)), lying)
    assert set(found[1].content) == {"fedmm", "metrics"}


def test_a_detached_message_and_its_origin_do_not_see_each_other_s_changes() -> None:
    one = message(arrays=record(1))
    twin = detached(one)
    twin.content.array_records["arrays"]["0"] = Array(np.zeros(1, dtype=np.float32))
    twin.content.config_records["fedmm"]["body"] = "y"
    twin.content["more"] = ConfigRecord({})
    twin.metadata.__dict__["_message_id"] = "other"
    assert digest_of(one.content.array_records["arrays"]) == digest_of(record(1))
    assert (one.content.config_records["fedmm"]["body"], "more" in one.content) == ("x", False)
    assert one.metadata.message_id != "other"


def test_without_memfd_a_file_without_a_name_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    segment = Segment()
    assert segment.take(segment.put(b"abc"), 3) == b"abc"
    assert list(tmp_path.iterdir()) == []
    segment.close()


PARENT = """
import os
from tests.federation.test_local import APP, NODES, A, LocalGrid, order, process_of
grid = LocalGrid(APP, NODES[:1], workers=1)
list(grid.send_and_receive([order(A, "echo", floats=100_000)]))
print(process_of(grid, A), flush=True)
list(grid.send_and_receive([order(A, "hang", floats=100_000)]))
"""


def test_a_coordinator_that_is_killed_leaves_no_memory_behind() -> None:
    before = set(Path("/dev/shm").iterdir())
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        worker = int(parent.stdout.readline())
        held = [os.readlink(link) for link in Path(f"/proc/{worker}/fd").iterdir() if link.is_symlink()]
        parent.kill()
        parent.wait()
    assert sum("memfd:fedmm" in target for target in held) == 3
    assert ends(worker)
    assert set(Path("/dev/shm").iterdir()) <= before
