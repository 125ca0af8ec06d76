"""Logs of long-running processes: what they keep, and what gets into no byte of them."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmm.sites import logs
from fedmm.sites.logs import FIELDS, NOT_CONSTANT, json_logs
from tests.planted import plant

PLANTED = plant()
FOREIGN = ("flwr", "uvicorn.error", "httpx", "torch.cuda", "py.warnings", "a stranger")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with json_logs(tmp_path / "logs", "site") as path:
        yield path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def _they_speak() -> Iterator[None]:
    """Whatever other tests' imports have made of their levels; and no logger of a strange name is left."""
    names = set(logging.root.manager.loggerDict)
    before = {name: logging.getLogger(name).level for name in FOREIGN}
    for name in FOREIGN:
        logging.getLogger(name).setLevel(logging.INFO)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    for name in set(logging.root.manager.loggerDict) - names - set(FOREIGN):
        del logging.root.manager.loggerDict[name]


# --- a thousand identifiers -------------------------------------------------------------------------------------------


def _as_argument(log: logging.Logger, secret: str) -> None:
    log.info("connected to %s after %d tries", secret, 3)


def _as_named_argument(log: logging.Logger, secret: str) -> None:
    log.warning("patient %(who)s", {"who": secret})


def _as_message(log: logging.Logger, secret: str) -> None:
    log.error(f"cannot read {secret}")


def _as_object(log: logging.Logger, secret: str) -> None:
    log.error(ValueError(secret))


def _as_bad_arguments(log: logging.Logger, secret: str) -> None:
    log.error("two of %s and %s", secret)


def _as_exception(log: logging.Logger, secret: str) -> None:
    try:
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise ValueError(f"no such file: {secret}") from error
    except ValueError:
        log.exception("it failed")


def _as_group(log: logging.Logger, secret: str) -> None:
    try:
        raise ExceptionGroup(secret, [ValueError(secret), OSError(2, secret, secret)])
    except ExceptionGroup:
        log.exception("they failed", stack_info=True)


def _as_extra(log: logging.Logger, secret: str) -> None:
    log.info("step", extra={"hospital": secret, "run": secret, "phase": secret, "patient": secret, "code": secret})


def _as_logger(log: logging.Logger, secret: str) -> None:
    logging.getLogger(secret.replace(".", "_")).error("hello")


WAYS: tuple[Callable[[logging.Logger, str], None], ...] = (
    _as_argument, _as_named_argument, _as_message, _as_object, _as_bad_arguments, _as_exception, _as_group, _as_extra,
    _as_logger,
)  # fmt: skip


@pytest.mark.usefixtures("_they_speak")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_byte_of_a_foreign_logger_tells_a_thousand_identifiers_that_it_was_given(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], way: Callable[[logging.Logger, str], None]
) -> None:
    stream = io.StringIO()
    with json_logs(tmp_path / "logs", "site", stream=stream) as path:
        for i, secret in enumerate(PLANTED.all):
            way(logging.getLogger(FOREIGN[i % len(FOREIGN)]), secret)
    assert len(lines(path)) == 1000
    assert PLANTED.found_in(everything(tmp_path), stream.getvalue(), *capfd.readouterr()) == set()


def test_the_search_finds_each_of_the_thousand() -> None:
    assert len(set(PLANTED.all)) == 1000
    assert PLANTED.found_in("\n".join(PLANTED.all).upper()) == set(PLANTED.all)


def test_an_exception_that_one_of_our_own_loggers_has_loses_its_text_too(out: Path) -> None:
    for secret in PLANTED.all:
        _as_exception(logging.getLogger("fedmm.client"), secret)
        _as_bad_arguments(logging.getLogger("fedmm.client"), secret)
    assert PLANTED.found_in(everything(out.parent)) == set()


def test_warnings_and_what_nobody_caught_lose_their_text(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError(PLANTED.name[0])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings put its own in place
        warnings.showwarning(PLANTED.word[0], UserWarning, "a.py", 1)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    assert PLANTED.found_in(everything(out.parent), *capfd.readouterr()) == set()
    last = lines(out)[-1]
    assert (last["level"], last["logger"]) == ("CRITICAL", "fedmm")
    assert last["event"].startswith("ended by an error | ValueError at test_logs.py:")


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_they_speak")
def test_a_foreign_template_is_kept_if_it_is_a_constant_and_its_exception_as_type_and_places(out: Path) -> None:
    for way in (_as_argument, _as_message, _as_exception):
        way(logging.getLogger("flwr"), "x")
    events = [line["event"] for line in lines(out)]
    assert events[0] == "connected to %s after %d tries"
    assert events[1] == NOT_CONSTANT
    assert events[2].startswith("it failed | ValueError at test_logs.py:")


def test_our_loggers_say_their_message_and_the_fields_on_the_list(out: Path) -> None:
    given = {"run": "a1", "round": 3, "hospital": "north", "phase": "training", "code": 1001, "correlation": "00ff"}
    logging.getLogger("fedmm.client").warning(
        "refused: %s", "because", extra={**given, "seconds": 1.5, "bytes": 7, "patient": "mrn"}
    )
    (line,) = lines(out)
    assert set(line) == set(FIELDS)
    assert line["event"] == "refused: because"
    assert {name: line[name] for name in given} == given


@pytest.mark.parametrize("value", ["two words", "/a/path", "x" * 65, None, ["a"], ""])
def test_a_field_that_is_no_name_is_left_out(out: Path, value: object) -> None:
    logging.getLogger("fedmm").info("x", extra={"hospital": value, "round": "7", "seconds": float("nan")})
    assert set(lines(out)[0]) == {"time", "level", "logger", "event", "pid"}


def test_a_message_with_line_ends_is_one_line(out: Path) -> None:
    logging.getLogger("fedmm").info("a\nb\u2028c\x1b[2J")
    assert len(out.read_bytes().splitlines()) == 1
    assert lines(out)[0]["event"] == "a\nb\u2028c\x1b[2J"


def test_handlers_that_others_brought_print_nothing_meanwhile_and_are_back_afterwards(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("tests.others")
    logger.addHandler(handler)
    try:
        with json_logs(tmp_path, "site"):
            logger.error("now")
        assert stream.getvalue() == ""
        logger.error("then")
        assert stream.getvalue() == "then\n"
    finally:
        logger.removeHandler(handler)


def test_files_are_readable_by_their_owner_only_and_are_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    with json_logs(tmp_path / "logs", "site"):
        for _ in range(100):
            logging.getLogger("fedmm").info("hello")
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["site.jsonl", *(f"site.jsonl.{i}" for i in range(1, 6))]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_size <= 1000 for file in files)
