"""What the pages of a Parquet file unpack to: the footer has totals, but pyarrow reserves what each page's header says.

Page headers are in Thrift's compact protocol. Source: `parquet.thrift` and Thrift's "compact protocol encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
UNPACKED, PACKED = 2, 3
"""Fields of a page header: the bytes of the page behind it, unpacked and as stored."""
DEEPEST = 8
MOST_VARINT = 10
"""The most bytes of a number of 64 bits."""


def unpacked_bytes(data: bytes | mmap, start: int, length: int) -> int:
    """Return the bytes of a column chunk's pages once they are unpacked; what follows a damaged header does not count.

    Args:
        data: The file, or a memory map of it.
        start: Where the chunk begins.
        length: Its bytes in the file.
    """
    total = 0
    reader, end = _Reader(data, start), min(start + length, len(data))
    try:
        while reader.position < end:
            sizes = {number: value for number, value in reader.fields(0) if number in (UNPACKED, PACKED)}
            total += max(0, sizes[UNPACKED])
            reader.position += max(0, sizes[PACKED])
    except (LookupError, ValueError):  # pyarrow refuses such a page, too.
        pass
    return total


class _Reader:
    """Reads values one after the other."""

    def __init__(self, data: bytes | mmap, position: int) -> None:
        self._data, self.position = data, position

    def fields(self, depth: int) -> Iterator[tuple[int, int]]:
        """Yield the fields of a structure with their numbers; 0 for those that are no integers.

        Raises:
            IndexError, ValueError: The structure is damaged, or nested too deeply.
        """
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        number = 0
        while (header := self._byte()) & 15 != STOP:
            number = number + (header >> 4) if header >> 4 else self._integer()
            yield number, self._value(header & 15, depth)

    def _value(self, kind: int, depth: int) -> int:
        if kind in INTEGERS:
            return self._integer()
        if kind in (BYTE, DOUBLE):
            self.position += 1 if kind == BYTE else 8
        elif kind == BINARY:
            self.position += self._varint()
        elif kind == STRUCT:
            for _ in self.fields(depth + 1):
                pass
        elif kind in (LIST, SET):
            self._skip_list(depth)
        elif kind not in (TRUE, FALSE):
            raise ValueError(f"a value of type {kind}")
        return 0

    def _skip_list(self, depth: int) -> None:
        header = self._byte()
        count = header >> 4 if header >> 4 < 15 else self._varint()
        if count > len(self._data):
            raise ValueError("a list that is longer than the file")
        for _ in range(count):
            self._value(BYTE if header & 15 in (TRUE, FALSE) else header & 15, depth + 1)

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = 0
        for group in range(MOST_VARINT):
            byte = self._byte()
            value |= (byte & 127) << 7 * group
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
