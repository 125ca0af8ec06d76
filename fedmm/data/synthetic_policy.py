"""site.toml of a synthetic hospital."""

from __future__ import annotations

import json

from fedmm.schema import Labels

FINDINGS = ("effusion", "consolidation", "cardiomegaly")
SEVERITY = ("none", "mild", "severe")


def policy(name: str, patients: int, *, further: Labels) -> str:
    """further: labels beside findings and class; Labels() for none."""
    return f"""\
# What this hospital alone decides. The data beside this file is synthetic: it holds no real patient.
# THIS IS A RESEARCH POLICY. For real patients start from deploy/site.example.toml.

[hospital]
{f'name = "{name}"':<28} # public name; appears in reports of a run

[labels]                     # agreed by all hospitals: columns of manifest.csv; findings are 0, 1 or empty
findings = {json.dumps(FINDINGS)}
class_name = "severity"      # one of class_values, or empty
class_values = {json.dumps(SEVERITY)}
{_lines(further)}
[privacy]                    # the promise to each patient; it covers all runs together, for ever
epsilon = 20.0               # ceiling of the ledger; a round that would pass it is refused here
delta = 1e-4                 # probability with which the promise may fail; below 1 / (10 x public_patients)
{f"public_patients = {min(patients, 900)}":<28} # a lower bound of the patients here that everyone may know
allow_not_private = true     # runs without privacy may use this folder: right for invented data only

[release]                    # what may leave besides noisy weights
counts = "declared"          # public_patients may be told as this hospital's weight
metrics = "exact"            # test scores leave unprotected: right for invented data only

[ledger]
path = "ledger.sqlite"       # where every release is recorded; keep it as long as the hospital exists
"""


def _lines(labels: Labels) -> str:
    """Of [labels]: what is not as in Labels()."""
    return "".join(
        f"{name} = {json.dumps(value)}\n" for name, value in labels.model_dump(exclude_defaults=True).items()
    )
