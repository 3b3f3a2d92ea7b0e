"""How large the pages of a .parquet file are, which pyarrow does not tell and unpacks as a whole.

Each page has a header before it, in Thrift's compact protocol; those are read, the pages passed.
"""

from typing import BinaryIO

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_UNPACKED, _PACKED = 2, 3  # fields of a header: bytes of the page after and before unpacking
_DEPTH = 8  # of what is nested in a header; the format needs 3


def largest_page(file: BinaryIO, start: int, size: int) -> int:
    """Bytes, unpacked, of the largest page of a column that begins at `start`, `size` bytes stored.

    Raises OSError where there is no such column.
    """
    if not 0 <= start <= start + size < 2**62:
        raise OSError("not a column")
    largest = 0
    file.seek(start)
    while file.tell() < start + size:
        header = _struct(file)
        unpacked, packed = header.get(_UNPACKED, -1), header.get(_PACKED, -1)
        largest = max(largest, unpacked)
        _skip(file, packed)
    return largest


def _struct(file: BinaryIO, depth: int = 0) -> dict[int, int]:
    """The integers among the fields of a struct, by number; all else is passed over."""
    found, number = {}, 0
    while kind := _byte(file):
        number = number + (kind >> 4) if kind >> 4 else _integer(file)
        value = _value(file, kind & 15, depth)
        if value is not None:
            found[number] = value
    return found


def _value(file: BinaryIO, kind: int, depth: int) -> int | None:
    if depth > _DEPTH:
        raise OSError("nested too deeply")
    if kind in _INTEGERS:
        return _integer(file)
    if kind in (_BYTE, _DOUBLE):
        for _ in range(1 if kind == _BYTE else 8):
            _byte(file)
    elif kind == _BINARY:
        _skip(file, _varint(file))
    elif kind in (_LIST, _SET):
        head = _byte(file)
        for _ in range(head >> 4 if head >> 4 < 15 else _varint(file)):
            _value(file, _BYTE if head & 15 in (_TRUE, _FALSE) else head & 15, depth + 1)
    elif kind == _STRUCT:
        _struct(file, depth + 1)
    elif kind not in (_TRUE, _FALSE):  # whose value is their type
        raise OSError("not Thrift")
    return None


def _skip(file: BinaryIO, size: int) -> None:
    if not 0 <= size < 2**31:
        raise OSError("not a size")
    file.seek(size, 1)


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise OSError("cut off")
    return read[0]


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while shift < 64:
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
    raise OSError("not a number")


def _integer(file: BinaryIO) -> int:
    """Zigzag: the sign is the lowest bit."""
    value = _varint(file)
    return value >> 1 ^ -(value & 1)
