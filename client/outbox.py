"""What this hospital released and may be asked for again: kept until it cannot be. One round, one charge, one answer.

    asked    settled for this question, and kept        the same bytes go to the gate again, at no cost
             settled, for another question or not kept  refused: a round is answered once
             a later round of this run was settled      refused: rounds only go up
             reserved, never settled                    its process is gone: go on under the same charge
             else                                       a new charge

HOSPITAL/.fedmm/outbox/<run>-<kind>-<round>-<charge>.safetensors or .json, on disk before the charge is settled for it: a
kill in between loses nothing. Files are made of what leaves, after noise; deleting them costs that a round cannot be
answered again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from client.site import Site
from fedmm.config import PLACES, RunConfig
from fedmm.errors import LedgerUnusable, PolicyRefused
from fedmm.federation.messages import EvaluateAsk, TrainAsk, array_record, digest_of
from fedmm.privacy import vault
from fedmm.privacy.chain import Charged
from fedmm.privacy.charge import Charge
from fedmm.privacy.plan import Event
from fedmm.training.watch import ENDED

log = logging.getLogger("fedmm.client")
KINDS = {"train": ("train", "not_private"), "evaluate": ("evaluate", "exact_scores")}
KEPT_ROUNDS = 2  # of each run and kind: a coordinator that goes on from its checkpoint asks for the last one again
MOST_RUNS, MOST_BYTES = 16, 4 * 2**30  # guess: the latest stay
MOST_SENT = 100  # guess: each time is a row of the ledger, and a coordinator must not fill the disk

LEFT_OUT = "left out"  # of the release beside which it lies: this is no part of it and never leaves

Release = ArrayRecord | Mapping[str, Any] | Sequence[float]


class Made(NamedTuple):
    """left_out: (P,), what the release leaves out of the change, for the next round (federation/wire.py)."""

    release: Release
    left_out: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Question:
    """What is asked, as far as the answer depends on it. digest: of all of it; the same question has the same."""

    what: str  # train or evaluate
    run: str
    round: int
    digest: str


def question_of(
    ask: TrainAsk | EvaluateAsk,
    config: RunConfig,
    event: Event,
    weights: Mapping[str, Tensor],
    correction: Mapping[str, Tensor] | None = None,
) -> Question:
    """config: the ask's settings. Where folders lie and on which device is left out, so is a nonce: each ask has another."""
    settings = {key: value for key, value in config.flat().items() if key not in PLACES}
    what = "train" if isinstance(ask, TrainAsk) else "evaluate"
    facts = [what, ask.run, ask.round, settings, ask.spec.digest(), ask.plan, event.to_dict(), correction is not None]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensors in (weights, correction or {}):
        for name in sorted(tensors):
            value = tensors[name].contiguous()
            digest.update(f"{len(name)} {name} {tuple(value.shape)}\n".encode())
            digest.update(value.numpy().tobytes())
    return Question(what, ask.run, ask.round, digest.hexdigest())


class Outbox:
    """One hospital's releases, by the charge that pays for each."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._folder = site.state / "outbox"

    def answered(self, question: Question) -> Release | None:
        """What was released for this very question; None if nothing was for this round or a later one.

        Guarantee: it is what a settled charge pays for, bit by bit.
        Raises: PolicyRefused if the round was answered to another question, its answer is not kept, or a later one was.
        """
        charges = self._site.ledger.charges_of(question.run)
        settled = [c for c in charges if c.row.kind in KINDS[question.what] and c.state == "settled"]
        here = [charge for charge in settled if charge.row.round == question.round]
        if here:
            return self._again(here[-1], question)
        if any(charge.row.round > question.round for charge in settled):
            raise PolicyRefused(
                f"round {question.round} is over here: a later one of this run was answered",
                why="rounds of a run only go up; what was answered is not bought twice",
                fix="go on from the run's latest checkpoint, or begin a new run",
            )
        return None

    def _again(self, charge: Charged, question: Question) -> Release:
        if charge.made.get("question") != question.digest:
            raise PolicyRefused(
                f"round {question.round} of this run was answered here, to another question",
                why="one round, one answer: a second one would be a second charge",
                fix="go on from the run's latest checkpoint with the same settings, or begin a new run",
            )
        kept = self._read(charge.row.seq)
        if kept is None or digest_of(kept.release) != charge.made.get("sha256") or charge.sent >= MOST_SENT:
            raise PolicyRefused(
                f"round {question.round} of this run was answered here, and the answer is not given again",
                why=f"it was an error, which is an answer too; or it is not one of the last {KEPT_ROUNDS} rounds of its run, "
                f"which are kept, to be sent at most {MOST_SENT} times",
                fix="go on from the run's latest checkpoint, or begin a new run",
            )
        return kept.release

    def left_by(self, charge: Charge, question: Question) -> Release | None:
        """What an earlier attempt under this charge had made of this question when it was killed, to be settled now."""
        kept = self._read(charge.seq)
        return kept.release if kept is not None and kept.question == question.digest else None

    def carried(self, question: Question, count: int) -> NDArray[np.float32]:
        """(count,), what the run's last answer before this round left out; zeros if there was none, or it is not kept.

        It lies in one file with the answer, so that a kill parts them at no moment; what was made for an answer that was
        never settled is not looked at, and the same round made again begins with the same.
        """
        charges = self._site.ledger.charges_of(question.run)
        answers = [
            c for c in charges if c.row.kind in KINDS[question.what] and c.state == "settled" and "sha256" in c.made
        ]
        before = [charge.row for charge in answers if charge.row.round < question.round]
        kept = self._read(max(before, key=lambda row: row.round).seq) if before else None
        if kept is not None and kept.left_out is not None and kept.left_out.size == count:
            return kept.left_out
        if before:
            log.warning(
                "what earlier rounds left out of their updates is not kept any more, or of another size: it is lost"
            )
        return np.zeros(count, "float32")

    def put(self, charge: Charge, question: Question, made: Made) -> None:
        """On disk when this returns; what can no longer be asked for goes. Raises: LedgerUnusable if the disk refuses."""
        release = made.release
        if isinstance(release, ArrayRecord):
            arrays = {name: torch.from_numpy(release[name].numpy().copy(order="C")) for name in release}
            if made.left_out is not None:
                arrays[LEFT_OUT] = torch.from_numpy(made.left_out)
            suffix, content = "safetensors", save(arrays, metadata={"question": question.digest})
        else:
            text = json.dumps({"question": question.digest, "release": release}, allow_nan=False)
            suffix, content = "json", text.encode()
        run = hashlib.sha256(question.run.encode()).hexdigest()[:16]
        path = self._folder / f"{run}-{question.what}-{question.round}-{charge.seq}.{suffix}"
        with vault.as_refusal(path):
            self._site.state.mkdir(mode=0o700, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            beside = path.with_name(f"{path.name}.new")
            beside.unlink(missing_ok=True)
            vault.write_private(beside, content)
            os.replace(beside, path)
            vault.sync_folder(self._folder)
            self._clear(path)

    def _read(self, charge: int) -> _Kept | None:
        """None if it is not there, or damaged: then it is as if it was not."""
        for path in self._folder.glob(f"*-{charge}.*"):
            with contextlib.suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
                if path.suffix == ".json":
                    facts = json.loads(path.read_text(encoding="utf-8"))
                    return _Kept(str(facts["question"]), facts["release"])
                if path.suffix == ".safetensors":
                    with safe_open(path, "pt") as file:
                        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                        left_out = tensors.pop(LEFT_OUT, None)
                        asked, release = str(file.metadata()["question"]), array_record(tensors)
                        return _Kept(asked, release, None if left_out is None else left_out.numpy())
        return None

    def _clear(self, new: Path) -> None:
        """Old rounds, old runs, what killed processes left half written, and the oldest until the rest is small enough."""
        files = [file for path in self._folder.iterdir() if (file := _File.of(path)) is not None]
        runs = list(dict.fromkeys(file.run for file in sorted(files, key=lambda f: -f.charge)))[:MOST_RUNS]
        rounds: dict[tuple[str, str], set[int]] = {}
        room = MOST_BYTES
        for file in sorted(files, key=lambda file: (file.path != new, -file.charge)):
            half = file.path.suffix == ".new" and new.name.startswith(file.run)  # this run's: nobody else writes it now
            latest = rounds.setdefault((file.run, file.what), set())
            room -= file.path.stat().st_size
            if (
                half
                or file.run not in runs
                or len(latest | {file.round}) > KEPT_ROUNDS
                or (room < 0 and file.path != new)
            ):
                file.path.unlink(missing_ok=True)
            else:
                latest.add(file.round)


class _Kept(NamedTuple):
    """question: its digest."""

    question: str
    release: Release
    left_out: NDArray[np.float32] | None = None


class _File(NamedTuple):
    path: Path
    run: str
    what: str
    round: int
    charge: int

    @classmethod
    def of(cls, path: Path) -> _File | None:
        """None for a file that is none of ours: it stays."""
        run, _, rest = path.name.partition("-")
        what, *numbers = rest.partition(".")[0].split("-")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            return None
        return cls(path, run, what, int(numbers[0]), int(numbers[1]))


@contextlib.contextmanager
def closing(charge: Charge, question: Question) -> Iterator[None]:
    """An error inside is an answer too, and what it says may hang on the result: a charge that epsilon covers is closed, for
    nothing, so that no further attempt is free under it. Not if the work was ended from outside: that is no answer of it."""
    try:
        yield
    except ENDED:
        raise
    except Exception:
        if charge.event.private:
            with contextlib.suppress(LedgerUnusable):
                charge.settle(question=question.digest)
        raise
