"""How much of a GPU is left behind HTTP: rows a second, and the share of the time that it idles.

    python benchmarks/gpu.py [--seconds 10] [--rounds 3] [--models resnet50-fp16,...]

Models of the shapes of ResNet-50 and BERT-base, in FP32 and FP16, are served from one worker on cuda:0, with
and without CUDA graphs, and compared with a loop that does nothing but run the model on inputs that are in
the GPU's memory already, at its best batch size. Both in processes of their own, in turn, in each round.
Needs an NVIDIA GPU and the gateway's ``gpu`` extra; writes ``results/gpu.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_models
import numpy as np
import orjson
from harness import Gateway
from loader import Load
from report import Report, spread

BATCH_SIZES = (1, 4, 16, 32)
CONNECTIONS = 128
LOADERS = 4
"""Processes that load: one cannot send 600 kB several thousand times a second."""

WARM_UP_S = 3.0
SAMPLE_S = 0.05
"""Between two looks at how busy the GPU is; the driver averages over longer than that itself."""

TARGET_PERCENT = 90

DTYPES = {"fp32": np.float32, "fp16": np.float16}
WRITERS = {"resnet50": gpu_models.resnet50, "bert_base": gpu_models.bert_base}
MODELS = tuple(f"{name}-{dtype}" for name in WRITERS for dtype in DTYPES)


@dataclass(frozen=True)
class Turn:
    """What one turn of one server, or of the loop, showed.

    Attributes:
        rows: a second.
        idle: share of the time in which nothing ran on the GPU.
        batch_rows: mean rows of a batch.
        p50_ms, p99_ms: latency; NaN for the loop.
    """

    rows: float
    idle: float
    batch_rows: float
    p50_ms: float = float("nan")
    p99_ms: float = float("nan")


def why_not() -> str | None:
    """Why this machine cannot run the benchmark; None: it can."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return (
            "this ONNX Runtime has no CUDAExecutionProvider: pip install "
            "'inference-gateway[gpu]' in an environment without onnxruntime"
        )
    from gateway.serving import cuda

    ort.preload_dlls()
    try:
        cuda.Gpu.open(0)
    except cuda.CudaError as error:
        return f"there is no GPU to use: {error}"
    return None


class Utilization:
    """How busy GPU 0 is, looked at all the while, by NVIDIA's management library."""

    class _Rates(ctypes.Structure):
        _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))
        self._ended = threading.Event()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")

    def __enter__(self) -> Utilization:
        self._percents: list[int] = []
        self._ended.clear()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        rates = self._Rates()
        while not self._ended.wait(SAMPLE_S):
            self._call("nvmlDeviceGetUtilizationRates", self._device, ctypes.byref(rates))
            self._percents.append(rates.gpu)

    @property
    def idle(self) -> float:
        """The share of the time in which no kernel ran."""
        return 1 - statistics.fmean(self._percents) / 100


def inputs_of(model: str, rows: int) -> dict[str, np.ndarray]:
    """Inputs of a batch, by name."""
    name, dtype = model.split("-")
    rng = np.random.default_rng(0)
    if name == "resnet50":
        image = rng.standard_normal((rows, *gpu_models.IMAGE), np.float32)
        return {"image": image.astype(DTYPES[dtype])}
    shape = (rows, gpu_models.LENGTH)
    return {
        "input_ids": rng.integers(0, gpu_models.VOCABULARY, shape),
        "attention_mask": np.ones(shape, np.int64),
    }


# The loop without a gateway


def bare_main(path: str, model: str) -> None:
    """Answer lines of batch size and seconds with rows a second, on inputs that stay on the GPU."""
    import time

    import onnxruntime as ort

    ort.disable_telemetry_events()
    ort.preload_dlls()
    session = ort.InferenceSession(path, providers=[("CUDAExecutionProvider", {"device_id": "0"})])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("the CUDAExecutionProvider did not load")
    print("ready", flush=True)
    for line in sys.stdin:
        rows, seconds = line.split()
        binding = session.io_binding()
        kept = []
        for name, array in inputs_of(model, int(rows)).items():
            kept.append(ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
            binding.bind_ortvalue_input(name, kept[-1])
        for output in session.get_outputs():
            binding.bind_output(output.name, "cuda", 0)
        for _ in range(10):
            session.run_with_iobinding(binding)
        done, began, now = 0, time.perf_counter(), 0.0
        while now < float(seconds):
            session.run_with_iobinding(binding)
            done += int(rows)
            now = time.perf_counter() - began
        print(done / now, flush=True)


class Bare:
    """`bare_main` in a process of its own, ended with the context."""

    def __init__(self, path: Path, model: str) -> None:
        self._command = [sys.executable, __file__, "--bare", str(path), model]

    def __enter__(self) -> Bare:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def rate(self, rows: int, seconds: float) -> float:
        """Rows a second at this batch size."""
        print(rows, seconds, file=self._process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the loop without a gateway ended: its output says why")
        return line


# The gateway


def request_for(model: str) -> bytes:
    """A request of one row in the binary tensor extension, answered likewise."""
    arrays = inputs_of(model, 1)
    names = {"float32": "FP32", "float16": "FP16", "int64": "INT64"}
    described = [
        {
            "name": name,
            "datatype": names[array.dtype.name],
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    head = orjson.dumps({"inputs": described, "parameters": {"binary_data_output": True}})
    body = head + b"".join(array.tobytes() for array in arrays.values())
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: gateway\r\n"
        f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def load(gateway: Gateway, request: Path, seconds: float) -> list[Load]:
    """What all loaders saw, side by side."""
    script = Path(__file__).with_name("loader.py")
    command = [
        sys.executable, str(script), gateway.host, str(gateway.port), str(request),
        str(CONNECTIONS // LOADERS), str(WARM_UP_S), str(seconds),
    ]  # fmt: skip
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(LOADERS)]
    results = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a loader failed: its output says why")
    return [Load(**json.loads(result)) for result in results]


def gateway_turn(folder: Path, model: str, seconds: float, busy: Utilization) -> Turn:
    """Load the gateway for a while."""
    request = folder / "request.bin"
    request.write_bytes(request_for(model))
    with Gateway(folder / "models") as gateway:
        load(gateway, request, min(seconds, 2.0))
        before = gateway.statistics(model)
        with busy:
            loads = load(gateway, request, seconds)
        after = gateway.statistics(model)
    batches = after["batches"] - before["batches"]
    return Turn(
        sum(one.rate for one in loads),
        busy.idle,
        (after["rows"] - before["rows"]) / max(1, batches),
        statistics.median(one.p50_ms for one in loads),
        max(one.p99_ms for one in loads),
    )


def write_config(folder: Path, model: str, *, graphs: bool) -> None:
    """Settings of the served model."""
    sizes = f"allowed_batch_sizes: {list(BATCH_SIZES)}\n" if graphs else ""
    (folder / "models" / model / "config.yaml").write_text(
        f"max_batch_size: {BATCH_SIZES[-1]}\n{sizes}"
        f"instances: [{{device: 'cuda:0', cuda_graphs: {str(graphs).lower()}}}]\n"
    )


def compare(model: str, rounds: int, seconds: float, report: Report) -> None:
    """Measure one model and add its rows to the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "models" / model / "1" / "model.onnx"
        writer, dtype = model.split("-")
        WRITERS[writer](path, DTYPES[dtype])
        busy = Utilization()
        turns: dict[str, list[Turn]] = {"bare loop": [], "gateway": [], "gateway, graphs": []}
        with Bare(path, model) as bare:
            best = max(BATCH_SIZES, key=lambda rows: bare.rate(rows, 2.0))
        for _ in range(rounds):
            with Bare(path, model) as bare:
                bare.rate(best, 1.0)
                with busy:
                    rate = bare.rate(best, seconds)
                turns["bare loop"].append(Turn(rate, busy.idle, best))
            for kind in ("gateway", "gateway, graphs"):
                write_config(folder, model, graphs=kind != "gateway")
                turns[kind].append(gateway_turn(folder, model, seconds, busy))
    add_rows(model, turns, report)


def add_rows(model: str, turns: dict[str, list[Turn]], report: Report) -> None:
    """The rows of one model, each round's share of the loop's rate taken by itself."""
    bare = turns["bare loop"]
    for kind, taken in turns.items():
        shares = [100 * one.rows / base.rows for one, base in zip(taken, bare, strict=True)]
        report.rows.append(
            (
                f"{model}, {kind}",
                spread([one.rows for one in taken]),
                spread(shares, 1),
                spread([100 * one.idle for one in taken], 1),
                spread([one.batch_rows for one in taken], 1),
                "" if taken is bare else spread([one.p50_ms for one in taken], 1),
                "" if taken is bare else spread([one.p99_ms for one in taken], 1),
            )
        )
        if taken is not bare:
            share = statistics.median(shares)
            text = f"{model}, {kind}: at least {TARGET_PERCENT} % of the loop's rows a second"
            report.target(text, share >= TARGET_PERCENT, f"{share:.1f} %")


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; the exit status is 0 unless it cannot run here."""
    if arguments[:1] == ["--bare"]:
        bare_main(*arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if unknown := sorted(set(models) - set(MODELS)):
        parser.error(f"no such models: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if reason := why_not():
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 1
    report = Report(
        "gpu",
        "One GPU behind HTTP, and in a loop",
        ("model", "rows/s", "% of the loop", "GPU idle %", "rows/batch", "p50 ms", "p99 ms"),
    )
    report.notes.append(f"{CONNECTIONS} connections, one row a request; median (range) of rounds")
    for model in models:
        compare(model, options.rounds, options.seconds, report)
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
