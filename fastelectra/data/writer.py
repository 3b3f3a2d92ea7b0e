"""Appends encoded text to the files of many shards, and can go on after an interruption."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastelectra.data.encoding import LINES_DTYPE, Encoded
from fastelectra.data.shards import (
    SUFFIXES,
    ShardEntry,
    file_sha256,
    sample_sha256,
    write_durably,
)

BUFFER_BYTES = 64 << 20  # held in memory before it is written out


@dataclass
class _Counts:
    documents: int = 0
    lines: int = 0  # entries of the .lines file
    tokens: int = 0
    unknown: int = 0


class ShardWriter:
    """The shards of a corpus in the making.

    After each flush `progress.json` says how many chunks are safe on disk; a new writer in the
    same folder cuts the files back to that state and starts with `chunks` done.
    """

    def __init__(self, folder: Path, splits: Sequence[str], dtype: np.dtype):
        """`splits` names the split of each shard."""
        self.chunks = 0
        self._folder, self._dtype = folder, dtype
        self._splits = list(splits)
        self._counts = [_Counts() for _ in splits]
        self._buffers: dict[int, list[Encoded]] = {}
        self._buffered = 0
        self._restore()

    def add(self, encoded: Sequence[Encoded]) -> None:
        """Take the next chunk."""
        for part in encoded:
            self._buffers.setdefault(part.shard, []).append(part)
            self._buffered += part.tokens.nbytes + part.lines.nbytes
            counts = self._counts[part.shard]
            counts.documents += part.documents
            counts.lines += len(part.lines)
            counts.tokens += len(part.tokens)
            counts.unknown += part.unknown
        self.chunks += 1
        if self._buffered >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write out what is buffered, then say so in progress.json."""
        for shard, parts in self._buffers.items():
            self._append(shard, "tokens", [part.tokens for part in parts])
            self._append(shard, "lines", [part.lines for part in parts])
        self._buffers, self._buffered = {}, 0
        state = {"chunks": self.chunks, "shards": [vars(counts) for counts in self._counts]}
        write_durably(self._progress, [json.dumps(state)])

    def finish(self) -> tuple[list[ShardEntry], dict[str, int]]:
        """Flush; the shards for the manifest, and the corpus's counts."""
        self.flush()
        entries = [
            ShardEntry(
                split, self._name(shard), counts.documents, counts.lines, counts.tokens,
                *(
                    {suffix: checksum(self._file(shard, suffix)) for suffix in SUFFIXES}
                    for checksum in (file_sha256, sample_sha256)
                ),
            )
            for shard, (split, counts) in enumerate(zip(self._splits, self._counts, strict=True))
        ]  # fmt: skip
        totals = {
            name: sum(getattr(counts, name) for counts in self._counts)
            for name in ("documents", "tokens", "unknown")
        }
        return entries, totals

    @property
    def _progress(self) -> Path:
        return self._folder / "progress.json"

    def _restore(self) -> None:
        try:
            state = json.loads(self._progress.read_text())
            counts = [_Counts(**counts) for counts in state["shards"]]
            if all(self._file(*of).stat().st_size >= size for of, size in self._sizes(counts)):
                self.chunks, self._counts = state["chunks"], counts
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # nothing done yet, or nothing to rely on
        for of, size in self._sizes(self._counts):
            with open(self._file(*of), "ab") as file:
                file.truncate(size)

    def _sizes(self, counts: list[_Counts]) -> Iterator[tuple[tuple[int, str], int]]:
        """(shard, suffix) and bytes of every file."""
        for shard, of in enumerate(counts):
            yield (shard, "tokens"), of.tokens * self._dtype.itemsize
            yield (shard, "lines"), of.lines * LINES_DTYPE.itemsize

    def _append(self, shard: int, suffix: str, arrays: list[np.ndarray]) -> None:
        with open(self._file(shard, suffix), "ab") as file:
            file.write(np.concatenate(arrays).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _name(self, shard: int) -> str:
        split = self._splits[shard]
        return f"{split}-{shard - self._splits.index(split):05d}"

    def _file(self, shard: int, suffix: str) -> Path:
        return self._folder / f"{self._name(shard)}.{suffix}"
