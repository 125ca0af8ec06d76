"""Logs of processes that run for weeks: one JSON object a line, and nothing in it that a patient could be found by.

    {"time": "2026-11-28T01:50:00.123Z", "level": "INFO", "logger": "fedmm.client", "event": "…", "round": 3, "pid": 41}

Loggers of fedmm say what they mean: their messages are written by us, to be read at this hospital. Everybody else's (Flower,
uvicorn, httpx, torch, warnings) may have been given a patient's value, so of theirs only the template is kept, never its
arguments, and only if it stands as a constant in the source file that logs it: an f-string is a value too. Of an
exception, whoever logs it, stay its type and the files and lines that it came through; never its text.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

NAMES = ("run", "hospital", "phase", "correlation")
NUMBERS = ("round", "code", "seconds", "bytes")
FIELDS = ("time", "level", "logger", "event", *NAMES, *NUMBERS, "pid")
LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
NOT_CONSTANT = "(a text that is no constant)"
OURS = "fedmm"
MAX_EVENT = 4000  # characters: a list of twenty problems of a hospital folder is half of that  # measured
MAX_BYTES, KEPT_FILES = 10_000_000, 5  # guess: weeks of a hospital

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with FIELDS and no others."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name == OURS or record.name.startswith(OURS + ".")
        content: dict[str, Any] = {
            "time": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z",
            "level": LEVELS.get(record.levelno, str(int(record.levelno))),
            "logger": record.name if ours else _module(record.name),
            "event": (_said(record) if ours else _template(record)) + _raised(record),
        }
        if ours:  # what others attach could be anything
            content |= {name: value for name in NAMES if _is_name(value := getattr(record, name, None))}
            content |= {name: value for name in NUMBERS if _is_number(value := getattr(record, name, None))}
        return json.dumps({**content, "pid": os.getpid()}, ensure_ascii=True)


class PrivateFile(RotatingFileHandler):
    """Readable by its owner only, from its first byte on."""

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(open(self.baseFilename, "ab", opener=_open_private), encoding="utf-8")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def json_logs(folder: Path, name: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> Iterator[Path]:
    """All logging of this process goes to FOLDER/NAME.jsonl, and to `stream` for who collects a container's output.

    Warnings, and exceptions that nobody catches, go there too. Leaving puts everything back. Yields the file.
    Raises: OSError if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{name}.jsonl"
    handlers: list[logging.Handler] = [PrivateFile(path, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, encoding="utf-8")]
    if stream is not None:
        handlers.append(logging.StreamHandler(stream))
    for handler in handlers:
        handler.setFormatter(JsonLines())
    root = logging.getLogger()
    loggers = [root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    before = [(x, x.handlers[:], x.propagate) for x in loggers]
    root_level, hooks, raises = root.level, (sys.excepthook, threading.excepthook), logging.raiseExceptions
    for logger in loggers:  # Flower and uvicorn bring handlers of their own, which print whole messages
        logger.handlers, logger.propagate = [], True
    root.handlers = handlers
    root.setLevel(level)
    logging.raiseExceptions = False  # or a template that does not fit its arguments is printed with them
    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook = _uncaught, _uncaught_in_thread
    try:
        yield path
    finally:
        (sys.excepthook, threading.excepthook), logging.raiseExceptions = hooks, raises
        logging.captureWarnings(False)
        root.setLevel(root_level)
        for logger, its, propagate in before:
            logger.handlers, logger.propagate = its, propagate
        for handler in handlers:
            handler.close()


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger(OURS).critical("ended by an error", exc_info=(kind, error, trace))


def _uncaught_in_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is not None and not issubclass(what.exc_type, SystemExit):
        logging.getLogger(OURS).error(
            "a thread ended by an error", exc_info=(what.exc_type, what.exc_value, what.exc_traceback)
        )


# --- what may be written ----------------------------------------------------------------------------------------------


def _said(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()[:MAX_EVENT]
    except Exception:  # arguments that do not fit
        return _template(record)


def _template(record: logging.LogRecord) -> str:
    constant = type(record.msg) is str and record.msg in _constants(record.pathname)
    return str(record.msg)[:MAX_EVENT] if constant else NOT_CONSTANT


@lru_cache(maxsize=256)
def _constants(source: str) -> frozenset[str]:
    """Every string constant of a source file."""
    try:
        tree = ast.parse(Path(source).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(x.value for x in ast.walk(tree) if isinstance(x, ast.Constant) and type(x.value) is str)


def _raised(record: logging.LogRecord) -> str:
    """Type and way of the exception that is logged, without its text."""
    if not isinstance(record.exc_info, tuple) or record.exc_info[0] is None:
        return ""
    kind, _, trace = record.exc_info
    steps = []
    while trace is not None:
        steps.append(f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f" | {kind.__name__} at {' < '.join(reversed(steps)) or 'an unknown place'}"


def _module(name: str) -> str:
    """The logger's name if it is that of code; a logger can be called anything."""
    package = name.partition(".")[0]
    return name if name in sys.modules else package if package in sys.modules else "other"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
