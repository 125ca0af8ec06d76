from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fedmm.data.manifest import FileProblem
from fedmm.data.text import read as read_report
from fedmm.data.text import tokenize, word_ids
from fedmm.errors import ConfigError
from fedmm.schema import InputSpec
from tests.pretrained_folders import write_tokenizer

SPEC = InputSpec(report_tokens=32)


def ids(text: str, spec: InputSpec = SPEC) -> set[int]:
    return set(tokenize(text, spec).tolist()) - {0}


def problem_of(path: Path) -> str:
    with pytest.raises(FileProblem) as caught:
        read_report(path, SPEC)
    return caught.value.code


def test_words_and_pairs_come_in_order_and_the_rest_is_padding() -> None:
    tokens = tokenize("No effusion", SPEC)
    assert tokens.shape == (32,)
    assert tokens.dtype == np.int64
    assert len(ids("No effusion")) == 3
    assert tokens[0] == tokenize("no", SPEC)[0]
    assert tokens[2] == tokenize("effusion", SPEC)[0]
    assert not tokens[3:].any()


def test_a_negated_finding_has_a_token_of_its_own() -> None:
    assert ids("no effusion") - ids("effusion. no")


@pytest.mark.parametrize("buckets", [64, 65, 4096])
def test_words_are_odd_and_pairs_are_even_so_structure_outlives_the_hash(buckets: int) -> None:
    spec = InputSpec(report_tokens=32, report_buckets=buckets)
    tokens = tokenize("No large effusion. Heart is normal", spec)
    assert [token % 2 for token in tokens[:10].tolist()] == [1, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    assert tokens.max() < buckets
    assert tokens[0] in word_ids(["no"], spec) == frozenset(tokenize("No", spec)[:1].tolist())


def test_every_bucket_is_used() -> None:
    spec = InputSpec(report_tokens=8192, report_buckets=64)
    text = " ".join(f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz")
    assert ids(text, spec) == set(range(1, 64))


def test_pairs_do_not_reach_over_the_end_of_a_sentence_or_a_masked_word() -> None:
    assert len(ids("normal. heart")) == len(ids("normal ___ heart")) == len(ids("normal\nheart")) == 2
    assert ids("normal, heart") == ids("normal heart")


def test_case_accents_forms_and_punctuation_do_not_change_a_word() -> None:
    assert ids("EFFUSION!") == ids("effusion")
    assert ids("Pleuraerguß") == ids("PLEURAERGUSS")
    assert ids("caf\u00e9") == ids("cafe\u0301")
    assert ids("\uff45\uff46\uff46usion") == ids("effusion")


def test_numbers_keep_their_first_digit_and_size() -> None:
    assert ids("34") == ids("39") != ids("40")
    assert ids("420") == ids("400.5") != ids("42")
    assert ids("1.6") == ids("1,2") == ids("1")
    assert ids("0.5") != ids("5")
    assert ids("3") != ids("4")
    assert ids("0") == ids("0.00")
    assert ids("\u0663") == ids("3")


def test_long_identifiers_are_blurred_and_words_with_a_digit_are_kept() -> None:
    assert ids("ACC000120") == ids("ACC777777")
    assert ids("spo2") != ids("spo3")


def test_chinese_is_read_sign_by_sign() -> None:
    assert len(ids("胸腔积液")) == 7
    assert ids("积液") < ids("胸腔积液")


def test_a_long_report_is_cut() -> None:
    assert (tokenize("alpha beta gamma " * 100_000, SPEC) > 0).all()


def test_ids_do_not_depend_on_the_process_and_are_frozen() -> None:
    # Golden: another hash or rule would make every saved model read other words.
    golden = [1487, 1810, 2739, 1706, 645, 3388, 2281, 3136, 3853]
    code = (
        "from fedmm.data.text import tokenize; from fedmm.schema import InputSpec;"
        "print(tokenize('No pleural effusion, SpO2 85%', InputSpec(report_tokens=32))[:9].tolist())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert shown.stdout.strip() == str(golden)
    assert tokenize("No pleural effusion, SpO2 85%", SPEC)[:9].tolist() == golden


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" \n\t ",
        b"\xef\xbb\xbf",
        b"--- ... !!!",
        "café".encode("latin-1"),
        "note".encode("utf-16"),
        b"a\0b",
        b"a\x1bb",
    ],
)
def test_what_is_not_text_or_empty_is_broken(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert problem_of(tmp_path / "a.txt") == "broken_report"


def test_a_report_with_bom_and_windows_lines_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfNo effusion.\r\n")
    assert np.array_equal(read_report(tmp_path / "a.txt", SPEC), tokenize("no effusion", SPEC))


def test_a_report_over_a_megabyte_is_absurd_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a " * (2**19 + 1))
    assert problem_of(tmp_path / "a.txt") == "absurd_size"
    assert problem_of(tmp_path / "b.txt") == "missing_file"


@given(text=st.text(max_size=200), tokens=st.integers(8, 40), buckets=st.integers(64, 5000))
def test_every_text_gives_ids_in_range(text: str, tokens: int, buckets: int) -> None:
    ids_T = tokenize(text, InputSpec(report_tokens=tokens, report_buckets=buckets))
    assert ids_T.shape == (tokens,)
    assert ids_T.min() >= 0
    assert ids_T.max() < buckets
    used = int((ids_T > 0).sum())
    assert not ids_T[used:].any()


@given(data=st.binary(max_size=300))
def test_no_bytes_make_the_reader_raise_anything_else(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(FileProblem):
            assert read_report(Path(file.name), SPEC).any()


# --- with the tokeniser of a pretrained folder ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has all files; only its tokeniser is read here."""
    made = tmp_path / "models/words"
    made.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (made / name).touch()
    write_tokenizer(made)
    monkeypatch.setenv("FEDMM_PRETRAINED", str(tmp_path / "models"))
    return made


def test_a_named_tokeniser_gives_its_own_ids_plus_one_without_special_tokens(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("no effusion w0 w1 w2 unheard")
    read = read_report(path, InputSpec(report_tokens=10, report_tokenizer="words"))
    assert read.dtype == np.int64
    assert read.tolist() == [5, 6, 7, 8, 9, 4, 0, 0, 0, 0], "neither cut nor padded as the file says"
    assert read_report(path, InputSpec(report_tokens=8, report_tokenizer="words")).tolist() == read.tolist()[:8]


def test_a_tokeniser_that_changed_or_went_is_noticed(tmp_path: Path, folder: Path) -> None:
    path, spec = tmp_path / "r.txt", InputSpec(report_tokens=8, report_tokenizer="words")
    path.write_text("no effusion")
    before = read_report(path, spec)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"effusion"', '"cough"'))
    assert read_report(path, spec)[1] != before[1]
    file.unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        read_report(path, spec)


def test_a_report_is_refused_for_what_it_says_and_never_for_the_tokeniser_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator chooses the tokeniser: an answer that hangs on it and on the text would be a release, unpaid."""
    folder = tmp_path / "pretrained" / "narrow"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
    Tokenizer(WordLevel({"effusion": 0})).save(str(folder / "tokenizer.json"))  # knows one word, and no way out
    monkeypatch.setenv("FEDMM_PRETRAINED", str(tmp_path / "pretrained"))
    narrow = InputSpec(report_tokens=32, report_tokenizer="narrow")
    report = tmp_path / "a.txt"
    report.write_text("effusion", encoding="utf-8")
    assert read_report(report, narrow).tolist() == [1] + [0] * 31
    report.write_text("无胸腔积液", encoding="utf-8")
    assert read_report(report, SPEC).any()
    assert not read_report(report, narrow).any()
    report.write_text("... --- ...", encoding="utf-8")
    for spec in (SPEC, narrow):
        with pytest.raises(FileProblem, match="no word"):
            read_report(report, spec)
