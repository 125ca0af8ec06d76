"""Flower's own HttpGrid, with a SuperLink on paper behind it: what it was sent, and replies as hospitals' bytes make them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.superlink.grid.http_grid import HttpGrid

NODES = (2, 3)


@dataclass
class Reply:
    """As the SuperLink holds it. head: what it knows of it.  pieces: by id the bytes."""

    node: int
    head: ProtoMessage
    tree: ObjectTree
    pieces: dict[str, bytes]


def reply_to(asked: Message, said: RecordDict | Error, **names: Any) -> Reply:
    """An honest reply. names: of the metadata that its sender writes into it, changed by a sender that lies."""
    node = asked.metadata.dst_node_id
    made = Message(said, reply_to=asked)
    head = message_to_proto(remove_content_from_message(made))
    made.metadata.__dict__.update({f"_{name}": value for name, value in names.items()})
    pieces = {key: part.deflate() for key, part in get_all_nested_objects(made).items()}
    tree = get_object_tree(made)
    head.metadata.message_id = tree.object_id
    return Reply(node, head, tree, pieces)


def of_superlink(asked: Message, code: int) -> Reply:
    """What the SuperLink says in its own name."""
    reply = reply_to(asked, Error(code, "of Flower"), src_node_id=SUPERLINK_NODE_ID, message_type="system")
    reply.head.metadata.src_node_id = SUPERLINK_NODE_ID
    return reply


def with_object(asked: Message, kind: str, body: bytes) -> Reply:
    """A reply whose bytes are one object with a right head, as the SuperLink lets through, whatever its body."""
    content = f"{kind}  {len(body)}".encode() + b"\x00" + body
    validate_object_content(content)
    name = hashlib.sha256(content).hexdigest()
    reply = reply_to(asked, RecordDict())
    reply.head.metadata.message_id = name
    return Reply(reply.node, reply.head, ObjectTree(object_id=name), {name: content})


@dataclass
class SuperLink:
    """Of two nodes. later: what comes next, in this order: a reply to the message of one node, made when that one is looked
    for; or the number of a node that signs on again.

    asked: by the SuperLink's name of a message.  absent: pieces that have not come.  lost: pieces that it has given up on.
    """

    later: list[tuple[int, Callable[[Message], Reply]] | int] = field(default_factory=list)
    asked: dict[str, Message] = field(default_factory=dict)
    signed_on: dict[int, str] = field(default_factory=lambda: dict.fromkeys(NODES, "yesterday"))
    absent: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    handed_out: list[Reply] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    _pieces: dict[str, bytes] = field(default_factory=dict)

    def grid(self) -> HttpGrid:
        grid = HttpGrid(token="a token")
        grid._client = self  # type: ignore[assignment]
        grid._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
        push = grid._try_push_messages

        def pushed(run_id: int, messages: Any) -> list[str]:
            names = push(run_id, messages)
            self.asked.update(zip(names, messages, strict=True))
            return names

        grid._try_push_messages = pushed  # type: ignore[method-assign]
        return grid

    def GetNodes(self, request: Any) -> Any:
        return SimpleNamespace(
            nodes=[
                SimpleNamespace(node_id=n, last_activated_at=t, name=f"hospital-{n}") for n, t in self.signed_on.items()
            ]
        )

    def PushMessages(self, request: Any) -> Any:
        names = [message.metadata.message_id for message in request.messages_list]
        return SimpleNamespace(message_ids=names, objects_to_push=[], session_id="s")

    def PushObject(self, request: Any) -> Any:
        raise AssertionError("no piece was asked for")

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        """Hands a reply out once. Together they would be lost together: asking for one at a time is what is looked for."""
        (name,) = request.message_ids
        found, asked = PullAppMessagesResponse(), self.asked[name]
        following = self.later[0] if self.later else None
        if isinstance(following, int):
            self.signed_on[following] = "just now"
            self.later.pop(0)
        elif following is not None and following[0] == asked.metadata.dst_node_id:
            self.later.pop(0)
            reply = following[1](asked)
            self.handed_out.append(reply)
            self._pieces |= reply.pieces
            found.messages_list.append(reply.head)
            found.message_object_trees.append(reply.tree)
        return found

    def PullObject(self, request: Any) -> PullObjectResponse:
        name = request.object_id
        self.fetched.append(name)
        if name in self.lost:
            return PullObjectResponse(object_found=False)
        if name in self.absent:
            return PullObjectResponse(object_found=True, object_available=False)
        return PullObjectResponse(object_found=True, object_available=True, object_content=self._pieces[name])

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)
