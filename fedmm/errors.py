"""Every error that fedmm raises on purpose, in one tree.

    FedmmError                      exit
    ├── ConfigError                    2   a setting, flag or file that a person typed is wrong
    ├── Refusal                        3   a hospital says no; crosses to the coordinator as a code
    │   ├── BudgetExhausted  (1001)        the charge would pass the ceiling
    │   ├── PolicyRefused    (1002)        site.toml does not allow what was asked
    │   ├── PlanInvalid      (1003)        the privacy plan is impossible or unsafe
    │   ├── HospitalInvalid  (1004)        the folder fails `fedmm check`
    │   ├── LedgerUnusable   (1005)        the ledger cannot be read, written or trusted
    │   │   └── LedgerTampered (1007)      its rows were changed from outside
    │   ├── MessageInvalid   (1006)        a message from a peer breaks the agreed form
    │   ├── ReleaseBlocked   (1008)        the gate held back what no settled charge covers
    │   ├── DeadlinePassed   (1010)        the work did not end in time; nothing left, the charge waits for the next ask
    │   ├── RunStopped       (1011)        somebody stopped the run; likewise
    │   └── HospitalBusy     (1012)        another training had the hospital for too long
    └── RunFailed                      4   nothing sensible can go on

Exit 0 is done, 1 is "the answer is no" (check, verify, audit). Pages: docs/errors.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

# What the coordinator is told when a hospital's code failed in a way nobody planned for. Never the exception's text.
UNEXPECTED_CODE = 1099


class FedmmError(Exception):
    """What happened (with the value), why, and how to fix it; never a patient's value.

    what: one sentence.  why, fix: one sentence each, empty when they add nothing.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    @property
    def name(self) -> str:
        """Stable upper-case name, for example BUDGET_EXHAUSTED."""
        return "".join("_" + c if c.isupper() else c.upper() for c in type(self).__name__).lstrip("_")

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(FedmmError):
    """A setting, flag or file that a person typed is wrong."""

    exit_code = 2


class Refusal(FedmmError):
    """A hospital says no. `code` crosses to the coordinator, with `public_text` and nothing else.

    public_text: `what` alone; whoever raises a Refusal promises that `what` holds no patient's value.
    """

    exit_code = 3
    code: ClassVar[int] = 1000

    @property
    def public_text(self) -> str:
        return f"{self.name}: {self.what}"


class BudgetExhausted(Refusal):
    """The charge would bring the hospital's ledger past its ceiling."""

    code = 1001


class PolicyRefused(Refusal):
    """site.toml does not allow what was asked, or is missing."""

    code = 1002


class PlanInvalid(Refusal):
    """The privacy plan is impossible or unsafe."""

    code = 1003


class HospitalInvalid(Refusal):
    """The folder fails `fedmm check`. `problems` stays inside the hospital."""

    code = 1004

    def __init__(self, what: str, *, why: str = "", fix: str = "", problems: tuple[Any, ...] = ()) -> None:
        super().__init__(what, why=why, fix=fix)
        self.problems = problems

    def __str__(self) -> str:
        """The same list that `fedmm check` prints, cut at twenty; it never crosses, only `public_text` does."""
        shown = [f"  {problem}" for problem in self.problems[:20]]
        more = [f"  … and {len(self.problems) - 20} more"] if len(self.problems) > 20 else []
        return "\n".join([super().__str__(), *shown, *more])


class LedgerUnusable(Refusal):
    """The ledger cannot be read, written or trusted."""

    code = 1005


class LedgerTampered(LedgerUnusable):
    """The ledger's rows were changed from outside, cut off or replaced."""

    code = 1007


class MessageInvalid(Refusal):
    """A message from a peer breaks the agreed form."""

    code = 1006


class ReleaseBlocked(Refusal):
    """The gate held an answer back: no settled charge covers it, or it is not of the declared form."""

    code = 1008


class DeadlinePassed(Refusal):
    """The work did not end in time. Its charge stays reserved, and the same ask goes on under it."""

    code = 1010


class RunStopped(Refusal):
    """Somebody stopped the run, so that nothing is spent for nothing. Its charge stays reserved, as above."""

    code = 1011


class HospitalBusy(Refusal):
    """Another training works on this hospital's patients and did not end in time. Nothing was charged."""

    code = 1012


class RunFailed(FedmmError):
    """Nothing sensible can go on."""


REFUSALS: dict[int, type[Refusal]] = {
    kind.code: kind
    for kind in (
        BudgetExhausted,
        PolicyRefused,
        PlanInvalid,
        HospitalInvalid,
        LedgerUnusable,
        MessageInvalid,
        LedgerTampered,
        ReleaseBlocked,
        DeadlinePassed,
        RunStopped,
        HospitalBusy,
    )
}
