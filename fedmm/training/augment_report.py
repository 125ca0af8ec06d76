"""Reports, varied: sentences in another order, some words left out, never a negation nor what it negates.

Works on hashed tokens (data/text.py): words are odd and each is followed by its pair with the next word, which is even.
W words of one report, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedmm.data.text import word_ids
from fedmm.schema import InputSpec

WORD_DROPOUT = 0.1  # guess; Wei and Zou 2019 (EDA) recommend 0.05 to 0.1 for texts as short

# A report without one of these says the opposite. Lower case, single words as data/text.py cuts them; "t" is of isn't.
NEGATIONS = (
    "no", "not", "none", "non", "without", "never", "neither", "nor", "cannot", "t", "absent", "absence", "negative",
    "deny", "denies", "denied", "denying", "exclude", "excludes", "excluded", "free", "lack", "lacks", "lacking",
    "resolved", "kein", "keine", "keinen", "keinem", "keiner", "keines", "keinerlei", "ohne", "nicht", "nie", "weder",
    "noch", "ausgeschlossen", "ausschluss", "negativ", "frei", "无", "無", "未", "没", "沒", "不", "非",
)  # fmt: skip

# Between a negation and what it negates: "free of effusion", "no evidence of effusion", "kein Hinweis auf Erguss".
LINKS = (
    "of", "for", "any", "the", "a", "an", "evidence", "sign", "signs", "acute", "new", "definite", "significant",
    "von", "für", "auf", "hinweis", "hinweise", "anhalt", "zeichen", "nachweis", "eines", "einer",
)  # fmt: skip


class Guard(NamedTuple):
    """Numbers of the words that protect what follows, and of those that hand the protection on."""

    negations: frozenset[int]
    links: frozenset[int]


def guard_for(spec: InputSpec) -> Guard:
    return Guard(word_ids(NEGATIONS, spec), word_ids(LINKS, spec))


def vary_report(tokens_T: np.ndarray, rng: np.random.Generator, *, guard: Guard) -> np.ndarray:
    """(T,) the same report with its sentences shuffled and each word left out, with its pairs, with WORD_DROPOUT.

    Guarantee: no token is new; a negation, the words up to the one that it negates and their pairs stay, in their order,
    also over a line's end; at least one word stays.
    """
    used = tokens_T[tokens_T > 0]
    at_W = np.flatnonzero(used % 2)
    if len(at_W) == 0:
        return tokens_T
    word_W = used[at_W]
    after_W = np.append(used, 1)[at_W + 1]
    pair_W = np.where(after_W % 2 == 0, after_W, 0)  # 0: the last of a sentence
    guarded_W, open_W = _guarded(word_W, guard)
    kept_W = guarded_W | (rng.random(len(word_W)) >= WORD_DROPOUT)
    if not kept_W.any():
        kept_W[:] = True
    sentence_W = np.append(0, np.cumsum((pair_W[:-1] == 0) & ~open_W[:-1]))
    order_W = rng.permutation(int(sentence_W[-1]) + 1)[sentence_W].argsort(kind="stable")
    pair_kept_W = kept_W & np.append(kept_W[1:], True)
    made_W2 = np.stack([np.where(kept_W, word_W, 0), np.where(pair_kept_W, pair_W, 0)], axis=1)[order_W]
    made = made_W2[made_W2 > 0]
    varied_T = np.zeros_like(tokens_T)
    varied_T[: len(made)] = made
    return varied_T


def _guarded(word_W: np.ndarray, guard: Guard) -> tuple[np.ndarray, np.ndarray]:
    """Which words must stay; after which of them the next one must stay too."""
    guarded, opens, still_open = [], [], False
    for word in word_W.tolist():
        negation = word in guard.negations
        guarded.append(negation or still_open)
        still_open = negation or (still_open and word in guard.links)
        opens.append(still_open)
    return np.array(guarded), np.array(opens)
