"""The report in the words of others: fields of the Differential Privacy Deployments Registry, terms of NIST SP 800-226.

Field names and enumerations are those of the records and the schema in github.com/opendp/deployments-registry-data, late in
2025 (registry.opendp.org; OpenDP proposes that NIST hosts it). They still change: compare before you submit. `status` is
"Draft": nobody has submitted or reviewed it.
What the registry does not ask for (rows, curve, forecast, attacks) stands beside it under names of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REGISTRY = "Differential Privacy Deployments Registry (OpenDP, proposed for NIST), tier 3 fields, under `registry`"
NIST = "Terms of NIST SP 800-226 (2025): privacy unit, privacy loss, central and local model, threat and trust, composition"
OURS = "All other fields are fedmm's own; no standard for them was found."
CONFORMS_TO = (REGISTRY, NIST, OURS)
FILL_IN = "to be filled in by the data controller"


def registry(document: Mapping[str, Any]) -> dict[str, Any]:
    """The registry's record of what `document` says; every text follows from it."""
    worst = max(document["accounting"], key=lambda entry: float(entry["epsilon"]))
    names = [entry["hospital"] for entry in document["accounting"]]
    return {
        "url_slug": f"fedmm-{document['run']['name']}",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "product": {
                "name": f"fedmm run {document['run']['name']}",
                "data_curators": names,
                "intended_use": f"Research: predicts {', '.join(document['run']['predicts'])}; {FILL_IN}.",
                "data_product_type": "Machine learning model",
                "data_product_region": FILL_IN,
                "description": "Weights of a model of images, report text and audio, trained by federated learning.",
                "publication_date": document["run"]["started"][:10],
                "data_product_sector": "Healthcare",
            },
            "dp_flavor": _flavor(document),
            "privacy_loss": _loss(document, worst),
            "model": _model(document),
            "accounting": {
                "post_processing": "Adam or momentum on the noisy gradient, averaging over rounds and hospitals.",
                "composition": "All releases of a hospital's ledger, adaptively composed by privacy loss distributions "
                "(dp-accounting); no amplification by sampling hospitals is claimed.",
            },
            "implementation": _implementation(document),
            "resources": {"sources": "The rest of this document.", "registry_authors": [f"{FILL_IN}: who submits it"]},
        },
    }


def _flavor(document: Mapping[str, Any]) -> dict[str, str]:
    bare = sum(entry["unprotected"] for entry in document["accounting"])
    return {
        "name": "Approximate DP",
        "input_metric": "number of patients by which two data sets differ, all records of a patient together",
        "bound_on_input_distance": "1 (add or remove one patient)",
        "output_measure": "hockey-stick divergence",
        "bound_on_output_distance": "delta at e^epsilon, for the privacy_parameters",
        "data_domain": "training patients of the hospital: images, report texts, audio and labels",
        "unprotected_quantities": f"{bare} releases without epsilon (exact scores of held-back patients, or runs without "
        "privacy); the times of messages; whether the folder passed its check.",
    }


def _loss(document: Mapping[str, Any], worst: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "privacy_unit": "patient",
        "privacy_unit_description": "Adjacent data sets differ by all records of one patient, added or removed.",
        "privacy_parameters": {"epsilon": worst["epsilon"], "delta": worst["delta"]},
        "privacy_parameters_description": f"Of {worst['hospital']}, {worst['scope']}. Ceiling: {worst['ceiling']:g}.",
    }


def _model(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_name": "Federated",
        "model_name_description": "Each hospital is the trusted curator of its own patients (the central model inside "
        "its walls) and adds the noise before anything leaves; towards coordinator and others nobody is trusted.",
        "actors": "Hospital: trusted with its own patients' data. Coordinator, other hospitals, users of the model, "
        "network: not trusted with confidentiality.",
        "release_type": "Many releases",
        "release_type_description": "One release a round; the ledger composes all of them and refuses at its ceiling.",
        "data_source_type": "Dynamic",
        "data_source_type_description": "Patients may join between runs; the ledger stays with the hospital.",
        "access_type": "Non-interactive",
    }


def _implementation(document: Mapping[str, Any]) -> dict[str, str]:
    plan = document["plan"]
    return {
        "pre_processing_eda_hyperparameter_tuning": "Runs that tune settings through fedmm are charged to the same ledger. "
        f"What was looked at outside of fedmm is not: {FILL_IN}.",
        "mechanisms": f"DP-SGD by patient: Poisson sampling, clipping to {plan['max_grad_norm']:g}, Gaussian noise; Opacus "
        "for per-sample gradients, dp-accounting for the privacy loss. Noise: ChaCha20 keyed by the operating system, "
        f"rounded to a grid (floating point). Timing is not hidden. {document['made']['by']}.",
        "justification": "Noise follows from epsilon, rate and steps; the ceiling is the hospital's own decision. "
        f"Why this epsilon: {FILL_IN}.",
    }
