"""Invented hospitals that a newcomer can train on: image, report and audio that each tell a part of a hidden state.

A study's evidence for a label in a modality is a number x = ±d/2 + N(0, 1); shapes and sound levels follow x smoothly.
What a modality can tell is thus set by d (a perfect reader's AUROC is Phi(d / sqrt 2)), not by the art of drawing: the
signal is strong and simple enough for small private models; the difficulty is that each modality knows only a part.

Shape letters: H W pixels, L samples.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import soundfile
from numpy.typing import NDArray
from PIL import Image

from fedmm.config import SITE_FILE
from fedmm.data.synthetic_people import FAMILY, FIRST_YEAR, FURTHER, PEOPLE, course, person
from fedmm.data.synthetic_policy import FINDINGS, SEVERITY, policy
from fedmm.errors import ConfigError
from fedmm.schema import Labels
from fedmm.seeds import seed_for, stream

Array = NDArray[np.float64]
DRAWN = ("image", "report", "audio")  # the modalities that are invented here
COLUMNS = ("patient_id", "study_id", *DRAWN, *PEOPLE, *FINDINGS, "severity", "split")
LABELS = ("default", "all")  # findings and severity; and those of FURTHER
STAMP, PARTIAL = "synthetic.json", "synthetic.partial.json"
Style = tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
VERSION = 2  # of the generator; a folder of another version is not the same folder
# For 4 x 200 patients, seed 7, linear models: mean AUROC of image 0.78, report 0.81, audio 0.75; fused 0.92 with 30 %
# missing, 0.97 on complete studies, 0.88 when trained with the noise of epsilon 8 and 30 % missing.  # measured
IMAGE_D = {"effusion": 2.5, "consolidation": 0.7, "cardiomegaly": 2.5}  # perfect reader: 0.96, 0.69, 0.96
AUDIO_D = {"consolidation": 1.9, "mild": 2.9, "severe": 2.9}  # 0.91, 0.98, 0.98
MENTIONED, WRONG, HEDGED = 0.75, 0.08, 0.10  # share of findings named; of those, share wrong, share hedged
LABEL_MISSING = 0.03  # guess
STUDIES_P = (0.30, 0.25, 0.20, 0.15, 0.10)  # of 1 … 5 studies; mean 2.5


class Site(NamedTuple):
    """What makes a hospital different.

    image: format, (H, W), exponent of the contrast curve, noise.  sound: format, Hz, seconds.  style: of writing.
    prevalence: of each finding.  absent: factors on `missing` for image, report, audio; their mean is 1.
    """

    format: str
    size: tuple[int, int]
    gamma: float
    grain: float
    sound: str
    rate: int
    seconds: float
    style: Style
    prevalence: tuple[float, float, float]
    absent: tuple[float, float, float]


# How hospitals write: opening, joint, and sentences that affirm {x}, that negate {n}, that are in doubt about {n}.
STYLES: tuple[Style, ...] = (
    ("FINDINGS: ", " ", ("There is {x}.", "Evidence of {x}."), ("There is no {n}.", "No {n}.", "No evidence of {n}."),
     ("Possible {n}.", "{n} cannot be excluded.")),
    ("", "; ", ("{x} present", "{x}"), ("no {n}", "without evidence of {n}"), ("query {n}", "possible {n}")),
    ("Chest radiograph, one view.\n- ", "\n- ", ("{x} is seen.", "{x}."),
     ("No {n} is seen.", "Without evidence of {n}.", "{n} is absent."), ("{n} may be present.", "Equivocal for {n}.")),
    ("Dear colleague, thank you for referring this patient. ", " ", ("We note {x}.", "The film shows {x}."),
     ("We see no {n}.", "The film is without evidence of {n}."), ("We wonder about {n}.", "Possible {n}.")),
)  # fmt: skip
SITES = (
    Site("png", (256, 256), 0.9, 0.03, "wav", 8000, 2.4, STYLES[0], (0.45, 0.4, 0.4), (0.5, 0.9, 1.6)),
    Site("dcm2", (320, 320), 1.1, 0.02, "wav", 16000, 3.0, STYLES[1], (0.35, 0.45, 0.5), (1.6, 0.5, 0.9)),
    Site("dcm1", (192, 192), 1.2, 0.05, "flac", 22050, 2.2, STYLES[2], (0.5, 0.35, 0.35), (0.9, 1.6, 0.5)),
    Site("jpg", (240, 224), 0.8, 0.04, "wav", 44100, 2.6, STYLES[3], (0.4, 0.5, 0.45), (1.2, 0.6, 1.2)),
)


def synthesize(
    hospitals: Path,
    *,
    count: int = 4,
    patients: int = 200,
    seed: int = 7,
    missing: float = 0.3,
    labels: str = "default",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write hospital_1 … hospital_`count` into `hospitals` and return their folders.

    missing: mean probability that a study lacks a modality; each keeps at least one.  labels: of LABELS; "all" adds stage,
    risk, time and event to what is otherwise the same.  progress: (patients done, of).
    Guarantee: the bytes depend on patients, seed, missing, labels and the hospital's number and name alone. A complete folder
    with the same parameters is left as it is (with its ledger), an interrupted one is rewritten, no other is touched.
    Raises: ConfigError for arguments out of range or a folder that holds something else; then nothing was written.
    """
    ranges = (("count", count, 1, 1000), ("patients", patients, 1, 100_000), ("missing", missing, 0, 0.9))
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}", fix=f"choose {name} between {low} and {high}")
    if labels not in LABELS:
        raise ConfigError(f"labels is {labels!r}", fix=f"choose {' or '.join(LABELS)}")
    folders = [hospitals / f"hospital_{i + 1:0{len(str(count))}d}" for i in range(count)]
    made_by = {"generator": __name__, "version": VERSION, "patients": patients, "seed": seed, "missing": float(missing)}
    stamps = [made_by | {"labels": labels, "hospital": i + 1} for i in range(count)]
    _check_leftovers(hospitals, folders)
    complete = [_is_complete(folder, stamp) for folder, stamp in zip(folders, stamps, strict=True)]
    for i, folder in enumerate(folders):
        for done in [patients] if complete[i] else _write_hospital(folder, stamps[i]):
            if progress:
                progress(i * patients + done, count * patients)
    return folders


# --- folders ----------------------------------------------------------------------------------------------------------


def _check_leftovers(hospitals: Path, wanted: list[Path]) -> None:
    """A hospital_N that was not asked for would take part in the next run unnoticed."""
    extra = sorted(p.name for p in set(hospitals.glob("hospital_[0-9]*")) - set(wanted))
    if extra:
        raise ConfigError(
            f"{hospitals} already has {', '.join(extra[:5])}, which this call would not make",
            why="every hospital folder in there takes part in a run",
            fix="write to another folder, or ask for at least as many hospitals with the same number of digits",
        )


def _is_complete(folder: Path, stamp: dict[str, Any]) -> bool:
    """True: made by the same call. False: may be written. Raises: ConfigError when it holds something else."""
    if (folder / STAMP).is_file():
        if (folder / STAMP).read_bytes() == json.dumps(stamp).encode():
            return True
        raise ConfigError(
            f"{folder} holds a synthetic hospital made with other parameters",
            why="its ledger speaks of the patients who are in it",
            fix=f"write to another folder, or remove {folder} with its ledger first",
        )
    if not folder.exists() or (folder / PARTIAL).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    why = "it may hold somebody's data"
    raise ConfigError(f"{folder} exists and was not made by fedmm synth", why=why, fix="write to another folder")


def _write_hospital(folder: Path, stamp: dict[str, Any]) -> Iterator[int]:
    """Write while yielding the number of patients done.

    Marker first, manifest and policy last, then the marker becomes the stamp: what a crash leaves never looks complete.
    """
    number, patients, seed = stamp["hospital"], stamp["patients"], stamp["seed"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror})", fix="name a folder you may write to") from None
    (folder / PARTIAL).write_text(json.dumps(stamp), encoding="utf-8")
    for name in ("manifest.csv", SITE_FILE):  # of an earlier attempt
        (folder / name).unlink(missing_ok=True)
    for modality in DRAWN:
        shutil.rmtree(folder / modality, ignore_errors=True)
        (folder / modality).mkdir()
    train = set(stream(seed, "synthetic split", hospital=number).permutation(patients)[: max(1, round(0.7 * patients))])
    rows: list[dict[str, str]] = []
    for p in range(patients):
        rng = stream(seed, "synthetic patient", hospital=number, patient=p)
        written = _write_patient(folder, stamp, p, rng)
        rows += [row | {"split": "train" if p in train else "test"} for row in written]
        yield p + 1
    further = FURTHER if stamp["labels"] == "all" else Labels()
    columns = (*COLUMNS[:-1], *further.columns, COLUMNS[-1])
    lines = [list(columns)] + [[row[column] for column in columns] for row in rows]  # no value needs quotes
    (folder / "manifest.csv").write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
    (folder / SITE_FILE).write_text(policy(folder.name, patients, further=further), encoding="utf-8")
    (folder / PARTIAL).replace(folder / STAMP)


def _write_patient(folder: Path, stamp: dict[str, Any], p: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Write one patient's studies; manifest rows without the split."""
    site = SITES[(stamp["hospital"] - 1) % len(SITES)]
    absent_p = np.minimum(np.array(site.absent) * stamp["missing"], 0.95)
    has = rng.random(3) < site.prevalence
    severity = int(np.digitize(rng.normal() + 0.5 * (has.sum() - 1.2), (-0.4, 0.5)))  # guess: about a third each
    anatomy = rng.normal(size=3)
    rows, burden_S = [], []
    for s in range(int(rng.choice(5, p=STUDIES_P)) + 1):
        if s:  # the disease moves a little  # guess
            has = has ^ (rng.random(3) < 0.1)
            severity = int(np.clip(severity + (rng.random() < 0.25) * rng.choice((-1, 1)), 0, 2))
        study = f"H{stamp['hospital']}-P{p + 1:04d}-S{s + 1}"
        seen = rng.random(3) >= absent_p
        if not seen.any():
            seen[int(np.argmin(absent_p))] = True
        row = {"patient_id": study[:-3], "study_id": study}
        for modality, here, suffix in zip(DRAWN, seen, (site.format[:3], "txt", site.sound), strict=True):
            row[modality] = f"{modality}/{study}.{suffix}" if here else ""
        known = rng.random(4) >= LABEL_MISSING
        labels = (*has.astype(int), SEVERITY[severity])
        row |= {c: str(v) if k else "" for c, v, k in zip((*FINDINGS, "severity"), labels, known, strict=True)}
        burden_S.append(int(has.sum()) + severity)
        state = dict(zip(FINDINGS, has.tolist(), strict=True)) | {"mild": severity == 1, "severe": severity == 2}
        draw = rng.spawn(3)  # streams of their own: `missing` decides which files exist and not what is in them
        if seen[0]:
            _write_image(folder / row["image"], _radiograph(state, site, anatomy, draw[0]), site, stamp["seed"])
        if seen[1]:
            (folder / row["report"]).write_text(_report(state, site, draw[1]), encoding="utf-8")
        if seen[2]:
            wave = io.BytesIO()  # soundfile would fsync each file
            soundfile.write(wave, _sound(state, site, draw[2]), site.rate, format=site.sound, subtype="PCM_16")
            (folder / row["audio"]).write_bytes(wave.getvalue())
        rows.append(row)
    courses = course(stamp["seed"], rows[0]["patient_id"], burden_S, missing=LABEL_MISSING)
    return [row | cells for row, cells in zip(rows, courses, strict=True)]


def _evidence(state: dict[str, bool], name: str, d: float, rng: np.random.Generator) -> float:
    return float(np.clip((d / 2 if state[name] else -d / 2) + rng.normal(), -3, 3))


# --- image ------------------------------------------------------------------------------------------------------------

PLATE_MM = 358.0  # a 36 cm cassette, about
GRID = 128  # anatomy is drawn on this grid and enlarged: fast, and as soft as a radiograph


def _inside(distance: Array, softness: float = 0.015) -> Array:
    return np.asarray(1 / (1 + np.exp(np.clip(-distance / softness, -30, 30))))


def _radiograph(state: dict[str, bool], site: Site, anatomy: Array, rng: np.random.Generator) -> Array:
    """A schematic frontal chest radiograph, (H, W) in [0, 1], bright is dense.

    Effusion: fluid fills the patient's right costophrenic angle (left in the picture). Cardiomegaly: the heart is wide.
    Consolidation: a patch in the other mid lung, mostly lost in noise.
    """
    fluid, patch, heart = (_evidence(state, name, IMAGE_D[name], rng) for name in FINDINGS)
    y, x = np.mgrid[0:GRID, 0:GRID] / (GRID - 1)
    u, v, scale = x - 0.5 - 0.008 * anatomy[0], y - 0.47 - 0.008 * anatomy[1], 1 + 0.02 * anatomy[2]

    def blob(du: float, dv: float, ru: float, rv: float, power: float = 2.4, tilt: float = 0.0) -> Array:
        """Ellipse; a power above 2 gives it shoulders."""
        across, down = np.abs(u - du - tilt * (v - dv)) / (ru * scale), np.abs(v - dv) / (rv * scale)
        return _inside(1 - (across**power + down**power) ** (1 / power), 0.05)

    below = _inside(v - 0.27 - 2.0 * (np.abs(u) - 0.17) ** 2 + 0.025 * (u < 0))  # the two domes of the diaphragm
    trunk = np.maximum(blob(0, 0.32, 0.47, 0.76), _inside(0.10 - np.abs(u)) * (v < 0))
    lungs = np.maximum(*(blob(side * 0.205, 0.05, 0.165, 0.41) for side in (-1, 1))) * (1 - below)
    spine = 0.17 * _inside(0.045 - np.abs(u)) * trunk - 0.08 * _inside(0.016 - np.abs(u), 0.006) * (v < -0.1)
    shape = blob(0.05 + 0.006 * heart, 0.17, 0.125 + 0.022 * heart, 0.19, tilt=0.35)
    middle = np.maximum(spine, (0.30 * lungs + 0.22) * shape * (1 - 0.8 * below))
    film = 0.50 * trunk - 0.34 * lungs + 0.10 * below * trunk + middle
    wave = np.cos(2 * np.pi * (v + 1.1 * (np.abs(u) - 0.22) ** 2 + 0.25 * np.abs(u)) / 0.085)
    film += 0.055 * np.clip(wave, 0, 1) * blob(0, 0.0, 0.40, 0.42, power=2.0) * (1 - 0.8 * below)  # ribs
    film += 0.08 * _inside(0.012 - np.abs(v + 0.27 + 0.25 * np.abs(u)), 0.006) * (np.abs(u) < 0.36)  # collar bones
    level = 0.235 - 0.050 * fluid + 0.25 * (u + 0.36)  # rises to the side, as a meniscus does
    film += 0.36 * _inside(v - level) * _inside(-0.07 - u) * lungs
    film += (0.07 + 0.045 * patch) * np.exp(-((u - 0.22) ** 2 + (v + 0.05) ** 2) / 0.012) * lungs
    film = film * (1 + 0.05 * rng.normal()) + 0.02 * rng.normal()
    film += 0.025 * _resized(rng.normal(size=(8, 8)), (GRID, GRID))  # uneven soft tissue that means nothing
    pixels = np.clip(_resized(film, site.size), 0, 1) ** site.gamma
    return np.asarray(np.clip(pixels + site.grain * rng.normal(size=pixels.shape), 0, 1))


def _resized(array: Array, size: tuple[int, int]) -> Array:
    smooth = Image.fromarray(array.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64)


def _write_image(path: Path, pixels: Array, site: Site, seed: int) -> None:
    """PNG, JPEG or a 12-bit Computed Radiography file with invented identifiers, as real ones carry real ones."""
    if path.suffix != ".dcm":
        return Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path, compress_level=1, quality=90)
    study = path.stem
    who, when = person(seed, study[:-3]), stream(seed, "dicom study", study=study)
    values, centre = 600 + 2800 * pixels, 2000  # guess: a detector uses part of its 12 bits; the window says which
    if site.format == "dcm1":
        values, centre = 4095 - values, 4095 - centre
    data = pydicom.dataset.FileDataset(path, {}, file_meta=pydicom.dataset.FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID = (
        f"2.25.{seed_for(seed, 'dicom uid', study=study, level=level)}" for level in ("study", "series", "image")
    )
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PatientName = f"{who.family}^{who.given}"
    data.PatientID, data.StudyID, data.AccessionNumber = study[:-3], study[-2:], f"A{when.integers(10**7, 10**8)}"
    data.PatientBirthDate = "{}{:02d}{:02d}".format(*who.born)
    data.PatientSex, data.ReferringPhysicianName = who.sex, f"{when.choice(FAMILY)}^Doctor"
    data.StudyDate = f"{FIRST_YEAR - 1 + int(study[-1])}{when.integers(1, 13):02d}{when.integers(1, 29):02d}"
    data.StudyTime = f"{when.integers(7, 20):02d}{when.integers(0, 60):02d}00"
    data.Modality, data.BodyPartExamined, data.ViewPosition, data.PatientOrientation = "CR", "CHEST", "PA", ["L", "F"]
    data.Manufacturer, data.InstitutionName = "fedmm synthetic", "Invented Hospital"
    data.SeriesNumber, data.InstanceNumber, data.ImageType = 1, 1, ["ORIGINAL", "PRIMARY"]
    data.SamplesPerPixel, data.Rows, data.Columns = 1, *pixels.shape
    data.PhotometricInterpretation = "MONOCHROME1" if site.format == "dcm1" else "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.ImagerPixelSpacing = data.PixelSpacing = [round(PLATE_MM / size, 4) for size in pixels.shape]
    data.WindowCenter, data.WindowWidth, data.RescaleIntercept, data.RescaleSlope = centre, 2800, 0, 1
    data.PixelData = np.clip(values, 0, 4095).round().astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


# --- report -----------------------------------------------------------------------------------------------------------

NOUNS = {"effusion": "pleural effusion", "consolidation": "consolidation", "cardiomegaly": "cardiomegaly"}
POSITIVE = {
    "effusion": ("a layering pleural effusion", "a layering effusion with blunted costophrenic angle"),
    "consolidation": ("airspace consolidation", "airspace consolidation with air bronchograms"),
    "cardiomegaly": ("cardiomegaly with enlarged heart shadow", "an enlarged heart"),
}
DISTRACTORS = (
    "Degenerative change of the spine.", "Central line in place.", "Old rib fracture on the left.", "No pneumothorax.",
    "Comparison with the earlier film.", "Trachea in the midline.", "Technically adequate film.", "History of smoking.",
    "Without evidence of free air.", "Aortic calcification.", "Bones unremarkable.", "ECG leads on the chest.",
)  # fmt: skip
UNWELL = ("Short of breath on the ward.", "Admitted from the emergency room.", "Close follow-up is advised.")


def _report(state: dict[str, bool], site: Site, rng: np.random.Generator) -> str:
    """A readable note. Findings may be left out, negated, hedged or wrong; severity is hinted at and never stated."""
    opening, joint, positive, negative, hedging = site.style
    lines = [str(line) for line in rng.choice(DISTRACTORS, size=int(rng.integers(1, 4)), replace=False)]
    if rng.random() < 0.15 + 0.15 * state["mild"] + 0.30 * state["severe"]:
        lines.append(str(rng.choice(UNWELL)))
    for name in FINDINGS:
        mentioned, wrong, hedged = rng.random(3) < (MENTIONED, WRONG, HEDGED)
        kind = hedging if hedged else positive if state[name] != wrong else negative
        if mentioned:
            lines.append(str(rng.choice(kind)).format(x=rng.choice(POSITIVE[name]), n=NOUNS[name]))
    rng.shuffle(lines)
    if opening:
        lines = [line[:1].upper() + line[1:] for line in lines]
    else:  # telegram style
        lines = [line.rstrip(".").lower() for line in lines]
    return f"{opening}{joint.join(lines)}\n"


# --- audio ------------------------------------------------------------------------------------------------------------

BASE_RATE = 8000  # all that matters is below 4 kHz, so that every hospital's recorder can hear it


def _sound(state: dict[str, bool], site: Site, rng: np.random.Generator) -> Array:
    """Breathing with a cough, (L,) in (-1, 1).

    Consolidation: crackles near 2 kHz. Mild: rhonchi, a low hum. Severe: wheeze, tones above 400 Hz, and faster breath.
    """
    crackle, mild, severe = (_evidence(state, name, d, rng) for name, d in AUDIO_D.items())
    samples = int(site.seconds * BASE_RATE)
    t = np.arange(samples) / BASE_RATE
    breath = np.abs(np.sin(np.pi * (0.9 + 0.12 * severe) * t + rng.uniform(0, np.pi))) ** 1.5
    sound = 0.05 * (0.2 + breath) * _band(rng, samples, 150, 1200)
    for start in rng.uniform(0, site.seconds - 0.4, size=int(rng.integers(1, 3))):
        after = np.clip(t - start, 0, None)
        sound += 0.25 * (after > 0) * np.exp(-after / 0.06) * _band(rng, samples, 200, 3000)
    # Levels: 6 dB for each unit of evidence, so that a log-mel band is linear in it.
    clicks = (rng.random(samples) < 25 / BASE_RATE) * rng.normal(size=samples)
    ring = np.exp(-t[:80] / 0.002) * np.sin(2 * np.pi * rng.uniform(1600, 2200) * t[:80])
    sound += 0.08 * 2.0**crackle * np.convolve(clicks, ring)[:samples]
    tone = rng.uniform(130, 160) * t
    sound += 0.012 * 2.0**mild * (0.4 + breath) * (np.sin(2 * np.pi * tone) + 0.5 * np.sin(4 * np.pi * tone))
    tone = rng.uniform(480, 560) * t + 0.3 * np.sin(2 * np.pi * 5 * t)
    sound += 0.012 * 2.0**severe * (0.4 + breath) * (np.sin(2 * np.pi * tone) + 0.5 * np.sin(4 * np.pi * tone))
    sound *= np.exp(0.2 * rng.normal())
    length = int(site.seconds * site.rate)
    sound = np.fft.irfft(np.fft.rfft(sound), length) * (length / samples)  # resampled
    return np.asarray(np.tanh(sound + 0.001 * rng.normal(size=length)) * 0.98)


def _band(rng: np.random.Generator, samples: int, low: float, high: float) -> Array:
    """Noise between two frequencies in Hz, (samples,), standard deviation near 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / BASE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.asarray(np.fft.irfft(spectrum, samples) * np.sqrt(BASE_RATE / 2 / (high - low)))
