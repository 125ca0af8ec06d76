"""Scores for the hospital's own eyes: with intervals and by group. Nothing here is called for a release (`metrics.score` is)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmm.schema import Labels
from fedmm.training.intervals import intervals
from fedmm.training.metrics import FEWEST, Predictions, score, summary
from fedmm.training.rates import Flags

UNKNOWN = "unknown"


def score_at_home(p: Predictions, labels: Labels, *, draws: int) -> dict[str, Any]:
    """`score`, with by_group where groups are known and, if draws > 0, `intervals`.

    by_group: by kind and value the same numbers as for the whole. Of a group with fewer than FEWEST patients the number of
    patients only: its scores are chance, and say how single patients did.
    """
    result, rows = score(p, labels), group_rows(p)
    if rows:
        result["by_group"] = {
            kind: {value: _group(p, labels, rows_B) for value, rows_B in values.items()}
            for kind, values in rows.items()
        }
    if draws:
        result["intervals"] = intervals(p, labels, draws=draws, groups=rows)
    return result


def group_rows(p: Predictions) -> dict[str, dict[str, Flags]]:
    """By kind and value, which studies; of the kinds of which anything is known. Not known: "unknown"."""
    found = {}
    for kind, value_B in p.groups.items():
        named_B = np.array([value or UNKNOWN for value in value_B], dtype=np.str_)
        if set(value_B) - {""}:
            found[kind] = {str(value): named_B == value for value in np.unique(named_B)}
    return found


def _group(p: Predictions, labels: Labels, rows_B: Flags) -> dict[str, Any]:
    patients = p.patients_of(rows_B)
    if patients < FEWEST:
        return {"patients": patients, "too_few": True}
    return {"studies": int(rows_B.sum()), "patients": patients, **summary(p, labels, p.probability_BO, rows_B)}
