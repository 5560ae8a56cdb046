"""What ONNX Runtime itself makes of a case, run directly, without the gateway.

Cases might crash or hang ONNX Runtime, so `classify` runs them in a process of its own, which leaves its
verdict and the direct outputs beside the case's data; a case without a verdict when that process has
ended is the one that ended it. Sessions have the gateway's options: one thread.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported, hence the order

import ml_dtypes
import numpy as np
import onnxruntime

from gateway.tensors import BY_ORT
from tests.backend.cases import MODEL, Arrays, Case, load_arrays, save_arrays

TIME_LIMIT_S = 120
"""For all cases given to one process; most take milliseconds."""

RUNS = 3
"""Direct runs of each data set in one session; some seeded operators repeat themselves only once."""

LOG_FATAL_ONLY = 4

BF16_RTOL = 2**-6
"""Two units in bfloat16's last place: the least tolerance for it, as in onnx's own runner."""

_ROOT = Path(__file__).resolve().parents[2]
_VERDICT = "verdict.json"
_ORT_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+)")


class Sort(enum.StrEnum):
    """What the gateway is expected to do with a case; each value is a column's head in the table."""

    SERVED = "served"
    """ONNX Runtime's result is the expected one: it must come back equal."""
    WRONG = "served, ONNX Runtime's result is not the expected one"
    """Must come back equal to ONNX Runtime's own."""
    RANDOM = "served, random numbers"
    """Changes from run to run: outputs, datatypes and shapes must come back equal."""
    REFUSED = "ONNX Runtime does not load it"
    VALUED = "sequence, map or optional"
    UNTYPED = "datatype without a name in v2"
    FAILING = "ONNX Runtime fails on the data"


SERVED = (Sort.SERVED, Sort.WRONG, Sort.RANDOM)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A case's sort, and why: for what is not served, text that the gateway's reason must hold."""

    sort: Sort
    reason: str = ""


def classify(cases: Iterable[Case], models: Path, data: Path) -> dict[str, Verdict]:
    """The verdict on each case, by the model's name, for cases written below these folders.

    The outputs of a direct run are left in ``data/<model>/direct_<number of the data set>``.
    """
    left = list(cases)
    verdicts: dict[str, Verdict] = {}
    while left:
        _run_process(left, models, data)
        for case in left:
            path = data / case.model_name / _VERDICT
            if (
                not path.exists()
            ):  # the first one without a verdict is the one that ended the process
                verdicts[case.model_name] = Verdict(Sort.REFUSED, "worker")
                break
            fields = json.loads(path.read_text())
            verdicts[case.model_name] = Verdict(Sort(fields["sort"]), fields["reason"])
        left = [case for case in left if case.model_name not in verdicts]
    return verdicts


def difference(got: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> str:
    """What is wrong with a result, in words; empty where it is as expected, as onnx's runner has it.

    Datatype and shape must be the same, numbers within the tolerance, NaN at the same places, strings
    equal byte for byte.
    """
    if problem := form_difference(got, expected):
        return problem
    if expected.dtype == object:
        return "" if as_bytes(got) == as_bytes(expected) else "other strings"
    if expected.dtype == ml_dtypes.bfloat16:
        got, expected, rtol = got.astype(np.float32), expected.astype(np.float32), BF16_RTOL
    try:
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        return "; ".join(line.strip() for line in str(error).splitlines()[2:6] if line.strip())
    return ""


def form_difference(got: np.ndarray, expected: np.ndarray) -> str:
    """What is wrong with a result's datatype and shape."""
    if (got.dtype, got.shape) == (expected.dtype, expected.shape):
        return ""
    return f"{got.dtype}{list(got.shape)} in place of {expected.dtype}{list(expected.shape)}"


def bits(array: np.ndarray, *, one_nan: bool = False) -> object:
    """The value of an array for comparison bit by bit; ``one_nan``: all NaNs count as the same."""
    if array.dtype == object:
        return as_bytes(array)
    if one_nan and array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return array.tobytes()


def as_bytes(strings: np.ndarray) -> list[bytes]:
    """The elements of an array of str or bytes."""
    return [text.encode() if isinstance(text, str) else text for text in strings.flat]


def _run_process(cases: list[Case], models: Path, data: Path) -> None:
    """Have a process give its verdicts on as many cases as it survives."""
    tolerances = {case.model_name: [case.rtol, case.atol] for case in cases}
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-m", "tests.backend.direct", str(models), str(data)],
            cwd=_ROOT,
            input=json.dumps(tolerances),
            text=True,
            timeout=TIME_LIMIT_S,
            stderr=subprocess.DEVNULL,  # a dying ONNX Runtime's last words
            check=False,
        )


def main() -> None:
    """The process: folders as arguments, tolerances by model's name on standard input."""
    models, data = Path(sys.argv[1]), Path(sys.argv[2])
    for name, (rtol, atol) in json.load(sys.stdin).items():
        verdict = _judge(models / name / "1" / MODEL, data / name, rtol, atol)
        (data / name / _VERDICT).write_text(json.dumps(asdict(verdict)))


def _judge(model: Path, data: Path, rtol: float, atol: float) -> Verdict:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL_ONLY
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises classes of its own from C++
        return Verdict(Sort.REFUSED, f"({_code(error)})")
    for value in (*session.get_inputs(), *session.get_outputs()):
        if value.type not in BY_ORT:
            is_tensor = value.type.startswith("tensor(")
            return Verdict(Sort.UNTYPED if is_tensor else Sort.VALUED, value.type)
    run_options = onnxruntime.RunOptions()
    run_options.log_severity_level = LOG_FATAL_ONLY
    sorts = []
    for folder in sorted(data.glob("inputs_*")):
        number = folder.name.removeprefix("inputs_")
        inputs = load_arrays(folder)
        try:
            outputs, *more = (_run(session, inputs, run_options) for _ in range(RUNS))
        except Exception:
            return Verdict(Sort.FAILING, "ONNX Runtime failed")
        save_arrays(data / f"direct_{number}", outputs)
        if any(_bits(other) != _bits(outputs) for other in more):
            return Verdict(Sort.RANDOM)
        sorts += [
            Sort.WRONG if difference(outputs[name], array, rtol, atol) else Sort.SERVED
            for name, array in load_arrays(data / f"outputs_{number}").items()
        ]
    return Verdict(Sort.WRONG if Sort.WRONG in sorts else Sort.SERVED)


def _bits(arrays: Arrays) -> list[object]:
    return [bits(array) for array in arrays.values()]


def _run(session: Any, inputs: Arrays, options: Any) -> Arrays:
    """One run. A binding takes every datatype but strings; ``run`` takes those, but no BF16."""
    names = [value.name for value in session.get_outputs()]
    if any("string" in v.type for v in (*session.get_inputs(), *session.get_outputs())):
        return dict(zip(names, session.run(names, inputs, options), strict=True))
    binding = session.io_binding()
    kept = {name: np.asarray(array, order="C") for name, array in inputs.items()}
    for value in session.get_inputs():
        array, datatype = kept[value.name], BY_ORT[value.type]
        binding.bind_input(
            value.name, "cpu", 0, datatype.onnx, list(array.shape), array.ctypes.data
        )
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding, options)
    return dict(zip(names, map(_array, binding.get_outputs()), strict=True))


def _array(value: Any) -> np.ndarray:
    """A copy of an OrtValue; NumPy has no BF16 of its own."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    size = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(value.shape()).copy()


def _code(error: Exception) -> str:
    """The code of an error of ONNX Runtime, which the gateway repeats."""
    code = _ORT_CODE.search(str(error))
    return code[1] if code else "UNKNOWN"


if __name__ == "__main__":
    main()
