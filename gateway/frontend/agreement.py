"""Whether two versions gave the same answer, by the rule of a `serving.routing.Shadow`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.protocols.call import OutputTensor
from gateway.serving.routing import Shadow

ROUNDING = 1e-12
"""Of a cosine: equal directions differ by so much."""

_Array = npt.NDArray[Any]


def agrees(
    rule: Shadow,
    expected: Sequence[OutputTensor],
    given: Sequence[OutputTensor],
    *,
    is_batched: bool,
) -> bool:
    """Whether all outputs agree: the same names, datatypes and shapes, and data as the rule wants it.

    Equal bytes always agree. Rows lie along the last axis. Text and booleans have neither distance nor
    direction, and agree only where they are equal; likewise, by ``top1``, a single integer, which is a class
    already. A single float has no largest element: ``top1`` leaves it to the other outputs, and where there
    is no other it has to be equal.

    Args:
        rule: how data are compared.
        expected: the outputs of the version that answered the client.
        given: the watched version's.
        is_batched: the first axis counts rows, also of an output that has no other.
    """
    mine, theirs = ({tensor.name: tensor for tensor in side} for side in (expected, given))
    if mine.keys() != theirs.keys():
        return False
    verdicts = [_agree(rule, tensor, theirs[name], is_batched) for name, tensor in mine.items()]
    known = [verdict for verdict in verdicts if verdict is not None]
    return bool(known) and all(known)


def _agree(rule: Shadow, a: OutputTensor, b: OutputTensor, is_batched: bool) -> bool | None:
    """Of one output; None where the rule says nothing of it."""
    if a.datatype is not b.datatype or tuple(a.shape) != tuple(b.shape):
        return False
    if bytes(a.data) == bytes(b.data):  # views are compared element by element
        return True
    if rule.compare == "exact" or a.datatype.name in ("BYTES", "BOOL"):
        return False
    left, right = _array(a), _array(b)
    if is_batched and left.ndim == 1:
        left, right = left[:, None], right[:, None]
    with np.errstate(all="ignore"):  # infinities and NaN are answers like others
        match rule.compare:
            case "tolerance":
                return _is_close(left, right, rule.tolerance)
            case "top1":
                return _has_same_top(left, right)
            case _:
                return _has_same_direction(left, right, rule.tolerance)


def _array(tensor: OutputTensor) -> _Array:
    """Its elements; BF16 as float32, of which it is the upper half."""
    flat = np.frombuffer(tensor.data, tensor.datatype.dtype)
    if tensor.datatype.name == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(tensor.shape)


def _is_close(a: _Array, b: _Array, tolerance: float) -> bool:
    is_long = a.dtype.kind in "iu" and a.dtype.itemsize == 8
    wide: npt.DTypeLike = (
        np.longdouble if is_long else np.float64
    )  # where two of them that differ stay different
    left, right = np.asarray(a, wide), np.asarray(b, wide)
    close = np.abs(left - right) <= tolerance * (1 + np.abs(left))
    # The distance of equal infinities is NaN; that of an infinity to anything else is within no bound.
    both_nan = np.isnan(left) & np.isnan(right)
    return bool(np.all(np.where(np.isfinite(left), close, (left == right) | both_nan)))


def _has_same_top(a: _Array, b: _Array) -> bool | None:
    if a.ndim == 0 or a.shape[-1] == 1:
        return False if a.dtype.kind in "iu" else None  # equal ones were told apart before
    return bool(np.array_equal(a.argmax(-1), b.argmax(-1)))


def _has_same_direction(a: _Array, b: _Array, tolerance: float) -> bool:
    left, right = (_of_length_one(np.atleast_1d(side).astype(np.float64)) for side in (a, b))
    cosine = (left * right).sum(-1)
    both_zero = ~left.any(-1) & ~right.any(-1)
    return bool(np.all((cosine >= 1 - tolerance - ROUNDING) | both_zero))


def _of_length_one(rows: _Array) -> _Array:
    """Each row divided by its length, but for rows of zeros."""
    largest = np.abs(rows).max(-1, keepdims=True)
    scaled = rows / np.where(
        largest == 0, 1, largest
    )  # otherwise squares of large numbers overflow
    length = np.sqrt((scaled * scaled).sum(-1, keepdims=True))
    result: _Array = scaled / np.where(length == 0, 1, length)
    return result
