"""A prepared corpus on disk: manifest, token shards, tokenizer.

OUT/manifest.json                     counts, settings, fingerprint, checksums of every file
OUT/skipped.jsonl                     what of the input is not in the corpus, and why
OUT/tokenizer/                        tokenizer.json, vocab.txt, tokenizer_config.json
OUT/{train,heldout}-00000.tokens      little-endian uint16 or uint32, one after another
OUT/{train,heldout}-00000.lines       little-endian uint32: tokens of each line, 0 = end of
                                      document
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np

from fastelectra.data import vocabulary
from fastelectra.data.encoding import LINES_DTYPE
from fastelectra.data.vocabulary import SpecialTokens
from fastelectra.errors import FastElectraError

FORMAT = 2
SUFFIXES = ("tokens", "lines")  # of a shard's files
SAMPLES, SAMPLE_BYTES = 16, 4096  # blocks of a file that are read when a corpus is opened
READERS = 8  # files read at a time


@dataclass(frozen=True)
class Shard:
    """A fair sample of a split's documents."""

    tokens: np.ndarray  # uint16 | uint32 [N]
    lines: np.ndarray  # uint32: tokens of each line, 0 = end of document
    vocab_size: int = 1 << 32  # every token is below it

    def is_sound(self) -> bool:
        """Whether compiled code may follow its numbers. Reads all of it."""
        whole = self.lines.sum(dtype=np.int64) == len(self.tokens)
        return bool(whole and self.tokens.max(initial=0) < self.vocab_size)


@dataclass(frozen=True)
class ShardEntry:
    """A shard's line in the manifest."""

    split: str  # train | heldout
    name: str  # of its two files, without suffix
    documents: int
    lines: int  # entries of the .lines file
    tokens: int
    sha256: dict[str, str]  # of the file with each suffix
    sample_sha256: dict[str, str]  # of SAMPLES blocks of it


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    tokenizer_fingerprint: str  # SHA-256 of tokenizer.json
    vocab_size: int
    special_tokens: dict[str, int]
    token_bytes: int  # 2 or 4
    settings: dict  # what the corpus was made from, and how
    counts: dict[str, int]
    shards: list[ShardEntry]

    @property
    def fingerprint(self) -> str:
        """Of all the rest, and so of every byte of the corpus."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, path: Path) -> None:
        values = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        write_durably(path, [json.dumps(values, indent=1), "\n"])

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise FastElectraError(
                    f"{path} was written by another version of fastelectra: prepare it again"
                )
            fingerprint = values.pop("fingerprint")
            shards = [_of_types(ShardEntry, entry) for entry in values.pop("shards")]
            manifest = _of_types(cls, {**values, "shards": shards})
            if manifest.fingerprint == fingerprint and manifest._is_sound():
                return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise FastElectraError(f"{path} is damaged: delete {path.parent} and prepare it again")

    def _is_sound(self) -> bool:
        """Whether it can be followed: its names stay in the folder, and there is what it names."""
        SpecialTokens(**self.special_tokens)
        return self.token_bytes in (2, 4) and all(
            re.fullmatch(r"(train|heldout)-[0-9]{5,}", entry.name)
            and set(entry.sha256) == set(entry.sample_sha256) == set(SUFFIXES)
            and (entry.lines > 0 or entry.tokens == 0)
            for entry in self.shards
        )

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.token_bytes}")


class Corpus:
    """A prepared corpus. Opening it checks the size of every file and blocks of its content."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.vocab_size = manifest.vocab_size
        self.special = SpecialTokens(**manifest.special_tokens)
        self.fingerprint = manifest.fingerprint
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.tokenizer_dir = path / "tokenizer"

    def split(self, name: str) -> list[Shard]:
        """The shards of "train" or "heldout" that hold any text, memory-mapped.

        Raises FastElectraError when there is none.
        """
        shards = [
            Shard(
                _map(self._file(entry, "tokens"), self.manifest.token_dtype),
                _map(self._file(entry, "lines"), LINES_DTYPE),
                self.vocab_size,
            )
            for entry in self.manifest.shards
            if entry.split == name and entry.tokens
        ]
        if not shards:
            raise FastElectraError(
                f"{self.path} has no text in its {name} split: prepare it again from several"
                " documents, with --heldout-fraction above 0"
            )
        return shards

    def check(self) -> None:
        """Quick whatever the size; FastElectraError when a file is missing, cut off or another's.

        Of the shards it reads SAMPLES blocks a file, of the tokenizer everything.
        """
        file = self.tokenizer_dir / "tokenizer.json"
        if not file.is_file():
            raise self._damaged(file, "is missing")
        if file_sha256(file) != self.tokenizer_fingerprint:
            raise self._damaged(file, "is damaged or of another corpus")
        tokenizer = vocabulary.load(self.tokenizer_dir)
        if (tokenizer.get_vocab_size(), SpecialTokens.of(tokenizer, str(file))) != (
            self.vocab_size,
            self.special,
        ):
            raise self._damaged(self.path / "manifest.json", f"does not fit {file}")
        self._each_file(self._check_sample)

    def verify(self) -> None:
        """Read everything; FastElectraError when a file is not what its checksum says."""
        self._each_file(self._check_whole)

    def _each_file(self, check: Callable[[ShardEntry, str], None]) -> None:
        files = [(entry, suffix) for entry in self.manifest.shards for suffix in SUFFIXES]
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for _ in pool.map(check, *zip(*files, strict=True)):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check_sample(self, entry: ShardEntry, suffix: str) -> None:
        file = self._file(entry, suffix)
        if not file.is_file():
            raise self._damaged(file, "is missing")
        width = self.manifest.token_bytes if suffix == "tokens" else LINES_DTYPE.itemsize
        size, expected = file.stat().st_size, getattr(entry, suffix) * width
        if size != expected:
            raise self._damaged(file, f"has {size} bytes instead of {expected}")
        if sample_sha256(file) != entry.sample_sha256[suffix]:
            raise self._damaged(file, "is damaged or another shard's")

    def _check_whole(self, entry: ShardEntry, suffix: str) -> None:
        file = self._file(entry, suffix)
        if file_sha256(file) != entry.sha256[suffix]:
            raise self._damaged(file, "is damaged")

    def _file(self, entry: ShardEntry, suffix: str) -> Path:
        return self.path / f"{entry.name}.{suffix}"

    def _damaged(self, file: Path, what: str) -> FastElectraError:
        return FastElectraError(f"{file} {what}: delete {self.path} and prepare it again")


def open_corpus(path: str | Path) -> Corpus:
    """Open what `fastelectra prepare … --out PATH` wrote; FastElectraError if it is not there."""
    if not str(path):
        raise FastElectraError(
            "data.path is not set: give the folder that `fastelectra prepare INPUT… --out DIR` made"
        )
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise FastElectraError(
            f"no prepared corpus in {path}: make it with `fastelectra prepare INPUT… --out {path}`"
            f", or `fastelectra prepare --demo --out {path}` for the demo text"
        )
    corpus = Corpus(path, Manifest.read(path / "manifest.json"))
    corpus.check()
    return corpus


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sample_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of SAMPLES blocks of a file, evenly spread from its first to its last."""
    digest = hashlib.sha256()
    last = max(0, path.stat().st_size - SAMPLE_BYTES)
    with open(path, "rb", buffering=0) as file:
        for sample in range(SAMPLES):
            file.seek(last * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def write_durably(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole or leave it as it was, also after a power cut. Raises OSError."""
    aside = path.with_name(f"{path.name}.new")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _of_types(cls, values: dict):
    """A dataclass from JSON; an error if a value is not of its field's very type."""
    for name, kind in get_type_hints(cls).items():
        value, inner = values[name], get_args(kind)
        items = value.values() if isinstance(value, dict) else value if inner else ()
        if type(value) is not (get_origin(kind) or kind) or any(
            type(item) is not inner[-1] for item in items if inner
        ):
            raise TypeError(name)
    return cls(**values)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, mode="r"))
