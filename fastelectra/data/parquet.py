"""The rows of a .parquet file in bounded memory.

pyarrow unpacks a page as a whole, copies what a dictionary page holds, and repeats a long value for
each row that has it. How large pages are is said in the header before each, which is in Thrift's
compact protocol, as is the footer, which says where they are. pyarrow shows the headers to nobody,
and of the footer what ends the process where it is damaged; so both are read here. Names and
numbers of fields: parquet.thrift of the format's specification.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO

PAGE_BYTES = 1 << 26  # a row group with a larger page is not read: it takes up to 6 × its size
ROWS = 64  # at a time at most, and so many that a page of them each is PAGE_BYTES
HEADER_BYTES = 1 << 24  # pyarrow takes no longer one either
HEADER_VALUES = 1000  # there are about 30


class Damaged(Exception):
    """What pyarrow opened cannot be read."""


def batches(file, stream: BinaryIO, field: str) -> Iterator[tuple[int, object, str]]:
    """(number of the first row, pyarrow array of a few rows of column `field`, ""), in order.

    In place of a row group that takes too much memory: (its first row, None, why). `file` is the
    ParquetFile, `stream` what it reads. Raises Damaged, or what pyarrow does.
    """
    import pyarrow  # optional, and here since `file` is

    row, left = 1, file.num_row_groups
    for number, chunks in enumerate(_chunks(stream, field)):
        left -= 1
        if left < 0:
            raise Damaged
        page = max((_largest_page(stream, *chunk) for chunk in chunks), default=0)
        if page > PAGE_BYTES:
            yield row, None, f"row group has a page of more than {PAGE_BYTES >> 20} MiB"
            row += file.metadata.row_group(number).num_rows
            continue
        pyarrow.default_memory_pool().release_unused()  # of a row group before
        rows = max(1, min(ROWS, PAGE_BYTES // max(1, page)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[field]):
            yield row, batch.column(batch.schema.get_field_index(field)), ""
            row += batch.num_rows
    if left:
        raise Damaged


def _chunks(stream: BinaryIO, field: str) -> Iterator[list[tuple[int, int]]]:
    """For each row group where in the file the pages of a column are: (begin, end) of each chunk,
    several if the column is a structure. Raises Damaged."""
    size = stream.seek(-8, io.SEEK_END)
    length = int.from_bytes(stream.read(4), "little")
    if length > size:
        raise Damaged
    stream.seek(size - length)
    footer = _Thrift(io.BytesIO(stream.read(length)), length, length)
    for number, kind in footer.fields():  # of FileMetaData
        if number != 4:
            footer.value(kind)
            continue
        for group in footer.items():
            try:
                places = [_place(metadata, size) for metadata in _metadata(group, field)]
            except (AttributeError, KeyError, TypeError):  # not of the specification's types
                raise Damaged from None
            yield places


def _metadata(group: dict, field: str) -> Iterator[dict]:
    """ColumnMetaData of a column, or of what a structured one has; an encrypted one has none."""
    for chunk in group.get(1, ()):
        metadata = chunk.get(3)
        if metadata and b".".join(metadata[3]).split(b".")[0] == field.encode().split(b".")[0]:
            yield metadata


def _place(metadata: dict, size: int) -> tuple[int, int]:
    begin, dictionary = metadata[9], metadata.get(11, 0)
    if 0 < dictionary < begin:
        begin = dictionary
    return begin, min(begin + metadata[7], size)


def _largest_page(stream: BinaryIO, begin: int, end: int) -> int:
    """Bytes, unpacked, of the largest page in a chunk, up to the first header that is none: there
    pyarrow ends too, and says so."""
    largest = 0
    while 0 <= begin < end:
        stream.seek(begin)
        try:
            header = _Thrift(stream, HEADER_BYTES, HEADER_VALUES).struct()  # PageHeader
            packed = max(header[3], 0)
            largest = max(largest, header[2], packed)
        except (Damaged, KeyError, TypeError):
            break
        begin = stream.tell() + packed
    return largest


class _Thrift:
    """Reads values in Thrift's compact protocol. Raises Damaged at what is none.

    most_bytes, most_values: beyond them it is Damaged too.
    """

    def __init__(self, stream: BinaryIO, most_bytes: int, most_values: int):
        self.stream, self.bytes_left, self.values_left = stream, most_bytes, most_values

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, kind) of each field of a struct; its value must be read before the next one."""
        number = 0
        while head := self._byte():
            step = head >> 4
            number = number + step if step else self._signed()
            yield number, head & 15

    def struct(self, depth: int = 0) -> dict[int, object]:
        """{number: value}"""
        return {number: self.value(kind, depth) for number, kind in self.fields()}

    def items(self, depth: int = 0) -> Iterator[object]:
        """Of a list."""
        head = self._byte()
        size = head >> 4 if head < 0xF0 else self._varint()
        for _ in range(size):
            yield self.value(head & 15, depth, in_list=True)

    def value(self, kind: int, depth: int = 0, in_list: bool = False) -> object:
        """Of a field or an item, by the kind that was before it."""
        self.values_left -= 1
        if self.values_left < 0 or depth > 16:
            raise Damaged
        match kind:
            case 1 | 2:  # a boolean, which a field's kind tells
                value = self._byte() == 1 if in_list else kind == 1
            case 3:
                value = self._byte()
            case 4 | 5 | 6:
                value = self._signed()
            case 7:
                value = self._read(8)
            case 8:
                value = self._read(self._varint())
            case 9 | 10:
                value = list(self.items(depth + 1))
            case 11:
                value = self._map(depth + 1)
            case 12:
                value = self.struct(depth + 1)
            case _:
                raise Damaged
        return value

    def _map(self, depth: int) -> dict:
        size = self._varint()
        kinds = self._byte() if size else 0
        return {n: (self.value(kinds >> 4, depth, True), self.value(kinds & 15, depth, True))
                for n in range(size)}  # fmt: skip

    def _read(self, size: int) -> bytes:
        self.bytes_left -= size
        if self.bytes_left < 0 or len(data := self.stream.read(size)) < size:
            raise Damaged
        return data

    def _byte(self) -> int:
        return self._read(1)[0]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise Damaged

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
