"""Plain NumPy twin of kernels/pack.pyx: same signatures, results, errors and messages."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_RANK = 8


def copy_in(dst: Any, dst_offset: int, src: Any) -> int:
    with flat(dst, "dst", writable=True) as target, acquire(src, "src") as source:
        check_range("dst", dst_offset, source.nbytes, target.nbytes)
        check_rank("src", source)
        as_bytes(target)[dst_offset : dst_offset + source.nbytes] = np.frombuffer(
            source.tobytes(), np.uint8
        )
        return source.nbytes


def copy_out(src: Any, src_offset: int, dst: Any) -> int:
    with flat(src, "src") as source, acquire(dst, "dst", writable=True) as target:
        check_range("src", src_offset, target.nbytes, source.nbytes)
        check_rank("dst", target)
        if target.nbytes:
            raw = as_bytes(source)[src_offset : src_offset + target.nbytes]
            # As void, so that padding inside an item is copied too.
            items = raw.copy().view(f"V{target.itemsize}").reshape(target.shape)
            np.asarray(target).view(f"V{target.itemsize}")[...] = items
        return target.nbytes


def move(buffer: Any, dst_offset: int, src_offset: int, nbytes: int) -> None:
    with flat(buffer, "buffer", writable=True) as view:
        check_range("dst", dst_offset, nbytes, view.nbytes)
        check_range("src", src_offset, nbytes, view.nbytes)
        raw = as_bytes(view)
        raw[dst_offset : dst_offset + nbytes] = raw[src_offset : src_offset + nbytes].copy()


def flat(owner: Any, role: str, verb: str = "copied", *, writable: bool = False) -> memoryview[Any]:
    """The buffer of `owner`; TypeError unless it is C-contiguous."""
    view = acquire(owner, role, verb, writable=writable)
    if not view.c_contiguous:
        raise TypeError(f"{role}: expected a C-contiguous buffer")
    return view


def acquire(
    owner: Any, role: str, verb: str = "copied", *, writable: bool = False
) -> memoryview[Any]:
    """The buffer of `owner`; TypeError if its bytes mean nothing or it must be, but is not, writable."""
    try:
        view = memoryview(owner)
    except TypeError:
        raise TypeError(f"a bytes-like object is required, not '{type(owner).__name__}'") from None
    if view.suboffsets:
        raise TypeError(f"{role}: an indirect buffer (one with suboffsets) cannot be {verb}")
    if "O" in view.format:
        raise TypeError(f"{role}: a buffer of Python objects cannot be {verb}")
    if writable and view.readonly:
        raise TypeError(f"{role}: expected a writable buffer, got a read-only one")
    return view


def as_bytes(view: memoryview[Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a contiguous buffer, shared."""
    return np.frombuffer(view, np.uint8)


def check_range(role: str, offset: int, nbytes: int, size: int) -> None:
    if nbytes < 0:
        raise ValueError("nbytes: must not be negative")
    if offset < 0:
        raise ValueError(f"{role}_offset: must not be negative")
    if offset + nbytes > size:
        raise ValueError(f"{role}_offset: the range leaves the buffer of {size} bytes")


def check_rank(role: str, view: memoryview[Any]) -> None:
    if view.ndim > MAX_RANK:
        raise ValueError(f"{role}: rank {view.ndim} is over the limit of {MAX_RANK}")
