"""python -m benchmarks.results [NAME ...] [--quick]: measures accuracy and writes the tables of docs/results.md and its picture.

Figures are kept in docs/results.json; without NAME nothing is measured again and the page is written from them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.missing import FUSIONS, SHARES, SINGLE_AT

PAGE, FIGURES, PICTURE = Path("docs/results.md"), Path("docs/results.json"), Path("docs/missing.svg")
Figures = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *TABLES], help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="a few minutes' worth, printed and not kept")
    args = parser.parse_args()
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for name in args.names:
        kept[name] = importlib.import_module(f"benchmarks.{name}").measure(quick=args.quick)
        if args.quick:
            print(json.dumps(kept[name], indent=1))
        else:
            FIGURES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if not args.quick:
        page = PAGE.read_text(encoding="utf-8")
        for name, table in TABLES.items():
            if name in kept:
                page = replaced(page, name, table(kept[name]))
        PAGE.write_text(page, encoding="utf-8")
    return 0


def replaced(page: str, name: str, text: str) -> str:
    """The page with what stands between the two marks of `name` exchanged. Raises: ValueError if they are not there."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, mark, rest = page.partition(start)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"{PAGE} has no place for {name}")
    return f"{before}{start}{text.rstrip()}\n{closing}{after}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(figure: Mapping[str, Any] | None, *, runs: bool = False) -> str:
    """`0.81 (0.74 to 0.88)`; `—` where there is none."""
    if figure is None or figure["score"] is None:
        return "—"
    text = f"{figure['score']:.3f}"
    if figure.get("interval"):
        text += " ({:.2f} to {:.2f})".format(*figure["interval"])
    if runs and len(figure.get("runs", ())) > 1:
        text += "; " + ", ".join(f"{value:.3f}" for value in figure["runs"][1:])
    return text


# --- one table each ---------------------------------------------------------------------------------------------------


def missing(found: Figures) -> str:
    draw(found)
    parts = []
    for privacy in ("open", "epsilon 8"):
        rows = [[f"`{f}`", *(f"{found[f'{privacy} {f} {share:.0%}']:.3f}" for share in SHARES)] for f in FUSIONS]
        parts.append(f"{privacy}, mean AUROC:\n\n" + table(["fusion", *(f"{share:.0%}" for share in SHARES)], rows))
        at = f"{SINGLE_AT:.0%}"
        names = [f"{privacy} concat {at}", *(f"{privacy} only {m}" for m in ("image", "report", "audio"))]
        rows = [
            [
                n.replace(f" {at}", f", {at} missing"),
                f"{found[n]:.3f} ({found[n + ' low']:.3f} to {found[n + ' high']:.3f})",
            ]
            for n in names
        ]
        parts.append(
            f"Fused at {at} missing against one modality of which nothing is missing:\n\n"
            + table(["model", "mean AUROC"], rows)
        )
    return "\n".join(parts) + "\n![mean AUROC against the share of missing modalities](missing.svg)\n"


def draw(found: Figures) -> None:
    """docs/missing.svg: a curve for each fusion, with its interval; open and private side by side."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fedmm"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, privacy in zip(axes, ("open", "epsilon 8"), strict=True):
        for fusion in FUSIONS:
            names = [f"{privacy} {fusion} {share:.0%}" for share in SHARES]
            x = [100 * share for share in SHARES]
            (line,) = axis.plot(x, [found[name] for name in names], marker="o", markersize=3, label=fusion)
            low, high = ([found[f"{name} {end}"] for name in names] for end in ("low", "high"))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.1)
        axis.set_title("no privacy" if privacy == "open" else "epsilon 8 for each patient")
        axis.set_xlabel("missing modalities, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean AUROC, held-back patients")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def levers(found: Figures) -> str:
    return table(
        ["run", "mean AUROC, 95 % by patient; further runs"], [[k, shown(v, runs=True)] for k, v in found.items()]
    )


def chest(found: Figures) -> str:
    from benchmarks.chest import EPSILONS
    from benchmarks.chest import FUSIONS as TRIED

    levels = ["open", *(f"epsilon {e:g}" for e in EPSILONS)]
    tasks = list(dict.fromkeys(name.partition(": ")[2] for name in found if name.startswith("open concat: ")))
    whole = [
        task
        for task in tasks
        if not task.startswith("given ") and task.split(",")[0] in ("abnormal", "icu", "finding3")
    ]
    single = [task for task in tasks if task not in whole and not task.startswith("given ")]

    def row(task: str) -> list[str]:
        first = found[f"open concat: {task}"]
        chance = "" if first["chance"] is None else f"{first['chance']:.3f}"
        linear = shown(found.get(f"central linear: {task}"))
        return [
            task,
            str(first["patients"]),
            chance,
            linear,
            *(shown(found[f"{level} concat: {task}"]) for level in levels),
        ]

    header = ["task", "patients", "always the most frequent", "central linear", *levels]
    parts = ["With and without privacy (`concat`):\n", table(header, [row(task) for task in whole])]
    parts += ["Each hospital:\n", table(header, [row(task) for task in single])]
    subsets = [task for task in tasks if task.startswith("given ") and task.endswith("accuracy")]
    parts += [
        "Given these modalities only, on the held-back studies that have them, accuracy of `finding3`:\n",
        table(
            ["modalities", "patients", *levels], [[t[6:].partition(":")[0], *row(t)[1:2], *row(t)[4:]] for t in subsets]
        ),
    ]
    rows = []
    for fusion in ("concat", *TRIED):
        cells = [shown(found.get(f"{level} {fusion}: {task}")) for level in ("open", "epsilon 8") for task in whole]
        rows.append([f"`{fusion}`", *cells])
    head = ["fusion", *(f"{level}: {task.split(',')[0]}" for level in ("open", "epsilon 8") for task in whole)]
    parts += ["Each fusion:\n", table(head, rows)]
    runs = [
        [task, *(", ".join(f"{v:.3f}" for v in found[f"{level} concat: {task}"]["runs"]) for level in levels)]
        for task in whole
    ]
    parts += ["All runs of `concat` (seeds and, under privacy, noise differ):\n", table(["task", *levels], runs)]
    return "\n".join(parts)


TABLES: Mapping[str, Callable[[Figures], str]] = {"missing": missing, "levers": levers, "chest": chest}

if __name__ == "__main__":
    sys.exit(main())
