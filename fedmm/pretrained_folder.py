"""Where pretrained models lie on this machine, and the proof of which one it is.

$FEDMM_PRETRAINED/NAME/, or pretrained/NAME/ in the working directory. The variable belongs to whoever runs the process, a
hospital or the coordinator: a message can only say NAME, and the digest of what the coordinator has under it. Nothing
here or in what reads these files reaches the network, and no pickled file is ever opened.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmm.config import ModelConfig
from fedmm.errors import ConfigError, PolicyRefused
from fedmm.schema import MODALITIES, PRETRAINED_NAME, InputSpec

VARIABLE, DEFAULT = "FEDMM_PRETRAINED", "pretrained"
CONFIG, WEIGHTS, TOKENIZER, EXTRACTOR = "config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, EXTRACTOR)  # all that is ever read of a folder
NEEDED = (CONFIG, WEIGHTS)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
PORTION = 2**20


def find(name: str) -> Path:
    """The folder of this name, without links on the way to any file of it.

    Raises: ConfigError for what is no plain name, a folder that is not there or lacks a file, and a file elsewhere.
    """
    if not name or re.fullmatch(PRETRAINED_NAME, name) is None:
        raise ConfigError(
            f"{name!r} is no name of a pretrained folder", why="a plain name is wanted, never a path", fix=_fix("NAME")
        )
    root = Path(os.environ.get(VARIABLE) or DEFAULT).resolve()
    folder = root / name
    if not folder.is_dir():
        raise ConfigError(f"the pretrained folder {name!r} is not here", fix=_fix(name))
    for file in (folder / each for each in FILES):
        if os.path.lexists(file) and not (file.resolve() == file and file.is_file()):
            raise ConfigError(
                f"{file.name} of the pretrained folder {name!r} is a link or no plain file",
                why="what is checked and what is read must be the same file, inside the folder",
                fix="copy the file itself into the folder",
            )
    for missing in (each for each in NEEDED if not (folder / each).exists()):
        pickled = any(any(folder.glob(pattern)) for pattern in PICKLED)
        raise ConfigError(
            f"the pretrained folder {name!r} has no {missing}",
            why="pickled weights can run code when they are read: they never are" if pickled else "",
            fix="convert the weights to one safetensors file" if pickled else _fix(name),
        )
    return folder


def _fix(name: str) -> str:
    return f"put {', '.join(NEEDED)} (for reports {TOKENIZER}) into ${VARIABLE}/{name}/: docs/howto-pretrained.md"


def digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over name, size and bytes of each of FILES that is there."""
    here = [file for file in (folder / name for name in FILES) if file.exists()]
    info = [file.stat() for file in here]
    return _digest(tuple(here), tuple((i.st_size, i.st_mtime_ns, i.st_ctime_ns, i.st_ino) for i in info))


@lru_cache(maxsize=16)
def _digest(files: tuple[Path, ...], stamps: tuple[tuple[int, ...], ...]) -> str:
    """stamps: part of the key, so that a changed file is read again, and an unchanged one of gigabytes is not."""
    total = hashlib.sha256()
    for file in files:
        if file.exists():
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while part := opened.read(PORTION):
                    total.update(part)
    return total.hexdigest()


def named(model: ModelConfig, inputs: InputSpec) -> tuple[str, ...]:
    """The folders that a model needs, sorted."""
    return tuple(sorted({*(model.pretrained(m) for m in MODALITIES), inputs.report_tokenizer} - {""}))


def digests(model: ModelConfig, inputs: InputSpec) -> dict[str, str]:
    """What `ModelSpec.pretrained` is where a model is first made. Raises: ConfigError, as `find`."""
    return {name: digest(find(name)) for name in named(model, inputs)}


def verified(name: str, expected: Mapping[str, str]) -> Path:
    """The folder of this name, which holds exactly what the model's maker had.

    expected: `ModelSpec.pretrained`.  Raises: PolicyRefused if it says nothing, the folder is not usable or another one.
    """
    if name not in expected:
        raise PolicyRefused(
            f"the model names the pretrained folder {name!r} without its digest",
            why="nobody could tell whether all start from the same weights",
            fix="the coordinator's fedmm writes the digest into the model's configuration: use the same version",
        )
    try:
        folder = find(name)
    except ConfigError as error:
        raise PolicyRefused(error.what, why=error.why, fix=error.fix) from None
    if digest(folder) != expected[name]:
        raise PolicyRefused(
            f"the pretrained folder {name!r} differs from the coordinator's",
            why=f"the SHA-256 of {', '.join(FILES)} is another one",
            fix="get the same files as the coordinator, all of them and no others of these names",
        )
    return folder


# --- its tokeniser ------------------------------------------------------------------------------------------------------


def tokenizer(name: str) -> Any:
    """The `tokenizers.Tokenizer` of a folder: public and fixed. Raises: ConfigError."""
    file = find(name) / TOKENIZER
    if not file.exists():
        raise ConfigError(f"the pretrained folder {name!r} has no {TOKENIZER}", fix=_fix(name))
    info = file.stat()
    return _tokenizer(file, (info.st_size, info.st_mtime_ns, info.st_ino))


@lru_cache(maxsize=4)
def _tokenizer(file: Path, stamp: tuple[int, ...]) -> Any:
    """stamp: part of the key, so that a changed file is read again."""
    from tokenizers import Tokenizer  # here: only who has such a folder waits for it

    try:
        made = Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing narrower, with pieces of the file
        raise ConfigError(f"{TOKENIZER} of the pretrained folder {file.parent.name!r} cannot be read") from None
    made.no_truncation()
    made.no_padding()
    return made


def specials(made: Any) -> tuple[list[int], list[int]]:
    """Ids that this tokeniser puts before and after a text: [CLS] and [SEP], <s> and </s>; none where it has no rule."""
    plain, framed = made.encode("a", add_special_tokens=False).ids, made.encode("a").ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []
