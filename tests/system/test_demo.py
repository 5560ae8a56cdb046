"""``gateway demo``: what it prints is true, what it says to type works, and it ends clean."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.system.server import command_line, wait_gone

DEADLINE_S = 60


def command(*flags: str) -> list[str]:
    ports = ["--port", "0", "--metrics-port", "0", "--admin-port", "0"]
    return [sys.executable, "-m", "gateway", "demo", *ports, *flags]


def plain_environment() -> dict[str, str]:
    forced = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    return {k: v for k, v in os.environ.items() if k not in forced} | {"PYTHONIOENCODING": "utf-8"}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=DEADLINE_S, env=plain_environment()
    )


@contextmanager
def running_demo(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process group of its own, as a shell would start it."""
    process = subprocess.Popen(
        command(*flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=plain_environment(),
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=DEADLINE_S)


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Its lines up to the one that holds the text; the test's own time-out bounds the wait."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in:\n" + "\n".join(lines))


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def shell(text: str) -> str:
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tour_prints_the_true_accuracies_and_ends(root):
    done = run("--once")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    truth = json.loads((root / "examples/digits/accuracy.json").read_text())
    routed = truth["1"]
    assert f"{routed['accuracy']:.2%} of {routed['total']} held-out images" in done.stdout
    assert "by version 1, the routed one" in done.stdout
    for version, entry in truth.items():
        row = rf"^ +{version} +{entry['accuracy']:.2%} +{entry['correct']} of {entry['total']} "
        assert re.search(row, done.stdout, re.MULTILINE), row
    assert re.search(r"^[\d,]+ requests a second", done.stdout, re.MULTILINE)
    assert re.search(r"in batches of \d+\.\d images", done.stdout)
    assert done.stdout.count("✓ label") >= 1
    assert done.stdout.count("✗ label") == 1
    assert done.stdout.endswith("The server has ended.\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed: apt install curl")
def test_printed_commands_work_and_interrupt_leaves_nothing_behind(root):
    with running_demo("--rate", "200") as demo:
        lines = read_until(demo, "Light traffic goes on")
        commands = "\n".join(lines).partition("Try it from another terminal:")[2]
        predict, metadata, metrics, kill = re.findall(
            r"^(?:curl|kill) .*(?:\n   ?\[.*)*", commands, re.MULTILINE
        )
        label = np.load(root / "examples/digits/held_out.npz", allow_pickle=False)["labels"][0]

        assert json.loads(shell(predict))["predictions"][0]["label"] == label
        assert json.loads(shell(metadata))["versions"] == ["1", "2", "3"]
        assert 'gateway_requests_total{code="200",model="digits",version="3"} 599' in shell(metrics)

        shell(kill)
        read_until(demo, "was killed by SIGKILL")
        assert json.loads(shell(predict))["predictions"][0]["label"] == label

        family = descendants(demo.pid)
        assert any("gateway.serving.worker" in command_line(pid) for pid in family)
        os.killpg(demo.pid, signal.SIGINT)  # a terminal's Ctrl-C
        rest, _ = demo.communicate(timeout=DEADLINE_S)
        assert demo.returncode == 0, rest
        assert re.search(r"^Sent [\d,]+ requests; 0 of them failed\.$", rest, re.MULTILINE), rest
        assert rest.endswith("The server has ended.\n")
        assert "Traceback" not in rest
        for pid in family:
            wait_gone(pid)


def test_printed_rollouts_end_as_they_say(root):
    before = {path: path.stat().st_mtime_ns for path in (root / "examples").rglob("*")}
    with running_demo("--rate", "400") as demo:
        text = "\n".join(read_until(demo, "Light traffic goes on"))
        assert re.search(
            r"^Watch it all in a browser: http://127\.0\.0\.1:\d+/$", text, re.MULTILINE
        )
        good, broken = re.findall(r"^.* rollout start digits .*$", text, re.MULTILINE)

        # Found out in the step of copies, before it answers anybody.
        failed = subprocess.run(["sh", "-c", f"{broken} --json"], capture_output=True, text=True)
        assert failed.returncode == 1, failed.stderr
        rollout = json.loads(failed.stdout)
        assert (rollout["state"], rollout["step"]) == ("ABORTED", 0)
        assert rollout["verdicts"]["agreement"]["outcome"] == "fail"

        assert json.loads(shell(f"{good} --json"))["state"] == "SUCCEEDED"
        demo.terminate()
        rest, _ = demo.communicate(timeout=DEADLINE_S)
        assert re.search(r"^Sent [\d,]+ requests; 0 of them failed\.$", rest, re.MULTILINE), rest
    assert {path: path.stat().st_mtime_ns for path in (root / "examples").rglob("*")} == before


def test_interrupted_tour_is_a_failure_when_it_was_all_that_was_wanted():
    with running_demo("--once") as demo:
        read_until(demo, "Serving digits")
        demo.send_signal(signal.SIGTERM)
        rest, _ = demo.communicate(timeout=DEADLINE_S)
        assert demo.returncode == 1
        assert rest == "The server has ended.\ngateway: interrupted before the tour was over\n"


def test_server_that_does_not_start_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--port", port)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"the server did not start: port: cannot listen on 127.0.0.1:{port}" in done.stderr


def test_missing_examples_are_one_line(tmp_path):
    done = run("--examples", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run the demo from a checkout" in done.stderr
