"""The parts of `benchmarks/peers.py` that compute: forms of a request, counts, targets, the table."""

import json
import os
import select
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'inference-gateway[dev]'")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ROW = np.arange(16, dtype=np.float32) / 3
ANSWER = np.array([0.5, -2, 3.25, 1e-3], np.float32)


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder of the benchmarks is where their own imports begin."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def sample(cpu_us=10.0, rate=1000.0, p50_ms=1.0, others=0.0):
    from peers.results import Sample

    return Sample(cpu_us, rate, p50_ms, 2.0, 0, 30.0, others)


# Forms of a request


def served(request):
    """The row that a server of v2 finds in a request's body."""
    headers = dict(request.headers)
    length = int(headers.get("Inference-Header-Content-Length", 0))
    return json.loads(request.body[:length]), np.frombuffer(request.body[length:], np.float32)


def test_a_v2_binary_request_describes_the_bytes_after_its_head():
    from peers.workloads import MLP16, V2_BINARY

    document, row = served(V2_BINARY.request("/p", MLP16, ROW))
    (tensor,) = document["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("x", "FP32", [1, 16])
    assert tensor["parameters"]["binary_data_size"] == ROW.nbytes
    np.testing.assert_array_equal(row, ROW)


def test_a_v2_binary_answer_begins_after_its_head():
    from peers.workloads import V2_BINARY

    np.testing.assert_array_equal(V2_BINARY.answer(b"{}" + ANSWER.tobytes(), 2), ANSWER)


@pytest.mark.parametrize("name", ["JSON", "V2_JSON", "JSON_ROWS"])
def test_json_holds_numbers_that_read_back_exactly(name):
    from peers import workloads

    wire = getattr(workloads, name)
    document = json.loads(wire.request("/p", workloads.MLP16, ROW).body)
    data = document["inputs"][0]["data"] if "inputs" in document else document["x"]
    np.testing.assert_array_equal(np.ravel(data).astype(np.float32), ROW)
    answer = {
        "JSON": {"y": ANSWER.tolist()},
        "V2_JSON": {"outputs": [{"data": ANSWER.tolist()}]},
        "JSON_ROWS": [ANSWER.tolist()],
    }[name]
    np.testing.assert_array_equal(wire.answer(json.dumps(answer).encode(), 0), ANSWER)


def test_a_json_request_of_784_numbers_takes_about_8_kb():
    from peers.workloads import JSON, MLP784

    (row,) = MLP784.rows(1)
    assert 7_500 < len(JSON.request("/p", MLP784, row).body) < 9_500


def test_no_two_rows_are_the_same_and_every_run_has_the_same_rows():
    from peers.workloads import IMAGE

    rows = IMAGE.rows(3)
    np.testing.assert_array_equal(rows, IMAGE.rows(3))
    assert len({float(row.mean()) for row in rows.round(2)}) == 3


def test_an_encoded_request_is_http():
    from peers.workloads import Request

    request = Request("/p", "POST", (("Content-Type", "a/b"),), b"xyz")
    assert request.encoded("h") == (
        b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 3\r\n\r\nxyz"
    )


# What the loads print


def printed(**changes):
    seen = {
        "requests": 500, "duration_us": 2_000_000, "p50_us": 1500, "p99_us": 9000,
        "status": 0, "broken": 0, "late": 0,
    }  # fmt: skip
    return f"Running 2s test\n\nRESULT {json.dumps(seen | changes)}\n"


def test_wrk_counts_only_good_answers():
    from peers.load import wrk_count

    count = wrk_count(printed(status=100, broken=7, late=1))
    assert (count.good, count.seconds, count.errors) == (400, 2.0, 108)
    assert (count.p50_ms, count.p99_ms) == (1.5, 9.0)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("unable to connect\n", "unable to connect"),
        ("", "nothing was printed"),
        (printed(status=500), "500 were errors"),
    ],
)
def test_a_load_without_a_good_answer_fails_with_its_reason(output, reason):
    from peers.load import LoadFailed, wrk_count

    with pytest.raises(LoadFailed, match=reason):
        wrk_count(output)


def test_the_loaders_rate_becomes_answers_and_seconds():
    from peers.load import loader_count

    text = json.dumps({"rate": 80.0, "answers": 240, "p50_ms": 700.0, "p99_ms": 900.0})
    count = loader_count(text)
    assert (count.good, count.seconds, count.errors) == (240, 3.0, 0)


# Results and targets


def keys(*subjects):
    from peers.results import Case, Key

    return [Key(Case("w", 32), subject) for subject in subjects]


def test_only_rounds_that_have_all_samples_are_compared():
    from peers.results import Results

    a, b = keys("a", "b")
    results = Results()
    for number in (0, 1, 2):
        results.add(a, number, sample(rate=number))
    results.add(b, 2, sample(rate=20))
    results.add(b, 0, sample(rate=0))
    pairs = [(one.rate, other.rate) for one, other in results.together([a, b])]
    assert pairs == [(0, 0), (2, 20)]
    assert results.together(keys("a", "never")) == []


def test_quiet_rounds_count_where_there_are_enough_else_all_do():
    from peers.results import counted

    quiet, busy = (sample(others=0.1),), (sample(others=1.0),)
    assert counted([quiet, busy, quiet, quiet]) == ([quiet] * 3, True)
    assert counted([quiet, busy, quiet]) == ([quiet, busy, quiet], False)
    assert counted([quiet]) == ([quiet], True)
    mixed = (sample(others=0.1), sample(others=1.0))
    assert counted([mixed] * 3) == ([mixed] * 3, False)


@pytest.mark.parametrize(
    ("cpu_us", "at_least", "met"),
    [(20.0, False, True), (20.1, False, False), (20.0, True, True), (19.9, True, False)],
)
def test_a_target_is_judged_by_the_median_of_ratios_within_rounds(cpu_us, at_least, met):
    from peers.results import Results
    from peers.targets import Target, cpu_ratio

    results = Results()
    # The machine is twice as slow in the second round, for both; the third is an outlier.
    for number, (speed, ratio) in enumerate([(1, 1), (2, 1), (1, 9)]):
        ours, theirs = keys("ours", "theirs")
        results.add(ours, number, sample(cpu_us=cpu_us * speed * ratio))
        results.add(theirs, number, sample(cpu_us=10.0 * speed))
    target = Target("it", tuple(keys("ours", "theirs")), cpu_ratio, 2.0, at_least)
    judgement = target.judge(results)
    assert judgement.met is met
    assert judgement.measured.startswith(f"{cpu_us / 10:.2f} (")


def test_a_target_without_its_samples_is_not_measured():
    from peers.results import Results
    from peers.targets import TARGETS

    assert {target.judge(Results()).met for target in TARGETS} == {None}


def test_figures():
    from peers.targets import cpu_beyond_model, latency_beyond, rate_ratio

    ours, other, model = sample(90, 300, 0.5), sample(30, 100, 0.2), sample(10, 1, 0.1)
    assert rate_ratio([ours, other]) == 3
    assert latency_beyond([ours, other, model]) == pytest.approx(0.2)
    assert cpu_beyond_model([ours, other, model]) == pytest.approx(80 / 30)


def test_every_target_names_a_case_and_servers_that_take_part():
    from peers.catalogue import PEERS
    from peers.results import BARE
    from peers.targets import TARGETS
    from peers.workloads import WORKLOADS

    there = set()
    for workload in WORKLOADS:
        subjects = [
            turn.subject for peer in PEERS if peer.takes(workload) for turn in peer.turns(workload)
        ]
        there |= {(workload.name, n, s) for n in workload.connections for s in subjects}
        if workload.bare_rows:
            there.add((workload.name, 0, BARE))
    for target in TARGETS:
        for (workload, connections), subject in target.subjects:
            assert (workload, connections, subject) in there, target.text


def test_the_table_and_the_picture_have_what_was_measured():
    from peers.publishing import by_case, picture, row
    from peers.results import BARE, Case, Key, Results

    case, alone = Case("w", 32), Case("w", 0)
    titles = {case: "w, 32 conn.", alone: "w, no server", "gateway": "ours", BARE: "loop"}
    results = Results(titles=titles)
    gateway, bare = Key(case, "gateway"), Key(alone, BARE)
    results.add(gateway, 0, sample(cpu_us=10))
    results.add(gateway, 1, sample(cpu_us=30))
    results.add(bare, 0, sample())
    assert by_case(results.samples) == {case: [gateway], alone: [bare]}
    assert row(results, gateway)[:3] == ("w, 32 conn.", "ours", "20.0 (10.0–30.0)")
    (drawn,) = picture(results)["cases"]
    assert drawn["title"] == "w, 32 conn."
    assert drawn["bars"] == [
        {"title": "ours", "ours": True, "cpu": (20, 10, 30), "rate": (1000, 1000, 1000)}
    ]


# Processes and environments


def test_a_process_belongs_to_its_own_family_and_has_used_cpu_time():
    from peers.processes import cpu_ns, family, pss_bytes, started

    me = os.getpid()
    assert me in family(me)
    assert cpu_ns([me])[me] > 0
    assert pss_bytes([me]) > 1 << 20
    assert me in started([me])


def test_all_processes_of_a_server_end_with_it(tmp_path, monkeypatch):
    from peers.processes import family, running

    monkeypatch.setattr("peers.processes.LINGER_S", 0.0)

    # The child is in a session of its own and has the signal ignored: neither is a way out.
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"
    parent = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-uc', {child!r}], stdout=subprocess.PIPE,"
        " start_new_session=True); p.stdout.readline(); open('ready', 'w').close(); p.wait()"
    )
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    with running([sys.executable, "-c", parent], {}, tmp_path / "log") as process:
        ready.read_bytes()
        members = [os.pidfd_open(pid) for pid in family(process.pid)]
    ended, _, _ = select.select(members, [], [], 0)
    for fd in members:
        os.close(fd)
    assert len(members) == 2
    assert ended == members


def test_loosened_requirements_lose_their_versions():
    from peers.environments import loosened

    lines = "certifi>=2030.1\nhttpx[http2]<1\n\ncertifi-extra>=1\n"
    assert loosened(lines, ("certifi",)) == ["certifi", "httpx[http2]<1", "certifi-extra>=1"]


def test_a_python_that_is_not_there_is_named():
    from peers.environments import Environment, Missing

    with pytest.raises(Missing, match="/nonexistent/python"):
        Environment("none", ("nothing==0",), python="/nonexistent/python").make()
