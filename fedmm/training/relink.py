"""Does a patient's image find its own report among N? Asked of a finished model, at the hospital, where the answer is known.

A fusion model brings images and reports of one patient together, which is what somebody needs who has images without names
and reports with them. The attacker has the model and some pairs of his own ("auxiliary"), never the pairs that are asked for.
Part of what links is the disease itself: two modalities that both tell of an effusion link above chance under any model, also
under one with privacy. Read the figures beside those of another model, not beside chance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from fedmm.data.dataset import Cohort, HospitalData
from fedmm.models.fusion import Fused
from fedmm.models.heads import answer
from fedmm.models.sequence import Sequence
from fedmm.schema import MODALITIES
from fedmm.seeds import stream
from fedmm.training.intervals import LEVEL, SEED
from fedmm.training.loop import PREDICT_STUDIES, Workbench
from fedmm.training.membership import DRAWS, clopper_pearson
from fedmm.training.rates import Floats

# N studies, one of each patient who has both modalities; X size of a representation

PAIRS = (("image", "report"), ("audio", "report"))
TOP = (1, 5)
FEWEST = 20  # pairs; below, halves of halves say nothing: guess
PULLS = (0.1, 1.0, 10.0)  # of the ridge, in units of the number of pairs that it is fitted on

Space = Mapping[str, Floats]  # by name, (N, X): "fused", "answer" and "encoder", of studies given one modality alone
Matcher = Callable[[Space, Space, Space, Space], Floats]


class Pairs(NamedTuple):
    """The same N studies seen by one modality and by another."""

    one: Space
    other: Space

    def of(self, rows: np.ndarray) -> Pairs:
        return Pairs(*({name: value[rows] for name, value in space.items()} for space in self))


def attack_links(bench: Workbench, weights: Mapping[str, Tensor], data: HospitalData) -> list[dict[str, Any]]:
    """`link` for each of PAIRS, of the training patients. bench: a plain one; ends with `weights`."""
    bench.load(weights)
    return [{"from": one, "to": other, **link(pairs_of(bench, data, one, other))} for one, other in PAIRS]


def pairs_of(bench: Workbench, data: HospitalData, one: str, other: str) -> Pairs:
    """Of each training patient the first study that has both: several of one patient would find one another."""
    wanted = [MODALITIES.index(name) for name in (one, other)]
    both_S = data.seen_SM[:, wanted].all(1) & data.train_S
    cohort = Cohort(data, first_of_each(data, both_S))
    return Pairs(*(spaces(bench, cohort, name) for name in (one, other)))


def first_of_each(data: HospitalData, chosen_S: Tensor) -> Tensor:
    """(S,) of the chosen studies the first of each patient."""
    row_of: dict[int, int] = {}
    for row in chosen_S.nonzero().flatten().tolist():
        row_of.setdefault(int(data.patient_S[row]), row)
    first_S = torch.zeros_like(chosen_S)
    first_S[list(row_of.values())] = True
    return first_S


def spaces(bench: Workbench, cohort: Cohort, modality: str) -> Space:
    """What a user of the model gets of these studies from one modality: see `Space`."""
    model, m, made = bench.model.eval(), MODALITIES.index(modality), []
    caught: list[Tensor | Fused] = []
    hook = model.fusion.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        for studies in cohort.physical(range(cohort.patients), limit=PREDICT_STUDIES):
            batch = studies.to(bench.device)
            seen_BM = torch.zeros_like(batch.seen_BM)
            seen_BM[:, m] = batch.seen_BM[:, m]
            with torch.no_grad():
                encoded = model.encode(batch.inputs, seen_BM)
                output = answer(model.fuse(encoded, seen_BM, batch.timeline))
                own = encoded[modality]
                embedded = model.norms[modality](own.mean() if isinstance(own, Sequence) else own)
            fused = caught.pop()
            vector = fused.z_BVD.flatten(1) if isinstance(fused, Fused) else fused
            made.append({"fused": vector, "answer": output, "encoder": embedded})
    finally:
        hook.remove()
    return {
        name: torch.cat([part[name] for part in made]).double().cpu().numpy()
        if made
        else np.zeros((0, 1), dtype=np.float64)
        for name in ("fused", "answer", "encoder")
    }


# --- matching -----------------------------------------------------------------------------------------------------------


def link(pairs: Pairs) -> dict[str, Any]:
    """{"matcher", "candidates", "top1", "top5", "mean_rank", "chance_…"}: the strongest of the matchers, on pairs it never saw.

    Half of the pairs are auxiliary: matchers are fitted on half of them and compared on their other half, then the one with
    the least mean rank is fitted on all of them. The rest are the candidates, each asked for its own among all of them.
    top1, top5: shares with Clopper-Pearson intervals (a bootstrap of no hits has no width).  mean_rank: 1 is best, interval by
    bootstrap over the pairs that are asked.  value None, with a reason, for fewer than FEWEST pairs.
    """
    count = len(pairs.one["fused"])
    if count < FEWEST:
        none = {"value": None, "low": None, "high": None, "reason": f"fewer than {FEWEST} patients have both"}
        keys = (*(f"top{k}" for k in TOP), "mean_rank", *(f"chance_top{k}" for k in TOP), "chance_mean_rank")
        return {"matcher": None, "candidates": 0, **{key: None if key.startswith("chance") else none for key in keys}}
    order = stream(SEED, "relink halves", pairs=count).permutation(count)
    auxiliary, asked = order[: count // 2], order[count // 2 :]
    fit, choose = auxiliary[: count // 4], auxiliary[count // 4 :]
    tried = {name: ranks(matcher, pairs.of(fit), pairs.of(choose)).mean() for name, matcher in MATCHERS.items()}
    best = min(tried, key=lambda name: tried[name])
    rank_N = ranks(MATCHERS[best], pairs.of(auxiliary), pairs.of(asked))
    found: dict[str, Any] = {"matcher": best, "candidates": len(asked)}
    for k in TOP:
        hits = int((rank_N <= k).sum())
        low, high = clopper_pearson(hits, len(asked))
        found[f"top{k}"] = {"value": hits / len(asked), "low": low, "high": high}
        found[f"chance_top{k}"] = min(1.0, k / len(asked))
    drawn = rank_N[stream(SEED, "relink bootstrap").integers(0, len(asked), (DRAWS, len(asked)))].mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    found["mean_rank"] = {"value": float(rank_N.mean()), "low": float(low), "high": float(high)}
    found["chance_mean_rank"] = (len(asked) + 1) / 2
    return found


def ranks(matcher: Matcher, known: Pairs, asked: Pairs) -> Floats:
    """(N,) place of each one's own among all candidates, 1 is best, the mean of the places where several are alike."""
    like_NN = matcher(known.one, known.other, asked.one, asked.other)
    return np.asarray(rankdata(-like_NN, axis=1)[np.arange(len(like_NN)), np.arange(len(like_NN))], dtype=np.float64)


def in_space(name: str, *, cosine: bool) -> Matcher:
    """Alike is what lies close in one space: by angle, or by distance. Each side is brought to the mean and spread of the known."""

    def match(one: Space, other: Space, asked: Space, candidates: Space) -> Floats:
        a, b = standard(one[name], asked[name]), standard(other[name], candidates[name])
        if cosine:
            return _cosine(a, b)
        return np.asarray(-((a[:, None] - b[None]) ** 2).sum(2))

    return match


def by_ridge(pull: float) -> Matcher:
    """A linear map from what one encoder makes to what the other makes, fitted on known pairs; then by angle."""

    def match(one: Space, other: Space, asked: Space, candidates: Space) -> Floats:
        x, y = standard(one["encoder"], one["encoder"]), standard(other["encoder"], other["encoder"])
        gram = x.T @ x + pull * len(x) * np.eye(x.shape[1])
        made = standard(one["encoder"], asked["encoder"]) @ np.linalg.solve(gram, x.T @ y)
        return _cosine(made, standard(other["encoder"], candidates["encoder"]))

    return match


MATCHERS: dict[str, Matcher] = {
    "cosine in the fused space": in_space("fused", cosine=True),
    "closeness of the answers": in_space("answer", cosine=False),
    **{f"ridge {pull:g} from encoder to encoder": by_ridge(pull) for pull in PULLS},
}


def standard(known: Floats, value: Floats) -> Floats:
    """Brought to mean 0 and variance 1 of the known; what never varies is 0."""
    spread = known.std(0)
    return np.asarray(np.where(spread > 1e-9, (value - known.mean(0)) / np.maximum(spread, 1e-9), 0.0))


def _cosine(a: Floats, b: Floats) -> Floats:
    length = [np.linalg.norm(side, axis=1, keepdims=True).clip(min=1e-12) for side in (a, b)]
    return np.asarray((a / length[0]) @ (b / length[1]).T)
