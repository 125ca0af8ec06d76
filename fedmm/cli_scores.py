"""`fedmm evaluate`: scores of a finished model on hospitals that the person may read, and how they are said."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmm.errors import ConfigError
from fedmm.terminal import Adder, format_argument, open_site, or_dash, print_json, run_argument

DRAWS = 1000  # for a 95 % percentile interval: Efron and Tibshirani 1993, section 13.3
Row = Sequence[str]


def add_commands(add: Adder) -> None:
    sub = add(
        "evaluate",
        evaluate,
        "score a finished model on hospitals you may read",
        "fedmm evaluate RUN HOSPITALS/hospital_1",
    )
    run_argument(sub)
    sub.add_argument(
        "hospital", metavar="HOSPITAL", type=Path, nargs="+", help="hospital folder; several are scored together"
    )
    sub.add_argument("--split", choices=["test", "train", "all"], default="test", help="which patients (test)")
    sub.add_argument(
        "--intervals",
        type=_draws,
        default=DRAWS,
        metavar="N",
        help=f"draws of the bootstrap by patient for the 95 %% intervals ({DRAWS}; 0: no intervals)",
    )
    format_argument(sub)


def evaluate(args: argparse.Namespace) -> int:
    import torch

    from fedmm.data.dataset import load_hospital
    from fedmm.models.store import load_model
    from fedmm.training.home import score_at_home
    from fedmm.training.loop import Workbench, choose_device, predict
    from fedmm.training.metrics import join

    model = load_model(args.run)
    bench = Workbench(model.spec, torch.device(choose_device("auto")))
    bench.load(model.trained())
    parts, names = [], []
    for hospital in args.hospital:
        if open_site(hospital).labels != model.spec.labels:
            raise ConfigError(f"{hospital} has other labels than the model", fix="compare [labels] in its site.toml")
        data = load_hospital(hospital, model.spec.inputs, parts=bench.fixed_parts())
        cohort = data.cohort(args.split)
        # groups are added here and not by `predict`: what a hospital predicts for a release has none
        parts.append(replace(predict(bench, cohort), groups=cohort.groups))
        names.append(data.name)
    result = score_at_home(join(parts, names), model.spec.labels, draws=args.intervals)
    if args.format == "json":
        print_json(result)
    else:
        print("\n".join(lines(result, split=args.split)))
    return 0


def lines(result: Mapping[str, Any], *, split: str) -> Iterator[str]:
    """What `score_at_home` found, for people: the whole, each output, each subset of modalities, groups, warnings."""
    sure: Mapping[str, Any] = result.get("intervals", {})
    yield f"{result['studies']} studies of {result['patients']} patients ({split})"
    yield (
        f"  accuracy {_with(result['accuracy'], sure.get('accuracy'))}, always the most frequent answer "
        f"{or_dash(result['majority'])}, balanced accuracy {or_dash(result['balanced_accuracy'])}, "
        f"macro F1 {or_dash(result['f1_macro'])}"
    )
    yield (
        f"  mean AUROC {_with(result['mean_auroc'], sure.get('mean_auroc'))}, mean AUPRC "
        f"{or_dash(result['mean_auprc'])}, Brier {or_dash(result['brier'])}, calibration error {or_dash(result['ece'])}"
    )
    if sure:
        yield f"  in brackets: {sure['level']:.0%} intervals from {sure['draws']} draws of patients"
    yield from table(("predicted", "AUROC", "AUPRC", "sensitivity", "specificity", "positive"), _outputs(result, sure))
    yield from table(("given only", "mean AUROC", "accuracy", "studies that have all of it"), _subsets(result, sure))
    for kind, found in result.get("further", {}).items():
        yield from ("", f"  {found['label']} ({kind})", *_numbers(found))
    for kind, groups in result.get("by_group", {}).items():
        yield from table((kind, "mean AUROC", "accuracy", "patients"), _groups(groups, sure.get("by_group", {}), kind))
    yield from (f"Warning: {sentence}" for sentence in collapsed(result))


def collapsed(result: Mapping[str, Any]) -> list[str]:
    """One plain sentence for each finding or class of which the model says nearly the same of everybody."""
    return [
        f"{name} gets the answer {found['answer']!r} in {found['share']:.0%} of the studies, the most frequent truth has "
        f"{found['most_frequent']:.0%}: hardly any patient is told apart."
        for name, found in result["collapsed"].items()
        if found["collapsed"]
    ]


def _outputs(result: Mapping[str, Any], sure: Mapping[str, Any]) -> Iterator[Row]:
    for name, found in result["outputs"].items():
        area = _with(found["auroc"], sure.get("auroc", {}).get(name))
        rest = (or_dash(found[key]) for key in ("auprc", "sensitivity", "specificity"))
        yield name, area, *rest, f"{found['positive']} of {found['studies']}"


def _subsets(result: Mapping[str, Any], sure: Mapping[str, Any]) -> Iterator[Row]:
    """Of the studies that have all of the subset; then of all studies with one modality hidden."""
    for name, part in result["by_subset"].items():
        area = _with(part["mean_auroc"], sure.get("by_subset", {}).get(name))
        yield name, area, or_dash(part["accuracy"]), str(part["studies"])
    for name, part in result["by_modality"].items():
        if "without" in part:
            hidden = part["without"]
            accuracy = or_dash(hidden["accuracy"])
            yield f"all but {name}", or_dash(hidden["mean_auroc"]), accuracy, f"{result['studies']} (all)"


def _groups(groups: Mapping[str, Any], sure: Mapping[str, Any], kind: str) -> Iterator[Row]:
    for value, found in groups.items():
        if found.get("too_few"):
            yield value, "too few", "", str(found["patients"])
        else:
            area = _with(found["mean_auroc"], sure.get(kind, {}).get(value))
            yield value, area, or_dash(found["accuracy"]), str(found["patients"])


def _numbers(found: Mapping[str, Any]) -> Iterator[str]:
    """One line for each plain number of another kind of label (training/outcomes.py); its tables are in the JSON."""
    for key, value in found.items():
        if value is None or isinstance(value, int | float):
            yield f"    {key.replace('_', ' '):<28} {or_dash(value) if not isinstance(value, int) else value}"


def _with(value: float | None, interval: Sequence[float] | None) -> str:
    """0.8123 (0.78 to 0.85)"""
    return or_dash(value) + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def table(head: Row, rows: Iterator[Row]) -> Iterator[str]:
    """Columns as wide as their longest cell, after an empty line; nothing without rows."""
    body = list(rows)
    if body:
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        yield ""
        for row in (head, *body):
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _draws(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 100_000:
        raise argparse.ArgumentTypeError(f"{number} is not in 0 to 100000")
    return number
