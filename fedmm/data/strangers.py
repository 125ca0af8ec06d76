"""The copy of a hospital on which an audit trains: invented patients, and canaries whose presence was decided by a coin.

The copy has its own ledger and the hospital's own policy. Real patients are in it only where the policy says that the data
may be used without protection (`privacy.allow_not_private`: synthetic or public): what an audit prints hangs on whom it
trained on, so with real patients it would be a release that nobody was charged for.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from fedmm.config import SITE_FILE, SiteConfig, load_site
from fedmm.data.check import read_folder
from fedmm.data.manifest import KEYS, Study
from fedmm.errors import HospitalInvalid
from fedmm.schema import MODALITIES, Labels

BACKGROUND = 40  # patients of the hospital in a copy: enough for the path of the data, few enough for minutes
OTHERS = 4  # invented patients where no real one may be: a copy without patients would not be a hospital
KINDS = ("stranger", "one modality", "mislabelled")
FEWEST = 2  # canaries of a kind
SIZE, RATE, SECONDS, WORDS = 64, 8000, 2.0, 40


@dataclass(frozen=True)
class Canary:
    """patient_id: in the copy's manifest.  kind: one of KINDS.  inside: trained on."""

    patient_id: str
    kind: str
    inside: bool


def check_source(source: Path, site: SiteConfig) -> None:
    """Before anything is written. Raises: HospitalInvalid for a folder whose patients would be in the copy and cannot be read."""
    if site.privacy.allow_not_private:
        _patients(source)


def copy_hospital(source: Path, target: Path, *, canaries: int, delta: float, rng: np.random.Generator) -> list[Canary]:
    """Write `target`, a hospital folder with the policy of `source`, without its ledger.

    canaries: of each kind; each is inside with probability 1/2, and otherwise among the test patients. Of "mislabelled"
    there are at most as many as the source has patients to spare, and none where its patients may not be used.
    delta: at which the copy's ledger is read.
    Raises: HospitalInvalid, PolicyRefused; OSError.
    """
    site = load_site(source)
    target.mkdir(parents=True)
    (target / SITE_FILE).write_text(_policy(site, delta), encoding="utf-8")
    rows: list[dict[str, str]] = []
    spare: list[list[Study]] = []
    if site.privacy.allow_not_private:
        here, spare = _patients(source)
        for number, studies in enumerate(here):
            rows += [_real(target, site.labels, study, f"p{number}", study.split, rng=None) for study in studies]
    else:
        rows += [_invented(target, site, f"p{n}", "train" if n % 2 else "test", MODALITIES, rng) for n in range(OTHERS)]
    made: list[Canary] = []
    for kind in KINDS:
        count = min(canaries, len(spare)) if kind == "mislabelled" else canaries
        if count < FEWEST:  # nobody could be guessed in and another one out
            continue
        for number in range(count):
            canary = Canary(f"{kind.replace(' ', '-')}-{number}", kind, bool(rng.integers(2)))
            split = "train" if canary.inside else "test"
            if kind == "mislabelled":
                rows += [_real(target, site.labels, s, canary.patient_id, split, rng=rng) for s in spare[number]]
            else:
                seen = MODALITIES if kind == "stranger" else _one(site, number)
                rows.append(_invented(target, site, canary.patient_id, split, seen, rng))
            made.append(canary)
    _write_manifest(target, site.labels, [rows[i] for i in _by_patient(rows, rng)])
    return made


def _policy(site: SiteConfig, delta: float) -> str:
    """site.toml of the copy: no scores leave, no count is bought, the ledger is the copy's own."""
    kept = site.model_dump(mode="json")
    kept["privacy"]["epsilon"] = (
        20.0  # as much as a run may ask for; of the copy's own ledger; the hospital's is never opened
    )
    kept["privacy"]["delta"] = min(delta, site.privacy.delta)
    kept["release"]["metrics"] = "no"
    if kept["release"]["counts"] == "noisy":
        kept["release"]["counts"] = "declared"
    kept["runs"] |= {"min_patients": 0, "kinds": ["train", "evaluate"]}
    kept["ledger"] = {"path": "ledger.sqlite"}
    lines: list[str] = []
    for section, values in kept.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()), ""]
    return "\n".join(lines)


def _patients(source: Path) -> tuple[list[list[Study]], list[list[Study]]]:
    """Studies of the first patients, and of all others. Raises: HospitalInvalid."""
    _, table = read_folder(source)
    if table.problems:
        raise HospitalInvalid("the hospital folder fails its own check", fix=f"fedmm check {source}")
    found: dict[str, list[Study]] = {}
    for study in table.studies:
        found.setdefault(study.patient_id, []).append(study)
    everybody = list(found.values())
    return everybody[:BACKGROUND], everybody[BACKGROUND:]


def _one(site: SiteConfig, number: int) -> Sequence[str]:
    """A canary of one modality has the report, or the others in turn where no reports are declared."""
    declared = site.release.modalities
    return ("report",) if "report" in declared else (declared[number % len(declared)],)


# --- rows and files ---------------------------------------------------------------------------------------------------


def _real(
    target: Path, labels: Labels, study: Study, patient: str, split: str, *, rng: np.random.Generator | None
) -> dict[str, str]:
    """A study of the source under another name. rng: labels are not its own."""
    row = {"patient_id": patient, "study_id": f"{patient}-{study.row}", "split": split}
    for name, path in study.paths.items():
        link = target / name / f"{patient}-{study.row}{path.suffix}"
        link.parent.mkdir(exist_ok=True)
        try:
            os.link(path, link)
        except OSError:
            shutil.copyfile(path, link)
        row[name] = f"{name}/{link.name}"
    if rng is None:
        return row | _told(labels, study)
    return row | _drawn(labels, rng, other_than=study)


def _invented(
    target: Path, site: SiteConfig, patient: str, split: str, modalities: Sequence[str], rng: np.random.Generator
) -> dict[str, str]:
    """One study like no patient's: blots, words that do not exist, tones; and labels by chance."""
    row = {"patient_id": patient, "study_id": f"{patient}-0", "split": split}
    for name in (m for m in modalities if m in site.release.modalities):
        path = target / name / f"{patient}.{SUFFIX[name]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_content(name, rng))
        row[name] = f"{name}/{path.name}"
    return row | _drawn(site.labels, rng)


SUFFIX = {"image": "png", "report": "txt", "audio": "wav"}


def _content(modality: str, rng: np.random.Generator) -> bytes:
    if modality == "report":
        letters = rng.integers(97, 123, (WORDS, 7), dtype=np.uint8)
        return b" ".join(bytes(word) for word in letters)
    made = io.BytesIO()
    if modality == "image":
        blots = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        blots.resize((SIZE, SIZE), Image.Resampling.NEAREST).save(made, format="PNG")
    else:
        time = np.arange(int(RATE * SECONDS)) / RATE
        wave = sum(np.sin(2 * np.pi * hertz * time) for hertz in rng.uniform(100, 3500, 5)) / 6
        soundfile.write(made, wave, RATE, format="WAV", subtype="PCM_16")
    return made.getvalue()


def _told(labels: Labels, study: Study) -> dict[str, str]:
    """The study's labels as cells."""
    cells = {name: "" if v is None else f"{v:.0f}" for name, v in zip(labels.findings, study.findings, strict=True)}
    if labels.class_name and study.label_class is not None:
        cells[labels.class_name] = labels.class_values[study.label_class]
    for name, value in zip(labels.further, study.further, strict=True):
        if value is not None:
            cells[name] = labels.ordinal_levels[int(value)] if name == labels.ordinal_name else f"{value:g}"
    return cells


def _drawn(labels: Labels, rng: np.random.Generator, *, other_than: Study | None = None) -> dict[str, str]:
    """Labels by chance; of findings and class the opposite where the true ones are given."""
    findings = rng.integers(0, 2, len(labels.findings)).tolist()
    chosen = int(rng.integers(len(labels.class_values) or 1))
    if other_than is not None:
        findings = [f if t is None else 1 - int(t) for f, t in zip(findings, other_than.findings, strict=True)]
        if chosen == other_than.label_class:
            chosen = (chosen + 1) % len(labels.class_values)
    cells = {name: str(value) for name, value in zip(labels.findings, findings, strict=True)}
    if labels.class_name:
        cells[labels.class_name] = labels.class_values[chosen]
    if labels.ordinal_name:
        cells[labels.ordinal_name] = str(rng.choice(labels.ordinal_levels))
    if labels.value_name:
        cells[labels.value_name] = f"{rng.uniform(*labels.value_range):g}"
    if labels.time_name:
        cells |= {labels.time_name: f"{rng.uniform(0.5, 1) * labels.time_edges[-1]:g}", labels.event_name: "1"}
    return cells


def _by_patient(rows: Sequence[Mapping[str, str]], rng: np.random.Generator) -> Iterator[int]:
    """Rows in an order that says nothing, a patient's studies together."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["patient_id"], []).append(place)
    names = list(places)
    for number in rng.permutation(len(names)):
        yield from places[names[number]]


def _write_manifest(target: Path, labels: Labels, rows: Sequence[Mapping[str, str]]) -> None:
    columns = [*KEYS[:2], *MODALITIES, *labels.columns, KEYS[2]]
    with (target / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
