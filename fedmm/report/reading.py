"""A run folder, read once and with care: what the page shows without asking again whether it is there.

config.json and run.jsonl are written by our own code: a part that is missing or wrong is damage, and refused. Two things
in them come from other parties: names and sentences, which may be any text (the page escapes them), and scores, which
may be any JSON (`_score` keeps what has the form of `training.metrics.score` and leaves the rest out). Noisy scores are
the coordinator's own arithmetic (`training.histograms.noisy_score`); they are read with the same care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmm.errors import ConfigError, Refusal
from fedmm.privacy.plan import PrivacyPlan
from fedmm.report.record import read_config, read_rounds
from fedmm.schema import MODALITIES, SUBSETS, Labels

Counts = Sequence[Sequence[int]]
# Kinds of messages as in federation.messages, which cannot be imported here: it brings torch. A test keeps them equal.
HELLO, UPDATE, HISTOGRAM, EXACT, WITHHELD = "hello", "weights", "score histogram", "exact scores", "scores withheld"


@dataclass(frozen=True)
class Summary:
    """None, or an output that is missing in `auroc`: not defined at that hospital."""

    accuracy: float | None
    mean_auroc: float | None
    auroc: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """Scores of one hospital after one round.

    studies: > 0.  alone, without: by modality; having: how many studies have it.  subsets: by name in SUBSETS, with the
    number of studies that have all of it.  collapsed: what gets one answer for nearly everybody.
    confusion: by label, rows are the truth.
    bins: by number of the bin: mean predicted probability, observed rate, count > 0.
    """

    studies: int
    majority: float | None
    overall: Summary
    alone: Mapping[str, Summary]
    without: Mapping[str, Summary]
    having: Mapping[str, int]
    subsets: Mapping[str, tuple[int, Summary]]
    collapsed: Sequence[str]
    confusion: Mapping[str, Counts]
    bins: Mapping[int, tuple[float, float, int]]


@dataclass(frozen=True)
class Estimate:
    """value: None where it is not known. low, high: 95 % interval, 0 to 1 where nothing is known."""

    value: float | None = None
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Noisy:
    """Scores from a noisy histogram. patients: about so many.  bins: as in Score, with the interval of the rate."""

    patients: int
    accuracy: Estimate
    mean_auroc: Estimate
    auroc: Mapping[str, Estimate]
    bins: Mapping[int, tuple[float, Estimate, int]]
    calibration_error: float | None


@dataclass(frozen=True)
class Statement:
    """What a hospital's ledger said in its last answer of `round`: everything so far, earlier runs included.

    signature: of the hash, with the key whose public half is `key`; checked by the coordinator before it was kept.
    """

    round: int
    spent: float
    ceiling: float
    delta: float
    unprotected: int
    sequence: int
    hash: str
    signature: str
    key: str


@dataclass(frozen=True)
class Arrived:
    """A message that left a hospital. what: its kind.  bytes: of its content."""

    hospital: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Missed:
    """A hospital that did not take part; round 0: from the start."""

    round: int
    hospital: str
    kind: str
    code: int
    reason: str


@dataclass(frozen=True)
class Round:
    """scores: exact ones by hospital.  noisy: noisy ones by hospital; pooled: of those together."""

    number: int
    private: bool
    evaluated: bool
    trained: Sequence[str]
    statements: Mapping[str, Statement]
    scores: Mapping[str, Score]
    noisy: Mapping[str, Noisy]
    pooled: Noisy | None
    withheld: Sequence[str]
    missed: Sequence[Missed]
    arrived: Sequence[Arrived]
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """hospitals: all that took part.  private: the plan, config.json and every single round say so.

    introduced: what left hospitals before the first round.
    """

    name: str
    started: str
    private: bool
    settings: Mapping[str, Any]
    labels: Labels
    plan: PrivacyPlan
    hospitals: Sequence[str]
    absent: Sequence[Missed]
    introduced: Sequence[Arrived]
    rounds: Sequence[Round]

    @property
    def scored(self) -> list[Round]:
        """Rounds of which there are exact scores."""
        return [r for r in self.rounds if r.scores]

    @property
    def final(self) -> Mapping[str, Score]:
        """The last exact scores of the run by hospital; empty when there are none."""
        return self.scored[-1].scores if self.scored else {}

    @property
    def noisy(self) -> Round | None:
        """The round with noisy scores, where there is one."""
        return next((r for r in reversed(self.rounds) if r.noisy), None)

    @property
    def withheld(self) -> list[str]:
        """Hospitals whose policy keeps scores at home."""
        return sorted({name for r in self.rounds for name in r.withheld})

    @property
    def statements(self) -> dict[str, Statement]:
        """The last one of each hospital."""
        last = {name: said for r in self.rounds for name, said in r.statements.items()}
        return {name: last[name] for name in self.hospitals if name in last}

    @property
    def missed(self) -> list[Missed]:
        return [*self.absent, *(m for r in self.rounds for m in r.missed)]

    @property
    def unprotected(self) -> dict[str, int]:
        """Releases that no epsilon covers, where a ledger counts any."""
        return {name: said.unprotected for name, said in self.statements.items() if said.unprotected > 0}

    @property
    def arrived(self) -> list[Arrived]:
        """Every message that left a hospital, as far as the coordinator heard it."""
        return [*self.introduced, *(a for r in self.rounds for a in r.arrived)]

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        """Bins of the final exact scores, joined over hospitals by their counts."""
        joined = []
        for b in sorted({b for s in self.final.values() for b in s.bins}):
            parts = [s.bins[b] for s in self.final.values() if b in s.bins]
            n = sum(count for _, _, count in parts)
            joined.append((sum(p * c for p, _, c in parts) / n, sum(o * c for _, o, c in parts) / n, n))
        return joined

    def pooled(self, name: str) -> Counts | None:
        """The label's confusion table summed over the final exact scores."""
        tables = [s.confusion[name] for s in self.final.values() if name in s.confusion]
        return [[sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)] or None

    def mean(
        self, value: Callable[[Score], float | None], weight: Callable[[Score], float] = lambda score: score.studies
    ) -> float | None:
        """Of the final exact scores over the hospitals where it is defined, weighted by studies."""
        return weighted((value(score), weight(score)) for score in self.final.values())


def weighted(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """Mean of (value, weight); None where no value is defined."""
    known = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


def load_run(folder: Path) -> Run:
    """Raises: ConfigError if it is no run folder, damaged, or of another version."""
    config, lines = read_config(folder), read_rounds(folder)
    try:
        labels = Labels.model_validate(config["labels"])
        rounds = [_round(line, labels) for line in lines]
        seen = {str(name) for r in rounds for name in [*r.statements, *r.scores, *r.noisy, *r.withheld]}
        hospitals = list(dict.fromkeys([*map(str, config["hospitals"]), *sorted(seen)]))
        absent = [_missed(0, failure) for failure in config.get("absent", [])]
        plan = PrivacyPlan.from_flat(config["plan"])
        return Run(
            name=str(config["run"]),
            started=str(config["started"]).replace("T", " ", 1),
            private=config.get("private") is True and plan.private and all(r.private for r in rounds),
            settings=dict(config["settings"]),
            labels=labels,
            plan=plan,
            hospitals=hospitals,
            absent=absent,
            introduced=_arrived(config["arrived"]),
            rounds=rounds,
        )
    except (KeyError, TypeError, ValueError, AttributeError, Refusal) as error:
        raise ConfigError(
            f"{folder} is damaged or of another version of fedmm", why=f"{type(error).__name__}: {error}"
        ) from None


def _round(line: Mapping[str, Any], labels: Labels) -> Round:
    number, arrived = int(line["round"]), _arrived(line["arrived"])
    # what a hospital calls its scores does not count, what it sent does: only a histogram was paid for
    paid = {a.hospital for a in arrived if a.what == HISTOGRAM}
    exact = {name: _score(raw, labels) for name, raw in line["scores"].items() if name not in paid}
    noisy = {name: _noisy(raw, labels) for name, raw in line["scores"].items() if name in paid}
    return Round(
        number=number,
        private=line["private"] is True,
        evaluated=bool(line["evaluated"]),
        trained=[str(name) for name in line["trained"]],
        statements={name: _statement(number, said) for name, said in line["epsilon"].items()},
        scores={name: score for name, score in exact.items() if score is not None},
        noisy={name: score for name, score in noisy.items() if score is not None},
        pooled=_noisy(line.get("pooled"), labels),
        withheld=[str(name) for name in line["withheld"]],
        missed=[_missed(number, failure) for failure in line["failures"]],
        arrived=arrived,
        bytes_up=int(line["bytes_up"]),
        bytes_down=int(line["bytes_down"]),
        seconds=float(line["seconds"]),
    )


def _statement(number: int, said: Mapping[str, Any]) -> Statement:
    return Statement(
        round=number,
        spent=float(said["spent"]),
        ceiling=float(said["ceiling"]),
        delta=float(said["delta"]),
        unprotected=int(said["unprotected"]),
        sequence=int(said["ledger_sequence"]),
        hash=str(said["ledger_hash"]),
        signature=str(said["ledger_signature"]),
        key=str(said["ledger_key"]),
    )


def _arrived(raw: Iterable[Mapping[str, Any]]) -> list[Arrived]:
    return [Arrived(str(each["hospital"]), str(each["what"]), int(each["bytes"])) for each in raw]


def _missed(number: int, failure: Mapping[str, Any]) -> Missed:
    return Missed(number, str(failure["hospital"]), failure["kind"], int(failure["code"]), str(failure["reason"]))


# --- scores: any JSON in, typed numbers out ---------------------------------------------------------------------------


def _score(raw: Any, labels: Labels) -> Score | None:
    """None if it does not even say of how many studies."""
    studies = _count(_at(raw, "studies"))
    if not studies:
        return None
    parts = {m: part for m in MODALITIES if isinstance(part := _at(raw, "by_modality", m), dict)}
    values = {name: ["no", "yes"] for name in labels.findings}
    if labels.class_name:
        values[labels.class_name] = list(labels.class_values)
    tables = {name: _confusion(_at(raw, "confusion", name), expected) for name, expected in values.items()}
    return Score(
        studies=studies,
        majority=_number(_at(raw, "majority")),
        overall=_summary(raw, labels),
        alone={m: _summary(_at(part, "only"), labels) for m, part in parts.items()},
        without={m: _summary(_at(part, "without"), labels) for m, part in parts.items()},
        having={m: _count(part.get("studies")) or 0 for m, part in parts.items()},
        subsets={
            name: (count, _summary(part, labels))
            for name, part in ((name, _at(raw, "by_subset", name)) for name in SUBSETS)
            if (count := _count(_at(part, "studies")))
        },
        collapsed=[name for name in values if _at(raw, "collapsed", name, "collapsed") is True],
        confusion={name: table for name, table in tables.items() if table is not None},
        bins=_bins(_at(raw, "calibration")),
    )


def _summary(raw: Any, labels: Labels) -> Summary:
    areas = {name: _number(_at(raw, "auroc", name)) for name in labels.outputs}
    defined = {name: area for name, area in areas.items() if area is not None}
    return Summary(_number(_at(raw, "accuracy")), _number(_at(raw, "mean_auroc")), defined)


def _confusion(raw: Any, values: Sequence[str]) -> Counts | None:
    rows = _at(raw, "counts")
    if _at(raw, "values") != values or not isinstance(rows, list) or len(rows) != len(values):
        return None
    square = all(isinstance(row, list) and len(row) == len(values) for row in rows)
    return rows if square and all(_count(n) is not None for row in rows for n in row) else None


def _bins(raw: Any) -> dict[int, tuple[float, float, int]]:
    columns = [_at(raw, key) for key in ("predicted", "observed", "count")]
    found = {}
    for b, (p, o, n) in enumerate(zip(*(c if isinstance(c, list) else [] for c in columns), strict=False)):
        predicted, observed, count = _number(p), _number(o), _count(n)
        if predicted is not None and observed is not None and count:
            found[b] = (predicted, observed, count)
    return found


def _noisy(raw: Any, labels: Labels) -> Noisy | None:
    """None if it is no object that calls itself noisy."""
    if _at(raw, "noisy") is not True:
        return None
    areas = {name: _estimate(raw, "auroc", name) for name in labels.outputs}
    columns = [_at(raw, "calibration", key) for key in ("predicted", "observed", "observed_interval", "count")]
    bins = {}
    for b, (p, o, interval, n) in enumerate(zip(*(c if isinstance(c, list) else [] for c in columns), strict=False)):
        predicted, count = _number(p), _count(n)
        if predicted is not None and count:
            bins[b] = (predicted, _between(o, interval), count)
    return Noisy(
        patients=_count(_at(raw, "patients")) or 0,
        accuracy=_estimate(raw, "accuracy"),
        mean_auroc=_estimate(raw, "mean_auroc"),
        auroc=areas,
        bins=bins,
        calibration_error=_number(_at(raw, "calibration", "expected_calibration_error")),
    )


def _estimate(raw: Any, key: str, *rest: str) -> Estimate:
    return _between(_at(raw, key, *rest), _at(raw, f"{key}_interval", *rest))


def _between(value: Any, interval: Any) -> Estimate:
    """A value outside of its interval, or without one, is not known."""
    ends = [_number(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else []
    low, high = ends if ends else (None, None)
    found = _number(value)
    if low is None or high is None or not low <= (low if found is None else found) <= high:
        return Estimate()
    return Estimate(found, low, high)


def _at(value: Any, *keys: str) -> Any:
    """value[a][b]…, None where a key is missing or a level is no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> float | None:
    """A share, an area or a probability: 0 to 1, which NaN is not."""
    return float(value) if type(value) in (int, float) and 0 <= value <= 1 else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
