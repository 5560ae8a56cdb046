"""The parts of ``gateway bench`` that need no server: framing, histogram, arrivals, inputs, report."""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import re

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gateway import clock
from gateway.cli import bench_report, bench_run, bench_server, cli
from gateway.cli.bench_report import BenchResult, LiveView
from gateway.client.errors import BadAnswer
from gateway.client.load import Load, LoadPlan, Phase
from gateway.client.load_histogram import MAX_NS, RELATIVE_ERROR, Histogram
from gateway.client.load_http import MAX_HEAD_BYTES, MAX_TEXT_BYTES, AnswerReader, request_bytes
from gateway.client.load_inputs import (
    MAX_BODIES,
    PROTOCOLS,
    InputSpec,
    concrete_shapes,
    encode_request,
    load_inputs,
    make_inputs,
    parse_inputs,
    rows_of,
)
from gateway.client.load_pacing import PoissonArrivals, Timer
from gateway.client.load_tally import Tally
from gateway.clock import NS_PER_MS, NS_PER_S
from gateway.errors import ConfigurationError, InvalidRequest
from gateway.protocols import messagepack, tfserving, v2_infer
from gateway.protocols.call import InferCall
from gateway.tensors import DATATYPES, Signature, TensorSpec

# Answers on the wire

FIXED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nX-Other: 7\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    b"3;name=value\r\nhel\r\nA \r\nlo, world.\r\n000\r\nTrailer: 1\r\n\r\n"
)
ANSWERS = {
    "fixed": (FIXED, 200, b""),
    "chunked": (CHUNKED, 400, b"hello, world."),
    "no chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding:chunked\r\n\r\n0\r\n\r\n", 200, b""),
    "empty": (b"HTTP/1.1 503 \r\nContent-Length:0\r\n\r\n", 503, b""),
    "no body": (b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n", 204, b""),
    "informational": (b"HTTP/1.1 100 Continue\r\n\r\n" + FIXED, 200, b""),
}


@pytest.mark.parametrize("name", ANSWERS)
@given(data=st.data())
def test_an_answer_is_read_the_same_however_it_is_cut(name, data):
    raw, status, text = ANSWERS[name]
    cuts = data.draw(st.lists(st.integers(1, len(raw) - 1), unique=True).map(sorted))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    reader = AnswerReader()
    for _ in range(2):  # an answer leaves nothing behind for the next
        assert [reader.feed(piece) for piece in pieces] == [False] * len(cuts) + [True]
        assert (reader.status, reader.text, reader.keeps_alive) == (status, text, True)
        assert reader.answer_bytes == len(raw) - raw.startswith(b"HTTP/1.1 100") * 25
        assert not reader.ends_here()


@pytest.mark.parametrize(
    ("version", "field", "keeps"),
    [
        ("1.1", "", True),
        ("1.1", "connection: Close\r\n", False),
        ("1.1", "Connection: upgrade, close\r\n", False),
        ("1.1", "Proxy-Connection: close\r\n", True),
        ("1.0", "", False),
        ("1.0", "Connection: keep-alive\r\n", True),
    ],
)
def test_whether_the_connection_is_kept(version, field, keeps):
    reader = AnswerReader()
    assert reader.feed(f"HTTP/{version} 200 OK\r\n{field}Content-Length: 0\r\n\r\n".encode())
    assert reader.keeps_alive is keeps


def test_an_answer_without_length_ends_with_the_connection():
    reader = AnswerReader()
    assert not reader.feed(b"HTTP/1.1 500 No\r\nServer: x\r\n\r\nwhat ")
    assert not reader.feed(b"happened")
    assert reader.ends_here()
    assert (reader.text, reader.keeps_alive) == (b"what happened", False)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer in HTTP"),
        (b"HTTP/2 200 OK\r\n\r\n", "does not answer in HTTP"),
        (FIXED + b"x", "1 bytes follow"),
        (CHUNKED + b"xy", "2 bytes follow"),
        (CHUNKED.replace(b"3;", b"-3;"), "size of a chunk"),
        (b"HTTP/1.1 200 OK\r\n" + b"a" * MAX_HEAD_BYTES, "head of an answer is longer"),
        (CHUNKED[: CHUNKED.index(b"3;")] + b"1" * (MAX_HEAD_BYTES + 1), "between chunks is longer"),
    ],
)
def test_what_is_no_answer_is_refused(raw, problem):
    with pytest.raises(BadAnswer, match=problem):
        AnswerReader().feed(raw)


def test_of_a_long_error_the_beginning_is_kept():
    reader = AnswerReader()
    assert not reader.feed(b"HTTP/1.1 500 No\r\nContent-Length: 9000\r\n\r\n")
    assert not reader.feed(b"a" * 4000)
    assert reader.feed(b"b" * 5000)
    assert reader.text == (b"a" * 4000 + b"b" * 5000)[:MAX_TEXT_BYTES]


def test_a_request_is_complete():
    raw = request_bytes("POST", "host:1", "/v2/x", b"body", {"Content-Type": "a/b"})
    assert raw == (
        b"POST /v2/x HTTP/1.1\r\nHost: host:1\r\nContent-Type: a/b\r\nContent-Length: 4\r\n\r\nbody"
    )


# Latencies


@given(st.lists(st.integers(0, MAX_NS), min_size=1), st.floats(0, 100))
def test_percentiles_are_never_under_and_hardly_over(values, percent):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    exact = sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]
    assert exact <= histogram.percentile_ns(percent) <= exact * (1 + RELATIVE_ERROR)
    assert (histogram.min_ns, histogram.max_ns) == (min(values), max(values))
    assert histogram.mean_ns == sum(values) / len(values)
    assert sum(count for _value, count in histogram.buckets()) == histogram.count == len(values)


def test_relative_error_is_under_one_percent():
    assert RELATIVE_ERROR < 0.01


def test_an_empty_histogram_has_no_latency():
    histogram = Histogram()
    assert histogram.percentile_ns(99) == histogram.mean_ns == 0
    assert list(histogram.buckets()) == []
    assert bench_report.histogram_bounds(histogram) == []


def test_what_is_too_long_counts_as_the_longest():
    histogram = Histogram()
    histogram.record(MAX_NS * 3)
    assert histogram.max_ns == histogram.percentile_ns(50) == MAX_NS


@given(st.lists(st.integers(1, MAX_NS), min_size=1))
def test_rows_hold_every_latency(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    bounds = bench_report.histogram_bounds(histogram)
    counts = histogram.rows(bounds)
    assert len(bounds) <= bench_report.MAX_ROWS
    assert bounds == sorted(bounds)
    assert sum(counts) == len(values)
    assert counts[-1] == 0
    assert counts[-2] > 0


# Arrivals


def test_arrivals_come_in_order_at_the_mean_rate_and_only_when_due():
    arrivals = PoissonArrivals(1000.0, 5 * NS_PER_S, random.Random(1))
    assert arrivals.take(5 * NS_PER_S) is None
    moments = []
    while arrivals.next_ns() <= 15 * NS_PER_S:
        due_ns = arrivals.next_ns()
        assert arrivals.take(due_ns - 1) is None
        moments.append(arrivals.take(due_ns))
        assert moments[-1] == due_ns
    assert moments == sorted(moments)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    gaps = np.diff(moments)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as of an exponential distribution


async def test_a_timer_calls_once_and_not_too_early():
    called: list[int] = []
    fired = asyncio.Event()

    def note() -> None:
        called.append(clock.monotonic_ns())
        fired.set()

    timer = Timer(asyncio.get_running_loop(), note)
    try:
        timer.arm(clock.monotonic_ns() + 3600 * NS_PER_S)
        due_ns = clock.monotonic_ns() + NS_PER_MS
        timer.arm(due_ns)
        await fired.wait()
        assert called[0] >= due_ns
        fired.clear()
        timer.arm(0)
        await fired.wait()
        assert len(called) == 2
    finally:
        timer.close()


# Inputs

IMAGE = InputSpec("image", DATATYPES["FP32"], (-1, 3, -1))
IDS = InputSpec("ids", DATATYPES["INT64"], (-1, 4))
SCALAR = InputSpec("limit", DATATYPES["FP32"], ())


def test_metadata_is_read():
    (spec,) = parse_inputs({"inputs": [{"name": "x", "datatype": "FP16", "shape": ["-1", 2]}]})
    assert spec == InputSpec("x", DATATYPES["FP16"], (-1, 2))
    for document in ({}, {"inputs": [{"name": "x", "datatype": "FP99", "shape": []}]}):
        with pytest.raises(BadAnswer, match="metadata is malformed"):
            parse_inputs(document)


@pytest.mark.parametrize(
    ("given_shapes", "rows", "expected"),
    [
        ({"image": (1, 3, 5)}, None, {"image": (1, 3, 5), "ids": (1, 4), "limit": ()}),
        ({"image": (2, 3, 5)}, 2, {"image": (2, 3, 5), "ids": (2, 4), "limit": ()}),
    ],
)
def test_shapes(given_shapes, rows, expected):
    assert concrete_shapes([IMAGE, IDS, SCALAR], given_shapes, rows) == expected


@pytest.mark.parametrize(
    ("given_shapes", "rows", "problem"),
    [
        ({}, 7, r"input 'image' FP32 \[-1, 3, -1\] has dims that vary: .*--shape image:7,3,N"),
        ({"image": (1, 4, 5)}, None, "does not fit the input 'image'"),
        ({"image": (1, 3)}, None, "does not fit the input 'image'"),
        ({"image": (1, 3, 5)}, 2, "does not begin with --rows 2"),
        ({"imag": (1,)}, None, "no input 'imag': the model's inputs are 'image'"),
    ],
)
def test_shapes_that_do_not_fit_name_the_input(given_shapes, rows, problem):
    with pytest.raises(ConfigurationError, match=problem):
        concrete_shapes([IMAGE, IDS], given_shapes, rows)


def test_any_shape_fits_an_unknown_rank():
    unknown = InputSpec("x", DATATYPES["FP32"], (-1,))
    assert concrete_shapes([unknown], {"x": (2, 3)}, None) == {"x": (2, 3)}


def test_rows_are_the_first_dim_that_varies():
    assert rows_of([IMAGE, IDS, SCALAR], {"image": (6, 3, 5), "ids": (6, 4), "limit": ()}) == 6
    assert rows_of([IMAGE, IDS], {"image": (6, 3, 5), "ids": (7, 4)}) == 1
    assert rows_of([SCALAR], {"limit": ()}) == 1


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("data", ["zeros", "random"])
def test_made_inputs_have_the_datatype(datatype, data):
    spec = InputSpec("x", DATATYPES[datatype], (-1, 2))
    made = make_inputs([spec], {"x": (3, 2)}, data, np.random.default_rng(0))
    assert len(made) == (1 if data == "zeros" else MAX_BODIES)
    for inputs in made:
        path, body, headers = encode_request("v2-binary", "/m", [spec], inputs)
        assert path == "/v2/models/m/infer"
        head = json.loads(body[: int(headers["Inference-Header-Content-Length"])])
        assert head["inputs"][0]["datatype"] == datatype
        assert head["inputs"][0]["shape"] == [3, 2]
    if datatype == "BF16":
        assert made[0]["x"].dtype == ml_dtypes.bfloat16


def test_large_random_inputs_are_made_once():
    spec = InputSpec("x", DATATYPES["FP32"], (-1, 1 << 22))
    assert len(make_inputs([spec], {"x": (2, 1 << 22)}, "random", np.random.default_rng(0))) == 1


def test_inputs_from_a_file_are_cut_into_requests(tmp_path):
    ids = np.arange(28).reshape(7, 4)
    np.savez(tmp_path / "data.npz", ids=ids, other=np.zeros(1))
    cut = load_inputs(tmp_path / "data.npz", [IDS], 3)
    assert [inputs["ids"].tolist() for inputs in cut] == [ids[:3].tolist(), ids[3:6].tolist()]
    assert cut[0]["ids"].dtype == np.int64
    whole = load_inputs(tmp_path / "data.npz", [InputSpec("ids", DATATYPES["FP32"], (7, 4))], None)
    assert len(whole) == 1
    assert whole[0]["ids"].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "rows", "problem"),
    [
        ({"other": np.zeros(3)}, None, "has no array 'ids'"),
        ({"ids": np.zeros((3, 5))}, None, r"shape \[3, 5\] does not fit the input 'ids'"),
        ({"ids": np.zeros((3, 4))}, 4, "at least 4 rows"),
        ({"ids": np.array([{}], object)}, None, r"expected a \.npz file"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tmp_path, arrays, rows, problem):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ConfigurationError, match=problem):
        load_inputs(tmp_path / "data.npz", [IDS], rows)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"expected a \.npz file"):
        load_inputs(tmp_path / "data.npz", [IDS], None)


# Requests, as the gateway itself reads them

TEXT = InputSpec("text", DATATYPES["BYTES"], (-1,))


def signature(*specs: InputSpec) -> Signature:
    inputs = tuple(TensorSpec(s.name, s.datatype, ("n", *s.shape[1:])) for s in specs)
    return Signature(inputs, inputs, max_batch_size=8)


def read_back(protocol: str, body: bytes, headers: dict[str, str], specs) -> InferCall:
    if protocol == "tfserving":
        call, is_row = tfserving.parse_predict(body, signature(*specs))
        assert is_row
        return call
    if protocol == "msgpack":
        return messagepack.parse_infer(body, signature(*specs))
    length = headers.get("Inference-Header-Content-Length")
    return v2_infer.parse_infer(body, length, signature(*specs))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("specs", [[IDS], [IDS, TEXT]], ids=["one", "two"])
def test_every_protocol_is_understood(protocol, specs):
    shapes = concrete_shapes(specs, {}, 3)
    (inputs, *_) = make_inputs(specs, shapes, "random", np.random.default_rng(2))
    path, body, headers = encode_request(protocol, "/m/versions/2", specs, inputs)
    assert path == (
        "/v1/models/m/versions/2:predict"
        if protocol == "tfserving"
        else "/v2/models/m/versions/2/infer"
    )
    call = read_back(protocol, body, headers, specs)
    assert {tensor.name: tuple(tensor.shape) for tensor in call.inputs} == shapes


def test_infinities_survive_tensorflow_servings_json():
    spec = InputSpec("x", DATATYPES["FP32"], (-1, 2))
    _, body, _ = encode_request("tfserving", "/m", [spec], {"x": np.float32([[np.inf, 0.1]])})
    assert json.loads(body) == {"instances": [[math.inf, pytest.approx(0.1)]]}


def test_inputs_without_rows_go_in_columns():
    _, body, _ = encode_request("tfserving", "/m", [SCALAR], {"limit": np.array(0.5, np.float32)})
    assert json.loads(body) == {"inputs": {"limit": 0.5}}


@pytest.mark.parametrize("protocol", ["v2-json", "tfserving"])
def test_what_json_cannot_carry_is_refused(protocol):
    spec = InputSpec("x", DATATYPES["FP16"], (-1,))
    with pytest.raises(InvalidRequest, match="FP16 cannot be sent in JSON"):
        encode_request(protocol, "/m", [spec], {"x": np.zeros(1, np.float16)})


# What the server counted


def statistics(requests: int, **fields: int) -> dict:
    spent = {
        kind: {"count": requests, "ns": requests * ns}
        for kind, ns in {
            "success": 9_000_000,
            "queue": 2_000_000,
            "compute_infer": 3_000_000,
        }.items()
    }
    return {"model_stats": [{"inference_stats": spent, **fields}]}


def test_times_are_those_of_the_requests_in_between():
    before = bench_server.parse_counters(statistics(10, inference_count=10, execution_count=10))
    after = bench_server.parse_counters(statistics(30, inference_count=90, execution_count=20))
    times = bench_server.times_between(before, after)
    assert (times.queue_ms, times.compute_infer_ms, times.total_ms) == (2.0, 3.0, 9.0)
    assert times.compute_output_ms == 0
    assert times.mean_batch_rows == 8.0
    assert bench_server.times_between(before, before) is None
    assert bench_server.times_between(None, after) is None


@pytest.mark.parametrize("document", [None, [], {}, {"model_stats": [{}]}, {"model_stats": [3]}])
def test_other_documents_are_no_statistics(document):
    assert bench_server.parse_counters(document) is None


# The report


def result(rate: float | None = None, **fields: object) -> BenchResult:
    plan = LoadPlan("h", 1, None, (b"12345678",), 32, 1.0, 10.0, 2.0, rate=rate)
    tally = Tally(begun_ns=1, ended_ns=1 + 2 * NS_PER_S, cpu_ns=NS_PER_S, **fields)
    return BenchResult("http://h:1", "m", None, "v2-json", 4, plan, tally)


def shown(done: BenchResult) -> str:
    screen = io.StringIO()
    bench_report.show(done, Console(file=screen, width=100, highlight=False))
    return screen.getvalue()


def test_a_report_says_what_happened():
    done = result(timeouts=2, texts={503: b'{"error": "f\\u001bull"}'})
    for latency_ms in (9, 21, 30, 40):
        done.tally.latencies.record(latency_ms * NS_PER_MS)
    done.tally.statuses.update({200: 4, 503: 1})
    done.times = bench_server.ServerTimes(2.5, 4.0, 0.0, 10.0, 1.0, 20.0)
    text = shown(done)
    for line in (
        r"succeeded +4 +in 2\.00 s",
        r"requests +2\.0 +a second",
        r"rows +8\.0 +a second",
        r"errors +3",
        r"1 +503 Service Unavailable: f\\x1bull",
        r"2 +not answered in time",
        r"waiting for a worker +4\.00 ms",
        r"model +11\.0 ms",
        r"rest of the server +5\.00 ms",
        r"outside: .* +5\.00 ms",
        r"mean batch +2\.5 rows",
        r"≤ 10\.0 ms  █+ +1 +25\.00%",
    ):
        assert re.search(line, text), f"{line} not in\n{text}"
    told = bench_report.as_json(done)
    assert told["latency_ms"]["max"] == 40.0
    assert (told["sent"], told["succeeded"], told["errors"]) == (7, 4, 3)
    assert told["client_cpu"] == 0.5
    assert told["server"]["queue_ms"] == 4.0
    assert json.loads(json.dumps(told)) == told


def test_every_key_of_the_json_is_described():
    help_text = CliRunner().invoke(cli, ["bench", "--help"]).output
    for key in bench_report.as_json(result()):
        assert re.search(rf"\b{key}\b", help_text.partition("Keys of --json")[2]), key


def test_a_report_says_what_limits_its_numbers():
    done = result(50.0, unsent=7, unfinished=3)
    done.tally.cpu_ns *= 2
    text = shown(done)
    assert "7 requests were due and never sent" in text
    assert "Stopped early: 3 requests" in text
    assert "This client kept 1.00 CPUs busy" in text


def test_without_any_measuring_there_is_no_report():
    done = result()
    done.tally = Tally()
    assert "Stopped during the warm-up" in shown(done)
    assert bench_report.as_json(done)["requests_per_s"] == 0


def test_the_live_view_counts_by_the_second():
    load = Load(result().plan)
    view = LiveView(load, Console(file=io.StringIO()))
    assert "warming up" in view.frame(clock.monotonic_ns()).plain
    load.phase = Phase.MEASURING
    load.tally.begun_ns = 1
    view.frame(1)
    for second, answered in ((1, 100), (2, 500)):
        load.tally.statuses[200] = answered
        frame = view.frame(1 + second * NS_PER_S).plain
    assert "2 s of 2 s  400/s  500 answers  0 errors" in frame
    assert frame.endswith("\n▃█")


@pytest.mark.parametrize(
    ("value_ns", "text"),
    [(0, "0 µs"), (999, "1 µs"), (1_234_000, "1.23 ms"), (56_780_000, "56.8 ms"), (2e9, "2.00 s")],
)
def test_times_have_three_digits(value_ns, text):
    assert bench_report.in_time(value_ns) == text


def test_sparklines():
    assert bench_report.sparkline([0, 1, 2, 4]) == "▁▃▅█"
    assert bench_report.sparkline([0, 0]) == "▁▁"
    assert bench_report.sparkline([]) == ""


# The options


@pytest.fixture
def options(monkeypatch):
    """Parse a command line; the options that the command would run with."""

    def parse(*arguments: str) -> bench_run.BenchOptions:
        seen: list[bench_run.BenchOptions] = []
        monkeypatch.setattr(bench_run, "run", lambda given, is_json: seen.append(given) or 0)
        done = CliRunner().invoke(cli, ["bench", "http://h", *arguments])
        assert done.exit_code == 0, done.output
        return seen[0]

    return parse


def test_options_have_their_defaults(options):
    plain = options()
    assert (plain.duration_s, plain.warmup_s, plain.timeout_s) == (10.0, 1.0, 10.0)
    assert (plain.connections, plain.data, plain.protocol) == (32, "random", "v2-binary")


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2m", 120.0), ("1.5", 1.5)])
def test_times_of_options(options, text, seconds):
    assert options("--duration", text).duration_s == seconds


def test_shapes_of_options(options):
    assert options("--shape", "a:b:1,2", "--shape", "c:3").shapes == {"a:b": (1, 2), "c": (3,)}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--duration", "fast"], "expected a time such as 10s"),
        (["--duration", "0s"], "longer than 0"),
        (["--duration", "1s", "--requests", "3"], "exclude each other"),
        (["--shape", "1,2"], "expected NAME:DIM"),
        (["--shape", "x:1", "--data", "file.npz"], "exclude each other"),
        (["--protocol", "v3"], "v2-binary"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, problem):
    done = CliRunner().invoke(cli, ["bench", "http://h", *arguments])
    assert done.exit_code == 2
    assert problem in done.output
