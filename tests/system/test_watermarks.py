"""Ten thousand watermarked requests beside kills and clients that leave: no byte is anybody else's."""

from __future__ import annotations

import random
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from tests.system import watermarks
from tests.system.watermarked import ENCODINGS, KINDS, Tally, ids_of, request_of, write_repository

REQUESTS = 10_000
SEED = 20


@pytest.mark.slow
def test_every_answer_is_its_askers_own(tmp_path):
    write_repository(tmp_path)

    tally = watermarks.run(tmp_path, REQUESTS, SEED)

    assert tally.wrong == []
    assert tally.foreign_bytes == tally.unanswered == tally.broken == 0
    assert set(tally.errors) <= watermarks.ALLOWED_ERRORS
    assert tally.requests == REQUESTS
    assert all(tally.right[kind, encoding] for kind in KINDS for encoding in ENCODINGS)
    assert set(tally.left) == {leave.value for leave in watermarks.Leave}
    assert tally.slow
    assert tally.killed["front end, SIGKILL"] == 1
    assert tally.killed["worker, SIGKILL"]
    assert tally.killed["worker, SIGSEGV"]


def msgpack_request(kind: str):
    """A request of this kind, in msgpack."""
    chance = random.Random(SEED)
    drawn = (request_of(chance, number) for number in range(1000))
    return next(r for r in drawn if (r.kind, r.encoding) == (kind, "msgpack"))


def check(request, outputs: dict[str, np.ndarray], version: str) -> Tally:
    """What the tally makes of an answer that holds these outputs."""
    entries = [
        {
            "name": name,
            "datatype": {"i": "INT64", "f": "FP32", "O": "BYTES"}[array.dtype.kind],
            "shape": list(array.shape),
            "data": array.ravel().tolist() if array.dtype.hasobject else array.tobytes(),
        }
        for name, array in outputs.items()
    ]
    body = msgpack.packb({"model_version": version, "outputs": entries})
    tally = Tally()
    headers = {"content-type": "application/msgpack", "x-model-version": version}
    tally.check(request, headers, body)
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_one_foreign_element_is_found(kind):
    request = msgpack_request(kind)
    assert check(request, request.expected, str(request.version)).right.total() == 1

    name = next(iter(request.expected))
    spoilt = request.expected[name].copy()
    spoilt.flat[-1] = b"another's" if spoilt.dtype.hasobject else spoilt.flat[-1] + 1
    tally = check(request, {**request.expected, name: spoilt}, str(request.version))
    assert (len(tally.wrong), tally.right.total()) == (1, 0)
    assert tally.foreign_bytes == (9 if spoilt.dtype.hasobject else spoilt.itemsize)


def test_another_version_shape_or_name_is_wrong():
    request = msgpack_request("padded")
    outputs = request.expected
    longer = {name: np.concatenate([array] * 2) for name, array in outputs.items()}
    renamed = {name.upper(): array for name, array in outputs.items()}
    for tally in (
        check(request, outputs, "2"),
        check(replace(request, version=2), outputs, "1"),
        check(request, longer, "1"),
        check(request, renamed, "1"),
    ):
        assert (len(tally.wrong), tally.right.total()) == (1, 0)


def test_no_two_rows_have_the_same_id():
    ids = np.concatenate([ids_of(number, 16) for number in range(1000)])
    assert len(np.unique(ids)) == len(ids)
