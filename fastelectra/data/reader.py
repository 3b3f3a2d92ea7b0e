"""Input files to lines and documents, past what is damaged."""

import codecs
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from fastelectra.data import parquet
from fastelectra.data.sources import Skipped, Source
from fastelectra.errors import FastElectraError

ZSTD_BYTES = 1 << 10  # unpacked at a time, to 32 MB at most
LINE_BYTES = 1 << 20  # a longer line is cut at white space, so that memory stays bounded
RECORD_BYTES = 1 << 25  # a longer line of a .jsonl file is skipped: it takes up to 13 × its size


class _Unreadable(Exception):
    """Why a file, or the rest of it, cannot be read."""


class Reader:
    """Iterates over the lines of all sources, in order; None ends a document.

    Lines are stripped and never empty. `documents` says what a document of a .txt file is:
    "blank-line" (up to a blank line), "line" or "file"; in .jsonl and .parquet it is the text
    `field` of a record. Holds one line of text (LINE_BYTES) or one record at a time. What is
    damaged is added to `skipped`; raises FastElectraError when a file's records begin without
    text in the field.
    """

    def __init__(self, sources: Iterable[Source], documents: str, field: str, skipped: Skipped):
        self.sources, self.documents, self.field = sources, documents, field
        self.skipped = skipped
        self._finished = 0
        self._position: Callable[[], int] = int
        self._has_text = False  # in the field, a record of the present file

    @property
    def bytes_read(self) -> int:
        """Of the input files as stored, so far."""
        return self._finished + self._position()

    def __iter__(self) -> Iterator[str | None]:
        for source in self.sources:
            self._has_text = False
            try:
                yield from self._lines_of(source)
            except _Unreadable as error:
                self.skipped.add(source.path, str(error))
            self._position = int
            self._finished += source.size
            yield None

    def _lines_of(self, source: Source) -> Iterator[str | None]:
        kinds = {".txt": self._text, ".jsonl": self._jsonl, ".parquet": self._parquet}
        try:
            raw = open(source.path, "rb")  # noqa: SIM115  (the next line closes it)
        except OSError as error:
            raise _Unreadable(error.strerror) from None
        with raw:
            self._position = raw.tell
            try:
                stream = _decompressed(raw, source)
                if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise _Unreadable("UTF-16, not UTF-8: convert it (iconv -f utf-16 -t utf-8)")
                yield from kinds[source.kind](source, stream)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                raise _Unreadable("damaged, cut off or not gzip from some place on") from None
            about = os.fstat(raw.fileno())
            if (about.st_size, str(about.st_mtime_ns)) != (source.size, source.changed):
                self.skipped.add(source.path, "changed while it was read")

    def _text(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        def skip(offset: int) -> None:
            unit = "byte of the unpacked text" if source.compression else "byte"
            self.skipped.add(source.path, "line is not UTF-8", f"{unit} {offset}")

        for line in _lines(stream, skip):
            if line:
                yield line
            if self.documents == "line" or (self.documents == "blank-line" and not line):
                yield None

    def _jsonl(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        number = 0
        while record := stream.readline(RECORD_BYTES):
            number += 1
            where = f"line {number}"
            if len(record) == RECORD_BYTES:
                while record and not record.endswith(b"\n"):
                    record = stream.readline(RECORD_BYTES)
                self.skipped.add(
                    source.path, f"line is longer than {RECORD_BYTES >> 20} MiB", where
                )
                continue
            try:
                text = record.decode("utf-8-sig" if number == 1 else "utf-8").replace("\0", "")
                values = json.loads(text) if text.strip() else None
            except UnicodeDecodeError:
                self.skipped.add(source.path, "line is not UTF-8", where)
                continue
            except (ValueError, RecursionError):  # the first also for huge numbers
                self.skipped.add(source.path, "line is not JSON", where)
                continue
            if not text.strip():
                continue
            if isinstance(values, dict) and self.field in values:
                yield from self._record(values[self.field], source, where)
                continue
            names = list(values)[:8] if isinstance(values, dict) else []
            hint = f" (there is {', '.join(names) or 'none'}); name it with --field"
            self._misfit(source, where, f"no field {self.field!r}", hint)

    def _parquet(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        library = _optional("pyarrow.parquet", source)
        arrow = _optional("pyarrow", source)
        with _seekable(stream, source) as seekable:
            try:
                file = library.ParquetFile(seekable, buffer_size=LINE_BYTES)
                yield from self._rows(source, file, seekable)
            except (
                arrow.ArrowException, OSError, parquet.Damaged,
                UnicodeDecodeError,  # of columns' names
            ):  # fmt: skip
                raise _Unreadable("damaged or not Parquet from some place on") from None

    def _rows(self, source: Source, file, stream: BinaryIO) -> Iterator[str | None]:
        names = file.schema_arrow.names
        if names.count(self.field) != 1:
            found = "several columns" if self.field in names else "no column"
            raise FastElectraError(
                f"{source.path}: {found} {self.field!r} (there is {', '.join(names[:8])}); name"
                " it with --field"
            )
        row = 0
        self._position = lambda: source.size * row // max(1, file.metadata.num_rows)
        for first, values, problem in parquet.batches(file, stream, self.field):
            row = first
            if problem:
                self.skipped.add(source.path, problem, f"row {row}")
                continue
            for row, value in enumerate(values, first):
                if values.nbytes > RECORD_BYTES and _stored(value) > RECORD_BYTES:
                    reason = f"row is longer than {RECORD_BYTES >> 20} MiB"
                    self.skipped.add(source.path, reason, f"row {row}")
                    continue
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    self.skipped.add(source.path, "row is not UTF-8", f"row {row}")
                    continue
                yield from self._record(text, source, f"row {row}")

    def _record(self, text: object, source: Source, where: str) -> Iterator[str | None]:
        """A record's text, line by line; no text (null) is no document."""
        if text is None:
            return
        if not isinstance(text, str):
            reason = f"field {self.field!r} is not text but {type(text).__name__}"
            self._misfit(source, where, reason)
            return
        self._has_text = True
        try:
            stream = io.BytesIO(text.encode("utf-8"))
        except UnicodeEncodeError:
            self.skipped.add(source.path, "text is not valid Unicode", where)
            return
        yield from (line for line in _lines(stream) if line)
        yield None

    def _misfit(self, source: Source, where: str, reason: str, hint: str = "") -> None:
        """A record of another kind: skipped among others with text, else likely a mistake."""
        if not self._has_text:
            raise FastElectraError(f"{source.path}, {where}: {reason}{hint}")
        self.skipped.add(source.path, reason, where)


def _stored(value) -> int:
    """Bytes of one of pyarrow's texts; 0 for what is none."""
    value = getattr(value, "value", value)  # of a dictionary's scalar
    buffer = value.as_buffer() if hasattr(value, "as_buffer") else None
    return 0 if buffer is None else buffer.size


def _decompressed(raw: BinaryIO, source: Source) -> BinaryIO:
    if source.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == ".zst":
        return io.BufferedReader(_Zstd(raw, source), 1 << 17)
    return raw


@contextmanager
def _seekable(stream: BinaryIO, source: Source) -> Iterator[BinaryIO]:
    """Parquet is read from its end: a compressed file has to be unpacked first."""
    if not source.compression:
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
        yield unpacked


class _Zstd(io.RawIOBase):
    """The text of a .zst file, frame after frame; _Unreadable where it is damaged or cut off."""

    def __init__(self, raw: BinaryIO, source: Source):
        self._library = _optional("zstandard", source)
        self._raw = raw
        self._frame = None  # being unpacked
        self._packed = b""  # read but not unpacked
        self._text = memoryview(b"")  # unpacked but not handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._packed = self._packed or self._raw.read(ZSTD_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise _Unreadable("cut off")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._text = memoryview(self._frame.decompress(self._packed))
        except self._library.ZstdError:
            raise _Unreadable("damaged or not zstd from some place on") from None
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None


def _optional(module: str, source: Source):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise FastElectraError(
            f"{source.path}: reading it needs {module.partition('.')[0]}:"
            " pip install 'fastelectra[data]'"
        ) from None


def _lines(stream: BinaryIO, skip: Callable[[int], None] | None = None) -> Iterator[str]:
    """Stripped lines, blank ones too; a line beyond LINE_BYTES in parts, cut at white space.

    `skip` is called with the offset of each line, or part of one, that is not UTF-8.
    """
    offset, rest = 0, b""
    inside = False  # a line that has been cut
    while True:
        block = stream.read(LINE_BYTES - len(rest))
        data = rest + block
        if not data:
            return
        cut = data.rfind(b"\n") + 1 if block else len(data)
        if cut == 0:
            cut = _cut(data) if len(data) == LINE_BYTES else 0
        lines = _decode(data[:cut], offset, skip)
        last = lines.pop()  # empty after a newline
        for line in lines:
            if line is not None and ((text := line.strip()) or not inside):
                yield text
            inside = False
        if last is None or (last := last.strip()):
            if last:
                yield last
            inside = True
        rest, offset = data[cut:], offset + cut


def _cut(data: bytes) -> int:
    """Where to cut a line that goes on: after the last space, else between two characters."""
    cut = data.rfind(b" ") + 1
    if cut == 0:
        cut = len(data) - 1
        while cut > len(data) - 4 and data[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut


def _decode(data: bytes, offset: int, skip: Callable[[int], None] | None) -> list[str | None]:
    """Lines without byte order mark and NULs; None for one that is not UTF-8.

    `offset` is where `data` begins in the file.
    """
    with suppress(UnicodeDecodeError):  # mostly all of it is
        return _utf8(data, offset).split("\n")
    lines: list[str | None] = []
    for line in data.split(b"\n"):
        try:
            lines.append(_utf8(line, offset))
        except UnicodeDecodeError:
            skip(offset)
            lines.append(None)
        offset += len(line) + 1
    return lines


def _utf8(data: bytes, offset: int) -> str:
    return data.decode("utf-8-sig" if offset == 0 else "utf-8").replace("\0", "")
