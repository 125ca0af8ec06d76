"""Reports, varied: what is shuffled, what is left out, what never is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.data.text import tokenize, word_ids
from fedmm.schema import InputSpec
from fedmm.training import augment_report
from fedmm.training.augment_report import LINKS, NEGATIONS, WORD_DROPOUT, guard_for, vary_report

SPEC = InputSpec(report_tokens=64, report_buckets=2**20)  # so many buckets that no two words of a test share one
GUARD = guard_for(SPEC)
REPORT = "Heart size is normal. Small left effusion, no pneumothorax; lungs are clear. Comparison with last week."


def varied(text: str, seed: int, spec: InputSpec = SPEC) -> list[int]:
    made_T = vary_report(tokenize(text, spec), np.random.default_rng(seed), guard=guard_for(spec))
    assert made_T.shape == (spec.report_tokens,)
    assert made_T.dtype == np.int64
    return made_T[made_T > 0].tolist()


def sentences(tokens: list[int]) -> Counter[tuple[int, ...]]:
    """Cut where a word is followed by another word."""
    found: list[list[int]] = [[]]
    for before, token in zip([0, *tokens], tokens, strict=False):
        if before % 2 and token % 2:
            found.append([])
        found[-1].append(token)
    return Counter(tuple(sentence) for sentence in found)


def ids(text: str) -> list[int]:
    return [token for token in tokenize(text, SPEC).tolist() if token]


def test_sentences_are_shuffled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_report, "WORD_DROPOUT", 0.0)
    made = {tuple(varied(REPORT, seed)) for seed in range(100)}
    assert len(made) == 24, "every order of four sentences"
    assert all(sentences(list(tokens)) == sentences(ids(REPORT)) for tokens in made)


def test_a_word_goes_with_its_pairs_and_nothing_new_comes() -> None:
    words = ids("alpha beta gamma")
    alpha, alpha_beta, beta, beta_gamma, gamma = words
    seen = {tuple(varied("alpha beta gamma", seed)) for seed in range(2000)}
    kept = {
        (alpha, alpha_beta, beta, beta_gamma, gamma),
        (beta, beta_gamma, gamma),
        (alpha, gamma),
        (alpha, alpha_beta, beta),
        (alpha,),
        (beta,),
        (gamma,),
    }
    assert seen == kept


def test_a_word_is_left_out_as_often_as_it_should() -> None:
    """Share within 5 sigma: false alarm below 1e-6."""
    text = " ".join(f"{letter}word" for letter in "abcdefghijklmnopqrst")
    left = np.mean([sum(token % 2 for token in varied(text, seed)) / 20 for seed in range(500)])
    assert abs(1 - left - WORD_DROPOUT) < 5 * (WORD_DROPOUT * (1 - WORD_DROPOUT) / 10_000) ** 0.5


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("there is no effusion today", "no effusion"),
        ("lungs are free of effusion today", "free of effusion"),
        ("no evidence of an acute effusion today", "no evidence of an acute effusion"),
        ("patient denies cough since monday", "denies cough"),
        ("heute kein Hinweis auf Erguss im Liegen", "kein Hinweis auf Erguss"),
        ("it isn't enlarged today", "t enlarged"),
        ("effusion is not seen today", "not seen"),
        ("今天无积液", "无积"),
    ],
)
def test_negations_survive_a_thousand_drops(monkeypatch: pytest.MonkeyPatch, text: str, stays: str) -> None:
    monkeypatch.setattr(augment_report, "WORD_DROPOUT", 0.5)
    expected = ids(stays)
    for seed in range(1000):
        made = varied(f"{text}. Heart is normal", seed)
        starts = [i for i, token in enumerate(made) if token == expected[0]]
        assert any(made[i : i + len(expected)] == expected for i in starts)


def test_a_negation_stays_with_what_the_next_line_says() -> None:
    """Lines are cut where the screen ended: no pair reaches over it, and the order must."""
    no, effusion = ids("no\neffusion")
    for seed in range(200):
        made = varied("Heart is normal. There is no\neffusion today. Lungs are clear", seed)
        assert made[made.index(no) + 1] == effusion


def test_every_word_of_the_lists_is_one_word_for_the_tokeniser() -> None:
    for word in (*NEGATIONS, *LINKS):
        assert ids(word) == list(word_ids([word], SPEC))
    assert len(GUARD.negations | GUARD.links) == len(set(NEGATIONS) | set(LINKS))


def test_one_word_and_no_word_stay() -> None:
    for seed in range(100):
        assert varied("effusion", seed) == ids("effusion")
    empty = np.zeros(64, dtype=np.int64)
    assert np.array_equal(vary_report(empty, np.random.default_rng(0), guard=GUARD), empty)


@given(st.lists(st.integers(0, 63), min_size=8, max_size=8), st.integers(0, 99))
def test_any_tokens_give_tokens_of_theirs(tokens: list[int], seed: int) -> None:
    """Also such as no text gives."""
    given_T = np.array(tokens, dtype=np.int64)
    made_T = vary_report(given_T, np.random.default_rng(seed), guard=guard_for(InputSpec(report_buckets=64)))
    assert made_T.shape == given_T.shape
    assert not Counter(made_T[made_T > 0].tolist()) - Counter(tokens)
    assert np.array_equal(given_T, np.array(tokens)), "the hospital's own copy stays"
    assert bool(made_T.any()) == bool(given_T.any())


def test_a_report_that_was_cut_keeps_its_last_pair_while_its_word_stays() -> None:
    spec = InputSpec(report_tokens=8, report_buckets=2**20)
    whole = tokenize("alpha beta gamma no effusion", spec)
    assert whole[-1] % 2 == 0, "the pair of no and effusion; effusion itself is cut off"
    assert all(varied("alpha beta gamma no effusion", seed, spec)[-1] == whole[-1] for seed in range(100))
