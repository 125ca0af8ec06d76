"""A report becomes hashed words and pairs of words. The hash is fixed and public: nothing is learned on notes."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from fedmm.data.manifest import MAX_REPORT_BYTES, FileProblem, open_file
from fedmm.pretrained_folder import tokenizer
from fedmm.schema import InputSpec

# A number; a word (it may hold digits after a letter: spo2); one sign of Chinese or Japanese; the end of a thought,
# over which no pair reaches (a masked word, ___, is one too).
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
TOKEN = re.compile(rf"\d+(?:[.,]\d+)?|[{CJK}]|[^\W\d_{CJK}][^\W_{CJK}]*|[.;:!?。\n]|__+")
STOP = ""


def read(path: Path, spec: InputSpec) -> np.ndarray:
    """(T,) int64 as `tokenize`, or as `subwords` where the spec names a tokeniser.

    Raises: FileProblem broken_report, absurd_size, or as open_file; ConfigError as `subwords`.
    """
    fix = "save the report as UTF-8 text or empty the cell"
    with open_file(path, limit=MAX_REPORT_BYTES) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileProblem("broken_report", "the file is not UTF-8 text", fix) from None
    if any(unicodedata.category(sign) == "Cc" and sign not in "\t\n\r\f\v" for sign in set(text)):
        raise FileProblem("broken_report", "the file holds control characters, so it is not plain text", fix)
    if not text.strip():
        raise FileProblem("broken_report", "the file is empty", fix)
    if not any(_words(text)):  # whatever the tokeniser: a refusal must not depend on the coordinator's choice of one
        raise FileProblem("broken_report", "the file holds no word", fix)
    return subwords(text, spec) if spec.report_tokenizer else tokenize(text, spec)


def subwords(text: str, spec: InputSpec) -> np.ndarray:
    """(T,) int64: ids of the pretrained folder's tokeniser plus 1, without special tokens; 0 is padding, the rest is cut.

    The vocabulary is public and was fixed before any patient was seen. A text that the tokeniser cannot take is all padding:
    what becomes of a report must not show outside.
    Raises: ConfigError if the folder or its tokenizer.json is not there.
    """
    made = tokenizer(spec.report_tokenizer)
    try:
        ids = made.encode(text, add_special_tokens=False).ids[: spec.report_tokens]
    except Exception:  # the library raises nothing narrower
        ids = []
    ids_T = np.zeros(spec.report_tokens, dtype=np.int64)
    ids_T[: len(ids)] = np.asarray(ids, dtype=np.int64) + 1
    return ids_T


def tokenize(text: str, spec: InputSpec) -> np.ndarray:
    """(T,) int64: each word followed by its pair with the next word, hashed to 1 … buckets-1; 0 is padding.

    Words get odd numbers and pairs even ones, so structure outlives the hash: a word without a pair after it ends a
    sentence. Augmentation cuts and shuffles by that (training/augment_report.py), and no word is taken for a pair.

    Pairs make "no effusion" a token of its own. Words are lower case; of a number the first digit and the size are
    kept (7, 34 -> 30, 1.6 -> 1, 420 -> 400), which generalises and blurs dates, record numbers and phone numbers.
    What is longer than T is cut.  Guarantee: equal on every machine and in every process.
    """
    tokens = islice(_ngrams(_words(text)), spec.report_tokens)
    ids_T = np.zeros(spec.report_tokens, dtype=np.int64)
    for index, token in enumerate(tokens):
        ids_T[index] = _id(token, spec.report_buckets)
    return ids_T


def word_ids(words: Iterable[str], spec: InputSpec) -> frozenset[int]:
    """The numbers of these single words, lower case, as `tokenize` gives them."""
    return frozenset(_id(word, spec.report_buckets) for word in words)


def _id(token: str, buckets: int) -> int:
    pair = " " in token
    return 2 + 2 * (_hash(token) % ((buckets - 1) // 2)) if pair else 1 + 2 * (_hash(token) % (buckets // 2))


def _words(text: str) -> Iterator[str]:
    for match in TOKEN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        token = match.group()
        if token[0].isdecimal():
            yield _number(token)
        elif token[0].isalnum():
            # A letter with a long run of digits is an identifier rather than a word.
            yield re.sub(r"\d{3,}", "#", token)
        else:
            yield STOP


def _number(token: str) -> str:
    value = float(token.replace(",", ".")) if len(token) <= 300 else math.inf
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "#"
    size = 10.0 ** math.floor(math.log10(value))
    return f"{math.floor(value / size + 1e-9) * size:.0e}"


def _ngrams(words: Iterator[str]) -> Iterator[str]:
    word = next(words, STOP)
    for following in words:
        if word:
            yield word
            if following:
                yield f"{word} {following}"
        word = following
    if word:
        yield word


@lru_cache(maxsize=65_536)
def _hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "big")
