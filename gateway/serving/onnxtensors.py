"""Tensors in a model file: whether their dims, their data and the files that they name can be true.

ONNX Runtime maps and reads the files that a model's external data names; each name is looked at here
before it does.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from pathlib import Path

from gateway.errors import LoadError
from gateway.names import NAME
from gateway.serving.protobuf import INT64_MAX, UINT32_MAX, fields, text_of, varint

MAX_NAME_BYTES = 1024
"""Of one operator type, domain or graph input; bounds the memory for them."""

MAX_LOCATIONS = 16_384
"""Distinct external data locations; bounds the memory for them and the calls to look them up."""

MAX_LOCATION_BYTES = 4095
"""Of an external data location: Linux opens no longer path."""

MAX_DETAIL_BYTES = 256
"""Of a location or name from the file, as an operator's log repeats it."""

# Keys of the fields that are read: 8 * number + wire type.
_TENSOR_DIM, _TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 8, 10, 16, 66, 74
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 106, 112
_TENSOR_ONCE = frozenset((_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_LOCATION))
_ENTRY_KEY, _ENTRY_VALUE = 10, 18
_ENTRY_ONCE = frozenset((_ENTRY_KEY, _ENTRY_VALUE))
_SPARSE_VALUES, _SPARSE_INDICES, _SPARSE_DIM, _SPARSE_DIMS = 10, 18, 24, 26
_SPARSE_ONCE = frozenset((_SPARSE_VALUES, _SPARSE_INDICES))

_EXTERNAL = 1  # TensorProto.DataLocation
_ENTRY_KEYS = (b"location", b"offset", b"length", b"checksum")
_NUMBER = re.compile(rb"[0-9]{1,19}")

_BITS = {
    **dict.fromkeys((25, 26), 2),
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
}
"""Of one element, by onnx.TensorProto.DataType; those below 8 are packed."""


class TensorChecks:
    """Checks the tensors of one mapped model file and collects the external files that they name.

    Methods take a message's first and one-past-last byte.

    Args:
        data: the model file.
        folder: the model's own, with links resolved.
    """

    def __init__(self, data: mmap.mmap, folder: Path) -> None:
        self.files: dict[Path, int] = {}  # by resolved path: the size, bytes
        self._data = data
        self._folder = folder
        self._locations: dict[bytes, int] = {}  # the size of each one's file, bytes

    def sparse(self, at: int, end: int) -> bytes:
        """Check a sparse tensor; its name."""
        name, dims = b"", _Dims()
        for key, a, b in fields(self._data, at, end, _SPARSE_ONCE):
            if key == _SPARSE_VALUES:
                name = self.tensor(a, b)
            elif key == _SPARSE_INDICES:
                self.tensor(a, b)
            elif key == _SPARSE_DIM:
                dims.add(a)
            elif key == _SPARSE_DIMS:
                dims.add_packed(self._data, a, b)
        dims.checked(name)
        return name

    def tensor(self, at: int, end: int) -> bytes:
        """Check a tensor; its name."""
        name, element, raw_bytes, is_external, dims = b"", 0, None, False, _Dims()
        entries: dict[bytes, bytes] = {}
        for key, a, b in fields(self._data, at, end, _TENSOR_ONCE):
            if key == _TENSOR_DIM:
                dims.add(a)
            elif key == _TENSOR_DIMS:
                dims.add_packed(self._data, a, b)
            elif key == _TENSOR_TYPE:
                element = a & UINT32_MAX
            elif key == _TENSOR_NAME:
                name = self._data[a : min(b, a + MAX_NAME_BYTES + 1)]
            elif key == _TENSOR_RAW:
                raw_bytes = b - a
            elif key == _TENSOR_EXTERNAL:
                self._entry(a, b, entries)
            elif key == _TENSOR_LOCATION:
                is_external = a == _EXTERNAL
                if a > _EXTERNAL:
                    raise _refusal(name, "has a data location that is neither DEFAULT nor EXTERNAL")
        elements = dims.checked(name)
        size = -(-elements * _BITS[element] // 8) if element in _BITS else None
        if size is not None and size > INT64_MAX:
            raise _refusal(name, "has dims whose product is too large")
        if is_external:
            self._external(name, entries, size)
        elif raw_bytes is not None and size is not None and raw_bytes != size:
            raise _refusal(name, f"has {raw_bytes} bytes of data where its dims ask for {size}")
        return name

    def _entry(self, at: int, end: int, entries: dict[bytes, bytes]) -> None:
        """Add a key and a value of a tensor's external data."""
        name = value = b""
        for key, a, b in fields(self._data, at, end, _ENTRY_ONCE):
            if key == _ENTRY_KEY:
                name = self._data[a : min(b, a + MAX_NAME_BYTES)]
            elif key == _ENTRY_VALUE:
                value = self._data[a : min(b, a + MAX_LOCATION_BYTES + 1)]
        if name not in _ENTRY_KEYS:
            # ONNX Runtime's "prepacked_…" holds offsets of its own, which would go unchecked.
            raise LoadError(
                "a tensor's external data has an entry that is not location, offset, length or checksum",
                f"a tensor's external data has an entry {_shown(name)}",
            )
        if name in entries:
            raise LoadError("a tensor's external data has the same entry twice")
        entries[name] = value

    def _external(self, name: bytes, entries: dict[bytes, bytes], size: int | None) -> None:
        """Check that a tensor's external data, of `size` bytes where known, lies inside its file."""
        location = entries.get(b"location", b"")
        if location not in self._locations:
            self._locations[location] = self._locate(name, location)
            if len(self._locations) > MAX_LOCATIONS:
                raise LoadError(
                    f"the model names more than {MAX_LOCATIONS} external data locations"
                )
        file_bytes = self._locations[location]
        offset = _number(name, "offset", entries.get(b"offset", b"0"))
        if b"length" in entries:
            length = _number(name, "length", entries[b"length"])
            if size is not None and length != size:
                raise _refusal(
                    name, f"has {length} bytes of external data where its dims ask for {size}"
                )
        else:
            length = size or 0
        if offset + length > file_bytes:
            raise _refusal(
                name,
                f"has external data up to byte {offset + length} of a file of {file_bytes} bytes",
            )

    def _locate(self, name: bytes, location: bytes) -> int:
        """The size of the file at a location, bytes; the file is noted.

        A file with several hard links is taken: it cannot be told from one that a deduplicating file
        system, backup or container image shares, and making one asks for write access to the folder,
        which is enough to write any model there.
        """
        reason = _fault(location)
        if reason is None:
            try:
                target = (self._folder / os.fsdecode(location)).resolve(strict=True)
                status = target.stat()
            except (OSError, RuntimeError):  # RuntimeError: a loop of links
                reason = "is not there"
            else:
                if not target.is_relative_to(self._folder):
                    reason = "leaves the model's folder by a link"
                elif not stat.S_ISREG(status.st_mode):
                    reason = "is not a regular file"
                else:
                    self.files[target] = status.st_size
                    return status.st_size
        raise _refusal(
            name,
            f"has external data whose location {reason}: it must name a file in the model's folder",
            f"; the location is {_shown(location)}",
        )


class _Dims:
    """Dims as they come, without keeping them. Those of 0 do not hide the others' overflow."""

    __slots__ = ("_is_empty", "_is_negative", "_product")

    def __init__(self) -> None:
        self._product = 1
        self._is_empty = False
        self._is_negative = False

    def add(self, value: int) -> None:
        """Take one dim, as an unsigned varint."""
        if value > INT64_MAX:
            self._is_negative = True
        elif value == 0:
            self._is_empty = True
        elif self._product <= INT64_MAX:
            self._product *= value

    def add_packed(self, data: mmap.mmap, at: int, end: int) -> None:
        """Take the dims of a packed field."""
        while at < end:
            value, at = varint(data, at, end)
            self.add(value)

    def checked(self, name: bytes) -> int:
        """The number of elements. LoadError for dims that no tensor has; `name` is the tensor's."""
        if self._is_negative:
            raise _refusal(name, "has a negative dim")
        if self._product > INT64_MAX:
            raise _refusal(name, "has dims whose product is too large")
        return 0 if self._is_empty else self._product


def _number(name: bytes, of: str, text: bytes) -> int:
    """An offset or length of external data."""
    if not _NUMBER.fullmatch(text) or int(text) > INT64_MAX:
        raise _refusal(
            name,
            f"has external data whose {of} is not a decimal number below 2^63",
            f"; the {of} is {_shown(text)}",
        )
    return int(text)


def _fault(location: bytes) -> str | None:
    """Why a location cannot even be looked up; None where it can."""
    if not location:
        return "is missing or empty"
    if len(location) > MAX_LOCATION_BYTES:
        return f"has more than {MAX_LOCATION_BYTES} bytes"
    if b"\0" in location:
        return "has a NUL byte"
    if b"\\" in location:
        return "has a backslash"
    if location.startswith(b"*/"):  # ONNX Runtime's markers: the offset is an address to read from
        return "stands for memory"
    if location.startswith(b"/"):
        return "is absolute"
    if b".." in location.split(b"/"):
        return "has a '..' in it"
    return None


def _shown(text: bytes) -> str:
    """Bytes of the file, as a log may hold them."""
    return ascii(os.fsdecode(text[:MAX_DETAIL_BYTES]))


def _refusal(name: bytes, reason: str, detail: str = "") -> LoadError:
    """A tensor's fault. Clients read its name only where that is like a model's; operators always."""
    shown = text_of(name)
    public = f"tensor '{shown}'" if NAME.fullmatch(shown) else "a tensor"
    return LoadError(f"{public} {reason}", f"tensor {_shown(name)} {reason}{detail}")
