"""A prepared corpus on disk: manifest, token shards, tokenizer.

OUT/manifest.json                     counts, settings, fingerprint, a checksum per file
OUT/tokenizer/                        tokenizer.json, vocab.txt, tokenizer_config.json
OUT/{train,heldout}-00000.tokens      little-endian uint16 or uint32, one after another
OUT/{train,heldout}-00000.lines       little-endian uint32: tokens of each line, 0 = end of
                                      document
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastelectra.data.encoding import LINES_DTYPE
from fastelectra.data.vocabulary import SpecialTokens
from fastelectra.errors import FastElectraError

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A fair sample of a split's documents."""

    tokens: np.ndarray  # uint16 | uint32 [N]
    lines: np.ndarray  # uint32: tokens of each line, 0 = end of document


@dataclass(frozen=True)
class ShardEntry:
    """A shard's line in the manifest."""

    split: str  # train | heldout
    name: str  # of its two files, without suffix
    documents: int
    lines: int  # entries of the .lines file
    tokens: int
    sha256: dict[str, str]  # of the file with each suffix


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    fingerprint: str  # of tokenizer, settings and input
    tokenizer_fingerprint: str
    vocab_size: int
    special_tokens: dict[str, int]
    token_bytes: int  # 2 or 4
    settings: dict  # what the corpus was made from, and how
    counts: dict[str, int]
    shards: list[ShardEntry]

    def write(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)  # names may be no UTF-8
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise FastElectraError(
                    f"{path} was written by another version of fastelectra: prepare it again"
                )
            shards = [ShardEntry(**entry) for entry in values.pop("shards")]
            return cls(shards=shards, **values)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FastElectraError(
                f"{path} is damaged: delete {path.parent} and prepare it again"
            ) from None

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.token_bytes}")


class Corpus:
    """A prepared corpus. Opening it checks that every file is there in its full size."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.vocab_size = manifest.vocab_size
        self.special = SpecialTokens(**manifest.special_tokens)
        self.fingerprint = manifest.fingerprint
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.tokenizer_dir = path / "tokenizer"

    def split(self, name: str) -> list[Shard]:
        """The shards of "train" or "heldout" that hold any text, memory-mapped."""
        return [
            Shard(
                _map(self._file(entry, "tokens"), self.manifest.token_dtype),
                _map(self._file(entry, "lines"), LINES_DTYPE),
            )
            for entry in self.manifest.shards
            if entry.split == name and entry.tokens
        ]

    def verify(self) -> None:
        """Read everything; FastElectraError when a file is not what its checksum says."""
        for entry in self.manifest.shards:
            for suffix, expected in entry.sha256.items():
                if file_sha256(self._file(entry, suffix)) != expected:
                    raise self._damaged(self._file(entry, suffix), "is damaged")

    def check_sizes(self) -> None:
        """FastElectraError when a file is missing or of the wrong size."""
        if not (self.tokenizer_dir / "tokenizer.json").is_file():
            raise self._damaged(self.tokenizer_dir / "tokenizer.json", "is missing")
        for file, size in self._expected_sizes():
            if not file.is_file():
                raise self._damaged(file, "is missing")
            if file.stat().st_size != size:
                raise self._damaged(file, f"has {file.stat().st_size} bytes instead of {size}")

    def _expected_sizes(self) -> Iterator[tuple[Path, int]]:
        for entry in self.manifest.shards:
            yield self._file(entry, "tokens"), entry.tokens * self.manifest.token_bytes
            yield self._file(entry, "lines"), entry.lines * LINES_DTYPE.itemsize

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
    corpus.check_sizes()
    return corpus


def shard_name(split: str, number: int) -> str:
    """Of a shard's files, without suffix."""
    return f"{split}-{number:05d}"


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, mode="r"))
