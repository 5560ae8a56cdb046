"""Times the division of a body and the reading of its numbers, beside orjson and the decode kernel.

    python benchmarks/skeleton_micro.py

Prints the shortest of many short runs, in microseconds, so that what else the machine does at the
time matters little. Each row is a v2 body with one FP32 input of 784 numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import orjson

from gateway._kernels import decode, skeleton
from gateway.tensors import DATATYPES

ELEMENTS = 784
FP32 = DATATYPES["FP32"].index
ROOM = 4096  # bytes for a skeleton
RUNS, CALLS = 1000, 10


def shortest_us(call: Callable[[], object]) -> float:
    """Microseconds of one call, in the shortest of `RUNS` runs."""
    best = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - began)
    return best / CALLS * 1e6


def bodies() -> dict[str, bytes]:
    """Request bodies by what is special in them."""
    normal = np.random.default_rng(0).standard_normal(ELEMENTS)
    single = normal.astype(np.float32)
    data = {
        "17 digits": single.tolist(),
        "17 digits, 28 x 28": single.reshape(28, 28).tolist(),
        "17 digits, 784 x 1": single.reshape(ELEMENTS, 1).tolist(),
        "4 decimals": normal.round(4).tolist(),
        "whole numbers": list(range(ELEMENTS)),
    }
    entry = {"name": "x", "shape": [1, ELEMENTS], "datatype": "FP32"}
    return {
        name: json.dumps({"inputs": [{**entry, "data": values}]}).encode()
        for name, values in data.items()
    }


def measure(name: str, body: bytes) -> str:
    """One row of the table."""
    parts = skeleton.json_parts(body, ROOM)
    if parts is None:
        raise SystemExit(f"{name}: the body was not divided")
    (begin, end, count, _) = parts[1][0]
    text = body[begin:end]
    values = orjson.loads(text)
    tensor = bytearray(4 * ELEMENTS)

    def fill() -> None:
        decode.fill(tensor, 0, FP32, (ELEMENTS,), values, False)

    times = [
        shortest_us(lambda: skeleton.json_parts(body, ROOM)),
        shortest_us(lambda: skeleton.numbers(text, FP32, count, None)),
        shortest_us(lambda: orjson.loads(body)),
        shortest_us(fill),
    ]
    return f"{name:20} {len(body):7}" + "".join(f" {value:9.2f}" for value in times)


if __name__ == "__main__":
    print(f"{'data':20} {'bytes':>7} {'split':>9} {'numbers':>9} {'orjson':>9} {'fill':>9}")
    for name, body in bodies().items():
        print(measure(name, body))
