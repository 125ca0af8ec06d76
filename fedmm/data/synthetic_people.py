"""Invented patients: who they are, when they come, and what becomes of them; all of it from the same hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedmm.schema import Labels
from fedmm.seeds import stream

FAMILY = ("Muster", "Beispiel", "Sample", "Specimen", "Fictus", "Ejemplo", "Exemple", "Placeholder")
GIVEN = ("Ada", "Ben", "Cleo", "Dario", "Edda", "Finn", "Greta", "Hugo", "Ida", "Jonas")
FIRST_YEAR = 2016  # of every patient's first study
PEOPLE = ("sex", "age", "day")
# Labels beside findings and class, written on request.
FURTHER = Labels(
    ordinal_name="stage", ordinal_levels=("I", "II", "III", "IV"), value_name="risk", value_range=(0.0, 1.0),
    time_name="time", event_name="event", time_edges=(90.0, 180.0, 365.0, 730.0),
)  # fmt: skip
# All guesses, so that each level and each interval has its patients. A study's burden is its findings plus 0, 1 or 2 for
# its severity: about 2.2 on average.
MEAN_BURDEN = 2.2
STAGES = (1.25, 2.25, 3.25)  # of the burden and some noise
RETURN_DAYS = 240.0  # mean until the next study without any burden; with burden b it is 1 + b times shorter
EVENT_DAYS, HAZARD_RATIO = 600.0, 1.8  # mean time to the event at the mean burden; of one more finding
OBSERVED_DAYS = (100.0, 1000.0)  # after the last study, then observation ends


class Person(NamedTuple):
    """born: year, month, day."""

    family: str
    given: str
    born: tuple[int, int, int]
    sex: str


def person(seed: int, patient: str) -> Person:
    """The same in manifest and DICOM files. Independent of the hospital's other properties."""
    who = stream(seed, "dicom person", person=patient)
    family, given = str(who.choice(FAMILY)), str(who.choice(GIVEN))
    born = (int(who.integers(1930, 1998)), int(who.integers(1, 13)), int(who.integers(1, 29)))
    return Person(family, given, born, str(who.choice(["F", "M"])))


def course(seed: int, patient: str, burden_S: Sequence[int], *, missing: float) -> list[dict[str, str]]:
    """Cells of PEOPLE and FURTHER for each of a patient's studies. missing: share of the further labels left empty.

    The sicker, the sooner the next study. The event, or the end of observation, is one day in a patient's life: each study
    counts the days until then.
    """
    rng = stream(seed, "synthetic course", patient=patient)
    gap_S = [1 + round(rng.exponential(RETURN_DAYS / (1 + burden))) for burden in burden_S]
    day_S = np.cumsum([0, *gap_S[:-1]])
    until_event = rng.exponential(EVENT_DAYS / HAZARD_RATIO ** (burden_S[-1] - MEAN_BURDEN))
    until_end = rng.uniform(*OBSERVED_DAYS)
    last_day, event = day_S[-1] + min(until_event, until_end), until_event <= until_end
    who, rows = person(seed, patient), []
    for day, burden in zip(day_S.tolist(), burden_S, strict=True):
        stage = FURTHER.ordinal_levels[int(np.digitize(burden + 0.5 * rng.normal(), STAGES))]
        risk = 1 / (1 + np.exp(-0.9 * (burden - MEAN_BURDEN) - 0.3 * rng.normal()))
        labels = {
            "stage": stage,
            "risk": f"{risk:.3f}",
            "time": str(max(1, round(last_day - day))),
            "event": str(int(event)),
        }
        knows_stage, knows_risk, knows_time = rng.random(3) >= missing
        known = {"stage": knows_stage, "risk": knows_risk, "time": knows_time, "event": knows_time}
        age = FIRST_YEAR - who.born[0] + day // 365
        people = {"sex": who.sex, "age": str(age), "day": str(day)}
        rows.append(people | {name: value if known[name] else "" for name, value in labels.items()})
    return rows
