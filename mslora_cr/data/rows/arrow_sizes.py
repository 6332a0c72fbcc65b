"""What the messages of an Arrow file unpack to, as they claim: pyarrow reserves that much before it unpacks.

The metadata of a message are a flatbuffer. Source: Arrow's `Message.fbs` and "Columnar Format" (body compression).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mslora_cr.data.records import DataError

if TYPE_CHECKING:
    import pyarrow

MOST_UNPACKED_BYTES = 1 << 30
"""The most bytes of one batch of rows, or of all dictionaries together."""
HEADER, BATCH_OF_DICTIONARY, BUFFERS, COMPRESSION = 2, 1, 2, 3
"""Numbers of the fields of the tables Message, DictionaryBatch and RecordBatch."""


class _Table(NamedTuple):
    """A table of a flatbuffer, by its position."""

    data: bytes
    position: int

    def field(self, number: int) -> int | None:
        """Return the position that a field's offset leads to; None if the table does not have the field."""
        [vtable] = struct.unpack_from("<i", self.data, self.position)
        vtable, slot = self.position - vtable, 4 + 2 * number
        [size] = struct.unpack_from("<H", self.data, vtable)
        offset = struct.unpack_from("<H", self.data, vtable + slot)[0] if slot < size else 0
        return _followed(self.data, self.position + offset) if offset else None


def _followed(data: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", data, position)[0])


def check_unpacked(file: Path, source: pyarrow.NativeFile) -> None:
    """Check the compressed batches of an IPC stream.

    Args:
        file: Named in messages.
        source: At the start of the stream.

    Raises:
        DataError: A batch would unpack to more than `MOST_UNPACKED_BYTES`, or the file is damaged.
    """
    from pyarrow import ipc

    dictionaries = 0
    for message in ipc.MessageReader.open_stream(source):
        try:
            size = _unpacked(message) if message.type in ("record batch", "dictionary") else 0
        except struct.error:
            raise DataError(f"{file}: cannot be read (damaged metadata of a batch)") from None
        dictionaries += size if message.type == "dictionary" else 0
        if max(size, dictionaries) > MOST_UNPACKED_BYTES:
            raise DataError(
                f"{file}: a batch unpacks to {max(size, dictionaries):,} bytes, more than {MOST_UNPACKED_BYTES:,}; "
                "write it with smaller batches"
            )


def _unpacked(message: Any) -> int:
    """Return the bytes of a batch once it is unpacked; 0 if it is not compressed, as its bytes are then in the file."""
    data = message.metadata.to_pybytes()
    header = _Table(data, _followed(data, 0)).field(HEADER)
    if header is not None and message.type == "dictionary":
        header = _Table(data, header).field(BATCH_OF_DICTIONARY)
    buffers = None if header is None else _Table(data, header).field(BUFFERS)
    if header is None or buffers is None or _Table(data, header).field(COMPRESSION) is None:
        return 0
    [count] = struct.unpack_from("<I", data, buffers)
    extents = (struct.unpack_from("<qq", data, buffers + 4 + 16 * index) for index in range(count))
    # A compressed buffer begins with its size once it is unpacked; -1 says that it is not compressed.
    return sum(max(0, struct.unpack_from("<q", message.body, start)[0]) for start, length in extents if length >= 8)
