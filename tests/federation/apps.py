"""A ClientApp that does what a message says, for the tests of the local engine. Light: workers import it."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

SECRET = "Anna Example, born 1951"
obedient = ClientApp()


@obedient.train()
def train(message: Message, context: Context) -> Message:
    """do: echo, keep, count, pid, die, hang, raise, exit, nothing, refuse. Counts its calls in the node's state."""
    order = message.content.config_records["order"]["do"]
    count = int(context.state.config_records["state"]["count"]) + 1 if "state" in context.state else 1
    context.state["state"] = ConfigRecord({"count": count})
    if order == "die":
        os._exit(9)
    if order == "hang":
        time.sleep(600)
    if order == "raise":
        raise RuntimeError(SECRET)
    if order == "exit":
        sys.exit(SECRET)
    if order == "nothing":
        return None  # type: ignore[return-value]
    if order == "refuse":
        return Message(Error(1001, "BUDGET_EXHAUSTED: enough"), reply_to=message)
    if order == "keep":
        message.content.array_records["numbers"]["x"] = Array(np.full(1, 7, dtype=np.float32))
        return Message(message.content, reply_to=message)
    more = {"pid": os.getpid()} if order == "pid" else {"count": count} if order == "count" else {}
    said = ConfigRecord({"node": context.node_id, "site": str(context.node_config["site"]), **more})
    content = RecordDict({"said": said})
    for name, arrays in message.content.array_records.items():
        content[name] = ArrayRecord([2 * array.numpy() for array in arrays.values()])
    return Message(content, reply_to=message)
