"""A message's arrays as one block of bytes while it crosses sockets.

Flower sends every array as an object of its own, and each object costs a request at the SuperLink, at the proxy and at the
SuperNode: 36 small tensors took 10 s where one block takes less than one (# measured, two busy cores). What leaves the
coordinator's ServerApp is packed, and unpacked before a hospital's ClientApp sees it; the same on the way back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import SType

from fedmm.errors import MessageInvalid
from fedmm.federation.messages import records_of

PACKED, INDEX, BLOCK = "fedmm packed", "index", "block"
MAX_INDEX = 8 * 2**20  # characters; a model has hundreds of tensors, not hundreds of thousands
MAX_ARRAYS = 100_000


def pack(content: RecordDict) -> RecordDict:
    """All arrays in one. Content without arrays, or packed already, stays as it is. `unpack` gives the same bytes back."""
    if not records_of(content, ArrayRecord) or PACKED in content:
        return content
    rest, parts = lay_out(content)
    data = b"".join(parts)
    block = Array(dtype="uint8", shape=(len(data),), stype=SType.NUMPY, data=data)
    return RecordDict({**rest, BLOCK: ArrayRecord({BLOCK: block})})


def lay_out(content: RecordDict) -> tuple[RecordDict, list[bytes]]:
    """The content with an index in the place of its arrays, and their bytes in the index' order; no byte is copied."""
    index: list[list[Any]] = []
    parts: list[bytes] = []
    records = records_of(content, ArrayRecord)
    for record, arrays in records.items():
        for name, array in arrays.items():
            index.append([record, name, array.dtype, list(array.shape), array.stype, len(array.data)])
            parts.append(array.data)
    rest = {key: value for key, value in content.items() if key not in records}
    return RecordDict({**rest, PACKED: ConfigRecord({INDEX: json.dumps(index)})}), parts


def unpack(content: RecordDict) -> RecordDict:
    """Undo of `pack`; content that is not packed stays as it is. The peer is checked, not trusted.

    Raises: MessageInvalid.
    """
    if not isinstance(content.get(PACKED), ConfigRecord):
        return content
    blocks = records_of(content, ArrayRecord)
    if set(blocks) != {BLOCK} or set(blocks[BLOCK]) != {BLOCK}:
        raise MessageInvalid("a packed message without its block")
    data, at = blocks[BLOCK][BLOCK].data, 0

    def take(length: int) -> bytes:
        nonlocal at
        if at + length > len(data):
            raise MessageInvalid("a packed message whose index does not fit its block")
        at += length
        return data[at - length : at]

    made = put_back(RecordDict({key: value for key, value in content.items() if key != BLOCK}), take)
    if at != len(data):
        raise MessageInvalid("a packed message whose block is longer than its index")
    return made


def put_back(rest: RecordDict, take: Callable[[int], bytes]) -> RecordDict:
    """Undo of `lay_out`. take: the next so many bytes, asked for in the index' order. Raises: MessageInvalid; as `take`."""
    text = records_of(rest, ConfigRecord)[PACKED].get(INDEX)
    records: dict[str, dict[str, Array]] = {}
    for record, name, dtype, shape, stype, length in _index(text):
        if record in rest:
            raise MessageInvalid("a packed message whose index does not fit its records")
        data = take(length)
        records.setdefault(record, {})[name] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
    whole = {key: value for key, value in rest.items() if key != PACKED}
    return RecordDict({**whole, **{key: ArrayRecord(arrays) for key, arrays in records.items()}})


def _index(text: object) -> list[list[Any]]:
    """Raises: MessageInvalid."""
    try:
        index = json.loads(text) if isinstance(text, str) and len(text) <= MAX_INDEX else None
    except ValueError:  # RecursionError too, in json's own words
        index = None
    except RecursionError:
        index = None
    if not isinstance(index, list) or len(index) > MAX_ARRAYS or not all(_is_entry(entry) for entry in index):
        raise MessageInvalid("the index of a packed message is not valid")
    if len({(entry[0], entry[1]) for entry in index}) != len(index):
        raise MessageInvalid("the index of a packed message names an array twice")
    return index


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 6
        and all(isinstance(entry[i], str) for i in (0, 1, 2, 4))
        and isinstance(entry[3], list)
        and all(type(n) is int and 0 <= n < 2**31 for n in entry[3])
        and type(entry[5]) is int
        and entry[5] >= 0
    )
