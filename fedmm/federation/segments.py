"""Messages between processes of one machine: arrays lie in memory that both have, the small rest goes through a pipe.

A message of 100 MB through a pipe as protobuf is copied 15 times; here its bytes are written once and read once. A segment
has no name, so nothing stays behind whoever is killed: the system takes it back with the last process that has it open. What
is read is a copy: nobody can change what another one reads. Where there is no memfd (macOS), a file without a name.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedmm.federation.messages import records_of
from fedmm.federation.packing import lay_out, put_back

PLACES, AT = "fedmm places", "at"  # of each array: is it in what is shared, and where
MOST = 2**30  # bytes in one call: the system moves at most 2**31 - 4096


class Segment:
    """Bytes that this process writes and the processes that were started with it read, or the other way round."""

    def __init__(self, handle: int | None = None) -> None:
        self._handle = _nameless() if handle is None else handle
        self._held: dict[
            int, tuple[bytes, int]
        ] = {}  # by identity: bytes do not change, and while held they are not others
        self._end = 0

    def put(self, data: bytes) -> int:
        """Where it lies from now on, after what was put before. Raises: OSError if there is no memory for it."""
        at, view = self._end, memoryview(data)
        while view:
            done = os.pwrite(self._handle, view[:MOST], self._end)
            self._end, view = self._end + done, view[done:]
        self._held[id(data)] = data, at
        return at

    def find(self, data: bytes) -> int | None:
        """Where this very object lies; None if it was not put here."""
        held = self._held.get(id(data))
        return None if held is None else held[1]

    def take(self, at: int, length: int) -> bytes:
        """Raises: OSError if there are fewer."""
        parts: list[bytes] = []
        while length:
            parts.append(os.pread(self._handle, min(length, MOST), at))
            at, length = at + len(parts[-1]), length - len(parts[-1])
            if not parts[-1]:
                raise OSError("a segment is shorter than its message says")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def clear(self) -> None:
        """What is put next goes over what is here."""
        self._held, self._end = {}, 0

    def close(self) -> None:
        os.close(self._handle)

    def __reduce__(self) -> tuple[Callable[[Any], Segment], tuple[Any]]:
        """For a process that is being started: it inherits the handle."""
        return _inherited, (reduction.DupFd(self._handle),)


def _inherited(handle: Any) -> Segment:
    return Segment(handle.detach())


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedmm")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def share(messages: Iterable[Message], segment: Segment) -> None:
    """Into the segment, once, go the arrays that more than one of the messages has, in the place of what it held."""
    segment.clear()
    parts = [part for message in messages if message.has_content() for part in lay_out(message.content)[1]]
    often = Counter(map(id, parts))
    for part in parts:
        if often[id(part)] > 1 and segment.find(part) is None:
            segment.put(part)


def send(message: Message, connection: Connection, own: Segment, shared: Segment | None = None) -> None:
    """own: whose content the receiver has read by now.  Raises: OSError if the other process is gone."""
    if message.has_content():  # with arrays or without: what a peer may have put in the place of ours is gone
        rest, parts = lay_out(message.content)
        own.clear()
        common = [shared.find(part) if shared is not None else None for part in parts]
        at = [(False, own.put(p)) if found is None else (True, found) for p, found in zip(parts, common, strict=True)]
        own.clear()  # holds no bytes of a message that is over
        rest[PLACES] = ConfigRecord({AT: json.dumps(at)})
        message = detached(message)
        message.content = rest
    connection.send_bytes(message_to_proto(message).SerializeToString())


def receive(connection: Connection, own: Segment, shared: Segment | None = None) -> Message:
    """own, shared: as in `send`. Raises: EOFError or OSError if the other process is gone."""
    message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
    if message.has_content():
        where = iter(json.loads(str(records_of(message.content, ConfigRecord)[PLACES][AT])))
        del message.content[PLACES]

        def take(length: int) -> bytes:
            common, at = next(where)
            return (shared if common and shared is not None else own).take(at, length)

        message.content = put_back(message.content, take)
    return message


def detached(message: Message) -> Message:
    """The same message, through which nothing of the other one can be changed. Bytes do not change, so both have the same."""
    twin = copy.copy(message)
    twin.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        records = message.content.items()
        twin.content = RecordDict(
            {name: ArrayRecord(dict(r)) if isinstance(r, ArrayRecord) else copy.deepcopy(r) for name, r in records}
        )
    return twin
