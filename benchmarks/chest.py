"""The real chest pack (../shared/data/chest): privacy, fusions, subsets of modalities, majority and a central linear model.

Settings were chosen on synthetic hospitals (docs/decisions.md); nothing is chosen on the held-back patients scored here.
`finding3` is confounded with the hospital, so the tasks inside a hospital come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import OPEN, Job, predictions, run_all

PACK = Path("../shared/data/chest")
SETTINGS = {"model.audio": "cnn"}
EPSILONS = (8.0, 3.0, 1.0)
DRAWS = 1000
REPEATS = 3
FUSIONS = (
    "additive", "weighted", "gated", "cross_attention", "tokens", "adapters", "mimo", "mean_decision",
    "weighted_decision", "product_of_experts", "stacking", "autoencoder", "low_rank", "hierarchical", "timeline", "aligned",
)  # fmt: skip
NEEDS = {"aligned": {"model.report": "gru", "model.audio": "recurrent"}}  # encoders that give steps
SITES: Mapping[str, tuple[str, ...]] = {  # task: hospitals inside which it is asked
    "abnormal": ("nih_us_ap", "nih_us_pa"),
    "icu": ("mhh_hannover", "cases_eu", "cases_row", "cases_unspec"),
}


def measure(*, quick: bool) -> dict[str, Any]:
    """By run and task: score, 95 % interval by patient, of the first run; `runs`: the score of each repeat."""
    if not PACK.is_dir():
        raise SystemExit(f"{PACK} is not here: this benchmark needs the chest pack")
    levels = {"open": OPEN} | {f"epsilon {e:g}": {"privacy.epsilon": e} for e in (EPSILONS[:1] if quick else EPSILONS)}
    jobs = [
        Job(f"{level} concat", {**SETTINGS, **settings}, repeat)
        for level, settings in levels.items()
        for repeat in range(1 if quick else REPEATS)
    ]
    jobs += [
        Job(f"{level} {fusion}", {**SETTINGS, **levels[level], "model.fusion": fusion, **NEEDS.get(fusion, {})})
        for fusion in (FUSIONS[:1] if quick else FUSIONS)
        for level in ("open", "epsilon 8")
    ]
    found: dict[str, Any] = {}
    for job, scores in sorted(run_all(jobs, made, tasks), key=lambda pair: (pair[0].name, pair[0].repeat)):
        for task, value in scores.items():
            figure = found.setdefault(f"{job.name}: {task}", {**value, "runs": []})
            figure["runs"].append(value["score"])
    return found | linear()


def made(folder: Path) -> None:
    from fedmm.data.chest import import_chest

    import_chest(PACK, folder)


def tasks(run: Path, hospitals: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Scores of one model: within hospitals, of all, of each hospital, of each subset of modalities."""
    from fedmm.models.store import load_spec
    from fedmm.training.home import score_at_home
    from fedmm.training.metrics import join

    labels = load_spec(run).labels
    of = dict(zip((hospital.name for hospital in hospitals), predictions(run, hospitals), strict=True))
    result: dict[str, dict[str, Any]] = {}
    for task, names in SITES.items():
        there = score_at_home(join([of[name] for name in names]), labels, draws=DRAWS)
        result[f"{task}, AUROC within its hospitals"] = _figure(
            there["auroc"][task], there["intervals"]["auroc"][task], 0.5, there["patients"]
        )
    everybody = join(list(of.values()), list(of))
    whole = score_at_home(everybody, labels, draws=DRAWS)
    result["finding3, accuracy"] = _figure(
        whole["accuracy"], whole["intervals"]["accuracy"], whole["majority"], whole["patients"]
    )
    for name, scores in of.items():
        own = score_at_home(scores, labels, draws=DRAWS)
        result[f"{name}, finding3, accuracy"] = _figure(
            own["accuracy"], own["intervals"]["accuracy"], own["majority"], own["patients"]
        )
        for task in labels.findings:
            if own["auroc"][task] is not None:
                interval = own["intervals"]["auroc"][task]
                result[f"{name}, {task}, AUROC"] = _figure(own["auroc"][task], interval, 0.5, own["patients"])
    for subset, part in whole["by_subset"].items():
        rows_B = everybody.having(subset)
        accuracy, interval = _accuracy(everybody, subset, rows_B, len(labels.findings))
        result[f"given {subset}: finding3, accuracy"] = _figure(accuracy, interval, None, part["patients"])
        for task in labels.findings:
            result[f"given {subset}: {task}, AUROC"] = _figure(part["auroc"][task], None, 0.5, part["patients"])
    return result


def _figure(score: float | None, interval: Any, chance: float | None, patients: int) -> dict[str, Any]:
    return {"score": score, "interval": interval, "chance": chance, "patients": patients}


def _accuracy(p: Any, subset: str, rows_B: Any, findings: int) -> tuple[float, list[float]]:
    """Of the class, on the studies that have the subset, given nothing else; interval by patient."""
    known_B = rows_B & (p.class_B >= 0)
    hit_B = p.subset[subset][:, findings:].argmax(1) == p.class_B
    return _interval(hit_B[known_B], p.patient_B[known_B])


def _interval(hit_N: Any, patient_N: Any) -> tuple[float, list[float]]:
    _, owner_N = np.unique(patient_N, return_inverse=True)
    hits_P, studies_P = np.bincount(owner_N, hit_N.astype(float)), np.bincount(owner_N)
    weight_DP = np.random.default_rng(0).multinomial(len(hits_P), np.full(len(hits_P), 1 / len(hits_P)), DRAWS)
    low, high = np.percentile((weight_DP @ hits_P) / (weight_DP @ studies_P), [2.5, 97.5])
    return float(hit_N.mean()), [float(low), float(high)]


def linear() -> dict[str, Any]:
    """The central linear model, for finding3 and, within their hospitals, abnormal and icu."""
    import tempfile

    import torch

    from benchmarks.linear import batches, features, fit
    from fedmm.config import load_site
    from fedmm.training.rates import auroc

    with tempfile.TemporaryDirectory() as place:
        made(Path(place))
        hospitals = sorted(path for path in Path(place).iterdir() if path.is_dir())
        labels = load_site(hospitals[0]).labels
        train, test = (dict(zip((h.name for h in hospitals), part, strict=True)) for part in batches(hospitals, labels))
    found = {}
    for task, names in {"finding3": tuple(train), **SITES}.items():

        def cut(of: Mapping[str, Any], task: str = task, names: Sequence[str] = names) -> tuple[Any, Any, Any]:
            x, y, owner, first = [], [], [], 0
            for name in names:
                batch = of[name]
                label = batch.class_B if task == "finding3" else batch.finding_BF[:, labels.findings.index(task)]
                known = (label >= 0) & ~label.float().isnan()
                x.append(features(batch)[known])
                y.append(label[known].long())
                owner.append(batch.patient_B[known] + first)
                first += batch.patients
            return torch.cat(x), torch.cat(y), torch.cat(owner)

        model = fit(*cut(train), classes=3 if task == "finding3" else 2)
        x_NX, truth_N, owner_N = cut(test)
        with torch.no_grad():
            logits = model(x_NX)
        if task == "finding3":
            score, interval = _interval((logits.argmax(1) == truth_N).numpy(), owner_N.numpy())
            found[f"central linear: {task}, accuracy"] = _figure(score, interval, None, len(set(owner_N.tolist())))
        else:
            area = auroc((logits[:, 1] - logits[:, 0]).double().numpy(), truth_N.numpy() > 0)
            name = f"central linear: {task}, AUROC within its hospitals"
            found[name] = _figure(area, None, 0.5, len(set(owner_N.tolist())))
    return found
