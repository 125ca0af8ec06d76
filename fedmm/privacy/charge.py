"""A reservation on disk, in the hands of the process that works under it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from fedmm.config import Scalar
from fedmm.errors import LedgerUnusable
from fedmm.privacy import chain
from fedmm.privacy.chain import Row

if TYPE_CHECKING:
    from fedmm.privacy.ledger import Ledger


class Charge:
    """A reservation on disk. Without `settle` it stays reserved, and reserved is spent."""

    def __init__(self, ledger: Ledger, row: Row) -> None:
        self._ledger = ledger
        self.seq = row.seq
        self.event = row.event
        self.started = False
        self.state = "reserved"

    def start(self) -> None:
        """The first step is about to be computed: from now on `void` does nothing."""
        self.started = True

    def settle(self, **made: Scalar) -> None:
        """The release exists. Twice is once. Raises: LedgerUnusable if the disk refuses or the charge was voided.

        made: "sha256" of what may leave, without which the gate lets nothing pass; values that are public from now on.
        """
        if self.state == "voided":
            raise LedgerUnusable(
                f"charge {self.seq} was given back and cannot be settled",
                why="what was computed under it must not leave",
            )
        if self.state == "reserved":
            self._ledger._close_charge(self.seq, "settle", note=chain.canonical(made) if made else "")
            self.state = "settled"

    def void(self) -> bool:
        """Give the charge back, if nothing was computed under it. False, and no effect, once started or settled.

        Raises: LedgerUnusable.
        """
        if self.started or self.state != "reserved":
            return False
        self._ledger._close_charge(self.seq, "void")
        self.state = "voided"
        return True

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing on purpose: what is not settled stays charged."""
