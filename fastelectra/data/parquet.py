"""The rows of a .parquet file in bounded memory.

pyarrow unpacks a page as a whole, copies what a dictionary page holds, and a long value once for
each row that has it. The header before each page tells its size: those are read first.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO

PAGE_BYTES = 1 << 26  # a row group with a larger page is not read: it takes up to 6 × its size
ROWS = 64  # at a time at most, and so many that a page of them each is PAGE_BYTES


def batches(file, stream: BinaryIO, field: str) -> Iterator[tuple[int, object, str]]:
    """(number of the first row, pyarrow array of a few rows of column `field`, ""), in order.

    In place of a row group that takes too much memory: (its first row, None, why). `file` is the
    ParquetFile, `stream` what it reads. Raises what pyarrow does when the file is damaged.
    """
    import pyarrow  # optional, and here since `file` is

    row = 1
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        page = _largest_page(group, stream, field)
        if page > PAGE_BYTES:
            yield row, None, f"row group has a page of more than {PAGE_BYTES >> 20} MiB"
            row += group.num_rows
            continue
        pyarrow.default_memory_pool().release_unused()  # of a row group before
        rows = max(1, min(ROWS, PAGE_BYTES // max(1, page)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[field]):
            yield row, batch.column(0), ""
            row += batch.num_rows


def _largest_page(group, stream: BinaryIO, field: str) -> int:
    """Bytes, unpacked, of the largest page of a column, up to the first header that is none."""
    largest = 0
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema.split(".")[0] != field.split(".", maxsplit=1)[0]:
            continue
        place = column.data_page_offset
        if 0 < (column.dictionary_page_offset or 0) < place:
            place = column.dictionary_page_offset
        end = place + column.total_compressed_size
        while 0 <= place < end:
            stream.seek(place)
            try:
                unpacked, packed = _page_sizes(stream)
            except _NoHeader:  # pyarrow reads what comes before, and says so
                break
            largest = max(largest, unpacked, packed)
            place = stream.tell() + packed
    return largest


# Types of Thrift's compact protocol that are in a page header
_STOP, _BOOLEANS, _INTEGERS, _BINARY, _STRUCT = 0, (1, 2), (4, 5, 6), 8, 12
_UNPACKED, _PACKED = 2, 3  # fields of PageHeader, see parquet.thrift


class _NoHeader(Exception):
    """The file ends here, or is damaged."""


def _page_sizes(stream: BinaryIO) -> tuple[int, int]:
    """Bytes of the page (unpacked, packed) whose header `stream` stands at; reads the header."""
    sizes: dict[int, int] = {}
    fields = [0]  # the last one's number in each struct that has begun
    while fields:
        head = _byte(stream)
        kind, step = head & 15, head >> 4
        if head == _STOP:
            fields.pop()
            continue
        fields[-1] = fields[-1] + step if step else _signed(_varint(stream))
        if kind in _INTEGERS:
            value = _signed(_varint(stream))
            if len(fields) == 1:
                sizes[fields[0]] = value
        elif kind == _BINARY:  # the least and the greatest value, as long as they are
            stream.seek(_varint(stream), io.SEEK_CUR)
        elif kind == _STRUCT and len(fields) < 4:
            fields.append(0)
        elif kind not in _BOOLEANS:
            raise _NoHeader
    unpacked, packed = sizes.get(_UNPACKED, -1), sizes.get(_PACKED, -1)
    if min(unpacked, packed) < 0:
        raise _NoHeader
    return unpacked, packed


def _byte(stream: BinaryIO) -> int:
    byte = stream.read(1)
    if not byte:
        raise _NoHeader
    return byte[0]


def _varint(stream: BinaryIO) -> int:
    value = shift = 0
    while shift < 64:
        byte = _byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
    raise _NoHeader


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)
