"""The input files of `prepare`: .txt, .jsonl and .parquet, each also as .gz or .zst."""

import errno
import glob
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fastelectra.errors import FastElectraError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
COMPRESSION_RATIO = 3  # about, of English text


@dataclass(frozen=True, slots=True)
class Source:
    """One input file."""

    path: str  # a third of a Path's size: there may be a million
    kind: str  # one of KINDS
    compression: str  # one of COMPRESSIONS, or empty
    size: int  # bytes as stored
    changed: int  # when, in nanoseconds

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        packed = self.compression or self.kind == ".parquet"
        return self.size * COMPRESSION_RATIO if packed else self.size


class Skipped:
    """What of the input is left out: by file and reason, how often, and where first."""

    def __init__(self):
        self._found: dict[tuple[str, str], list] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        """To add to an error: the first files and reasons."""
        named = [f"{path}: {reason}" for path, reason in islice(self._found, 3)]
        more = "; …" if len(self._found) > 3 else ""
        return f" (skipped: {'; '.join(named)}{more})" if named else ""

    def add(self, path: str, reason: str, place: str = "") -> None:
        """Count one more of them; `reason` is the same for all of a kind."""
        self._found.setdefault((path, reason), [0, place])[0] += 1

    def by_reason(self) -> Counter[str]:
        """How often for each reason."""
        counts: Counter[str] = Counter()
        for (_, reason), (count, _) in self._found.items():
            counts[reason] += count
        return counts

    def to_jsonl(self, root: Path) -> str:
        """A line for each file and reason, names relative to `root`."""
        records = (
            {
                "file": os.path.relpath(os.path.realpath(path), root),
                "reason": reason,
                "count": count,
            }
            | ({"first": place} if place else {})
            for (path, reason), (count, place) in self._found.items()
        )
        return "".join(f"{json.dumps(record)}\n" for record in records)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files, folders (everything readable below them) and globs, in order, each file once.

    Raises FastElectraError for an input that does not exist, is empty or of an unknown kind.
    """
    found: dict[str, Source] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            candidates = _below(path)
        elif path.exists():
            if _suffixes(str(path)) is None:
                raise FastElectraError(f"{path}: unknown kind of file; {_expected()}")
            candidates = [str(path)]
        else:
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise FastElectraError(f"{name}: no such file or folder")
            candidates = [file for match in matches for file in _below(match) or [match]]
        some = False
        for file in filter(_suffixes, candidates):
            about = _about(file)
            if about and stat.S_ISREG(about.st_mode):
                some = True
                source = Source(file, *_suffixes(file), about.st_size, about.st_mtime_ns)
                found.setdefault(os.path.realpath(file), source)
        if not some:
            raise FastElectraError(f"{name}: no text in there; {_expected()}")
    return list(found.values())


def _about(file: str) -> os.stat_result | None:
    """None if it is gone since it was listed, or is a link to nothing."""
    try:
        return os.stat(file)
    except OSError as error:
        _unless_gone(error)
        return None


def _unless_gone(error: OSError) -> None:
    """What cannot be looked at for another reason must not be missing from the corpus unsaid."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        raise error


def _below(folder: str | Path) -> list[str]:
    """What lies below a folder, in order, but nothing hidden; empty for a file."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_unless_gone):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "tokenizer_config.json" not in files:  # vocab.txt is no text
            found += [str(Path(place, name)) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder


def _suffixes(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the name's ending; None if unknown."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    kind = next((ending for ending in KINDS if name.endswith(ending)), None)
    return None if kind is None else (kind, compression)


def _expected() -> str:
    return f"expected {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} added"
