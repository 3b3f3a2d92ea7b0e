"""Input files to documents: .txt, .jsonl and .parquet, each also as .gz or .zst."""

import glob
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastelectra.errors import FastElectraError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
COMPRESSION_RATIO = 3  # about, of English text
LINE_BYTES = 1 << 20  # a longer line is cut at white space, so that memory stays bounded
RECORD_BYTES = 1 << 28  # a longer line of a .jsonl file is a mistake


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: str  # one of KINDS
    compression: str  # one of COMPRESSIONS, or empty
    size: int  # bytes as stored

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        packed = self.compression or self.kind == ".parquet"
        return self.size * COMPRESSION_RATIO if packed else self.size


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files, folders (everything readable below them) and globs, in order, each file once.

    Raises FastElectraError for an input that does not exist, is empty or of an unknown kind.
    """
    found: dict[Path, Source] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            candidates = _below(path)
        elif path.exists():
            if _suffixes(path) is None:
                raise FastElectraError(f"{path}: unknown kind of file; {_expected()}")
            candidates = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            if not matches:
                raise FastElectraError(f"{name}: no such file or folder")
            candidates = [file for match in matches for file in _below(match) or [match]]
        files = [file for file in candidates if _suffixes(file) is not None and file.is_file()]
        if not files:
            raise FastElectraError(f"{name}: no text in there; {_expected()}")
        for file in files:
            found.setdefault(file.resolve(), Source(file, *_suffixes(file), file.stat().st_size))
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    """What lies below a folder, in order, but nothing hidden; empty for a file."""
    return sorted(
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not (file.parent / "tokenizer_config.json").exists()  # vocab.txt is no text
    )


def _suffixes(path: Path) -> tuple[str, str] | None:
    """(kind, compression) by the name's ending; None if unknown."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    kind = next((ending for ending in KINDS if name.endswith(ending)), None)
    return None if kind is None else (kind, compression)


def _expected() -> str:
    return f"expected {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} added"


class Reader:
    """Iterates over the lines of all sources, in order; None ends a document.

    Lines are stripped and never empty. `documents` says what a document of a .txt file is:
    "blank-line" (up to a blank line), "line" or "file"; in .jsonl and .parquet it is the text
    `field` of a record. Holds one line of text (LINE_BYTES) or one record at a time. Raises
    FastElectraError, naming the place, for what it cannot read.
    """

    def __init__(self, sources: Sequence[Source], documents: str, field: str):
        self.sources, self.documents, self.field = sources, documents, field
        self._finished = 0
        self._position: Callable[[], int] = int

    @property
    def bytes_read(self) -> int:
        """Of the input files as stored, so far."""
        return self._finished + self._position()

    def __iter__(self) -> Iterator[str | None]:
        kinds = {".txt": self._text, ".jsonl": self._jsonl, ".parquet": self._parquet}
        for source in self.sources:
            with open(source.path, "rb") as raw:
                self._position = raw.tell
                try:
                    yield from kinds[source.kind](source, _decompressed(raw, source))
                except (EOFError, zlib.error, gzip.BadGzipFile):
                    raise FastElectraError(
                        f"{source.path} is damaged, cut off or not gzip"
                    ) from None
                yield None
            self._position = int
            self._finished += source.size

    def _text(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        for line in _lines(stream, source):
            if line:
                yield line
            if self.documents == "line" or (self.documents == "blank-line" and not line):
                yield None

    def _jsonl(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        number, offset = 0, 0
        while record := stream.readline(RECORD_BYTES):
            number += 1
            where = f"{source.path}, line {number}"
            if len(record) == RECORD_BYTES:
                raise FastElectraError(f"{where}: longer than {RECORD_BYTES >> 20} MiB")
            text = _decode(record, offset, source)
            offset += len(record)
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:  # the first also for huge numbers
                raise FastElectraError(f"{where}: not JSON: {error}") from None
            if not isinstance(values, dict) or self.field not in values:
                names = list(values)[:8] if isinstance(values, dict) else []
                raise FastElectraError(
                    f"{where}: no field {self.field!r} (there is {', '.join(names) or 'none'});"
                    " name it with --field"
                )
            yield from self._record(values[self.field], where)

    def _parquet(self, source: Source, stream: BinaryIO) -> Iterator[str | None]:
        parquet = _optional("pyarrow.parquet", source)
        arrow = _optional("pyarrow", source)
        with _seekable(stream, source) as seekable:
            try:
                yield from self._rows(source, parquet.ParquetFile(seekable))
            except (arrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise FastElectraError(f"{source.path}: not readable Parquet: {reason}") from None

    def _rows(self, source: Source, file) -> Iterator[str | None]:
        names = file.schema_arrow.names
        if self.field not in names:
            raise FastElectraError(
                f"{source.path}: no column {self.field!r} (there is {', '.join(names[:8])}); name"
                " it with --field"
            )
        row = 0
        self._position = lambda: source.size * row // max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=64, columns=[self.field]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield from self._record(text, f"{source.path}, row {row}")

    def _record(self, text: object, where: str) -> Iterator[str | None]:
        """A record's text, line by line; no text (null) is no document."""
        if text is None:
            return
        if not isinstance(text, str):
            raise FastElectraError(
                f"{where}: field {self.field!r} is not text but {type(text).__name__}"
            )
        try:
            stream = io.BytesIO(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise FastElectraError(f"{where}: not valid Unicode: {error.reason}") from None
        yield from (line for line in _lines(stream, None) if line)
        yield None


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
    """The text of a .zst file, frame after frame; FastElectraError where it is damaged or cut."""

    def __init__(self, raw: BinaryIO, source: Source):
        self._library = _optional("zstandard", source)
        self._raw, self._source = raw, source
        self._frame = None  # being unpacked
        self._packed = b""  # read but not unpacked
        self._text = memoryview(b"")  # unpacked but not handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._packed = self._packed or self._raw.read(1 << 14)
            if not self._packed:
                if self._frame is not None:
                    raise FastElectraError(f"{self._source.path} is cut off")
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
            raise FastElectraError(f"{self._source.path} is damaged or not zstd") from None
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


def _lines(stream: BinaryIO, source: Source | None) -> Iterator[str]:
    """Stripped lines, blank ones too; a line beyond LINE_BYTES in parts, cut at white space."""
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
        lines = _decode(data[:cut], offset, source).split("\n")
        last = lines.pop()  # empty after a newline
        for line in lines:
            text = line.strip()
            if text or not inside:
                yield text
            inside = False
        if last := last.strip():
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


def _decode(data: bytes, offset: int, source: Source | None) -> str:
    """UTF-8 without byte order mark and NULs; `offset` is where `data` begins in the file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastElectraError(
            f"{source.path}: not UTF-8 at byte {offset + error.start}"
            f"{' of the unpacked text' if source.compression else ''}; convert it, for example"
            f" with `iconv -f ISO-8859-1 -t UTF-8`"
        ) from None
    if offset == 0:
        text = text.removeprefix("\ufeff")
    return text.replace("\0", "")
