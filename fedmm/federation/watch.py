"""What a run tells while it goes on, to whoever wants to know: fedmm.report.status writes it down. Nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flwr.app import Message

    from fedmm.federation.checks import Heard

Phase = Literal["introduce", "ask", "collect", "check", "aggregate", "evaluate", "done", "failed", "stopped"]


class Watch:
    """Is told what a run does, as it does it. This one looks away."""

    def phase(self, name: Phase, *, round: int = 0) -> None:
        """The run does this from now on. round: 0 if it is still the same."""

    def gone(self, hospitals: Sequence[str]) -> None:
        """Not connected when a round begins."""

    def asked(self, hospitals: Iterable[str], *, bytes: int) -> None:
        """Questions leave. bytes: of all of them together."""

    def answered(self, hospital: str, *, code: int) -> None:
        """A reply came, unchecked. code: of its error; 0 if it has content."""

    def heard(self, heard: Heard) -> None:
        """All replies to a question have been checked."""


NOBODY = Watch()


def as_they_come(
    replies: Iterable[Message], names: Mapping[int, str], watch: Watch, *, then: Phase | None = None
) -> Iterator[Message]:
    """The same replies; `watch` hears of each one when it comes, if the grid gives them one by one.

    names: by node id; a node that was not asked is not told of here, the check names it.
    then: what the run does once it waits for nobody any more: at once, if all replies are here.
    """
    if isinstance(replies, Sized) and then:
        watch.phase(then)
    for reply in replies:
        hospital = names.get(reply.metadata.src_node_id)
        if hospital is not None:
            watch.answered(hospital, code=reply.error.code if reply.has_error() else 0)
        yield reply
    if not isinstance(replies, Sized) and then:
        watch.phase(then)
