"""The input files of `prepare`: .txt, .jsonl and .parquet, each also as .gz or .zst.

There may be millions, so lists of them are kept in temporary databases on disk (SQLite's own,
in TMPDIR), which go with the objects.
"""

import errno
import glob
import json
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from fastelectra.errors import FastElectraError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SKIPPED = "skipped.jsonl"  # in a corpus: what was left out
MOST_ENDINGS = 100  # counted one by one
COMPRESSION_RATIO = 3  # about, of English text


@dataclass(frozen=True, slots=True)
class Source:
    """One input file."""

    path: str
    kind: str  # one of KINDS
    compression: str  # one of COMPRESSIONS, or empty
    size: int  # bytes as stored
    changed: str  # when, in nanoseconds: more than a database's numbers have

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        packed = self.compression or self.kind == ".parquet"
        return self.size * COMPRESSION_RATIO if packed else self.size


class Sources:
    """Input files in the order they were added, each with a key that no other one has."""

    def __init__(self):
        self.other_kinds: Counter[str] = Counter()  # files left out, by how their names end
        self._files = _database(
            "CREATE TABLE files (number INTEGER PRIMARY KEY, key BLOB UNIQUE, path BLOB, kind TEXT,"
            " compression TEXT, size INTEGER, changed TEXT)"
        )

    def add(self, key: bytes, source: Source) -> str | None:
        """Add it, unless there is one of that key: returns that one's path."""
        path, *rest = astuple(source)
        values = (key, os.fsencode(path), *rest)
        added = self._files.execute(
            "INSERT OR IGNORE INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?)", values
        )
        if added.rowcount:
            return None
        found = self._files.execute("SELECT path FROM files WHERE key = ?", (key,))
        return os.fsdecode(found.fetchone()[0])

    def __len__(self) -> int:
        return self._files.execute("SELECT count(*) FROM files").fetchone()[0]

    def __iter__(self) -> Iterator[Source]:
        return (source for _, source in self.items())

    def items(self) -> Iterator[tuple[bytes, Source]]:
        """(key, source) of each."""
        for _, key, path, *rest in self._files.execute("SELECT * FROM files ORDER BY number"):
            yield key, Source(os.fsdecode(path), *rest)


class Skipped:
    """What of the input is left out: by file and reason, how often, and where first."""

    def __init__(self):
        self._found = _database(
            "CREATE TABLE found (number INTEGER PRIMARY KEY, path BLOB, reason TEXT, count INTEGER,"
            " place TEXT, UNIQUE (path, reason))"
        )

    def __bool__(self) -> bool:
        return self._found.execute("SELECT 1 FROM found").fetchone() is not None

    def __str__(self) -> str:
        """To add to an error: the first files and reasons."""
        first = self._found.execute("SELECT path, reason FROM found ORDER BY number LIMIT 4")
        named = [f"{os.fsdecode(path)}: {reason}" for path, reason in first]
        more = "; …" if len(named) > 3 else ""
        return f" (skipped: {'; '.join(named[:3])}{more})" if named else ""

    def add(self, path: str, reason: str, place: str = "") -> None:
        """Count one more of them; `reason` is the same for all of a kind."""
        self._found.execute(
            "INSERT INTO found VALUES (NULL, ?, ?, 1, ?)"
            " ON CONFLICT DO UPDATE SET count = count + 1",
            (os.fsencode(path), reason, os.fsencode(place)),
        )

    def by_reason(self) -> Counter[str]:
        """How often for each reason."""
        return Counter(
            dict(
                self._found.execute(
                    "SELECT reason, sum(count) FROM found GROUP BY reason ORDER BY min(number)"
                )
            )
        )

    def to_jsonl(self, root: Path) -> Iterator[str]:
        """A line for each file and reason, names relative to `root`."""
        for path, reason, count, place in self._found.execute(
            "SELECT path, reason, count, place FROM found ORDER BY number"
        ):
            file = os.path.relpath(os.path.realpath(os.fsdecode(path)), root)
            record = {"file": file, "reason": reason, "count": count}
            first = {"first": os.fsdecode(place)} if place else {}
            yield f"{json.dumps(record | first)}\n"


def _database(table: str) -> sqlite3.Connection:
    """In memory up to 2 MB, beyond that in a file without a name."""
    database = sqlite3.connect("", isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute(table)
    return database


def find_sources(inputs: Sequence[str]) -> Sources:
    """Files, folders (everything readable below them) and globs, in order, each file once.

    Raises FastElectraError for an input that does not exist, is empty or of an unknown kind.
    """
    found = Sources()
    for name in inputs:
        some = False
        for file in _files(name, found.other_kinds):
            about = _about(file)
            if about and stat.S_ISREG(about.st_mode):
                some = True
                source = Source(file, *_suffixes(file), about.st_size, str(about.st_mtime_ns))
                found.add(os.fsencode(os.path.realpath(file)), source)
        if not some:
            raise FastElectraError(f"{name}: no text in there; {_expected()}")
    return found


def _files(name: str, others: Counter[str]) -> Iterable[str]:
    """What a file, folder or glob has, of the kinds that can be read; counts the others."""
    if os.path.isdir(name):
        return _below(str(Path(name)), others)
    if os.path.exists(name):
        if _suffixes(name) is None:
            raise FastElectraError(f"{name}: unknown kind of file; {_expected()}")
        return [str(Path(name))]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise FastElectraError(f"{name}: no such file or folder")
    return (
        file
        for match in matches
        for file in (_below(match, others) if os.path.isdir(match) else [match])
        if _can_be_read(file, others)
    )


def _can_be_read(name: str, others: Counter[str]) -> bool:
    """Whether a file of this name can; counts it by its ending if not."""
    if _suffixes(name):
        return True
    ending = _ending(name)
    others[ending if ending in others or len(others) < MOST_ENDINGS else "other endings"] += 1
    return False


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


def _below(folder: str, others: Counter[str]) -> Iterator[str]:
    """What can be read below a folder, in order; nothing hidden, nothing that `prepare` has made.

    What links to folders lead to is taken once, by its real path; what the folder itself lies in
    is not. The order is that of the real paths.
    """
    found = _database("CREATE TABLE found (key BLOB PRIMARY KEY, path BLOB) WITHOUT ROWID")
    folders, linked, seen, root = [folder], [], set(), os.path.realpath(folder)
    while folders or linked:  # links last: what has a name without them keeps it
        path = (folders or linked).pop()
        real = os.path.realpath(path)
        if real in seen or (real != root and os.path.commonpath([real, root]) == real):
            continue
        seen.add(real)
        tokenizer = os.path.isfile(os.path.join(path, "tokenizer_config.json"))
        corpus = os.path.isfile(os.path.join(path, "manifest.json"))
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_symlink() and _is_folder(entry.path):
                        linked.append(os.path.realpath(entry.path))
                    elif tokenizer or (corpus and _is_made(entry.name)):
                        continue  # vocab.txt is no text
                    elif _can_be_read(entry.name, others):
                        name = os.path.join(real, entry.name)
                        key = os.fsencode(name).replace(os.sep.encode(), b"\0")  # folder by folder
                        values = (key, os.fsencode(entry.path))
                        found.execute("INSERT OR IGNORE INTO found VALUES (?, ?)", values)
        except OSError as error:
            _unless_gone(error)
    for (name,) in found.execute("SELECT path FROM found ORDER BY key"):
        yield os.fsdecode(name)


def _is_folder(path: str) -> bool:
    about = _about(path)
    return about is not None and stat.S_ISDIR(about.st_mode)


def _is_made(name: str) -> bool:
    """Whether it is of a corpus, lying in one."""
    return name in ("manifest.json", SKIPPED) or name.endswith((".tokens", ".lines"))


def _suffixes(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the name's ending; None if unknown."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    kind = next((ending for ending in KINDS if name.endswith(ending)), None)
    return None if kind is None else (kind, compression)


def _ending(name: str) -> str:
    """What a person takes for its kind; a number is none."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1] + ending
    word = ending.replace(".", "")
    return ending if word.isalnum() and not word.isdigit() and len(word) < 12 else "no ending"


def _expected() -> str:
    return f"expected {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} added"
