"""A gateway of our own for tests: started on free ports, watched, and ended without a trace."""

from __future__ import annotations

import os
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from types import TracebackType

from gateway.store.place import STATE_FOLDER
from gateway.store.store import Store

START_DEADLINE_S = 60
STOP_DEADLINE_S = 60

POLL_S = 0.005
"""Between two looks at what is waited for, so that looking takes little of the machine."""

LANES = {"fast": {}, "aiohttp": {"GATEWAY_FAST_LANE": "false"}}
"""What the environment has for a server whose plain requests take one lane or the other."""

_SERVING = re.compile(r"serving \d+ model versions on (\S+), metrics on (\S+), admin on (\S+)")


@cache
def _empty_state() -> bytes:
    """The file of a database with all tables and nothing in them."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/state.db")
        store.open()
        store.close()
        return Path(folder, "state.db").read_bytes()


class Server:
    """``gateway serve`` in a process of its own.

    ``url``, ``metrics_url`` and ``admin_url`` are known after `start` (or entering the context);
    ``lines`` holds what it wrote to standard error so far.
    """

    def __init__(
        self,
        repository: Path,
        *flags: str,
        python: str = sys.executable,
        cwd: Path | None = None,
        **env: str,
    ) -> None:
        self._cwd = cwd
        self.repository = repository
        self.url = self.metrics_url = self.admin_url = ""
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._command = [
            python, "-m", "gateway", "serve", "--model-repository", str(repository),
            "--port", "0", "--metrics-port", "0", "--admin-port", "0", *flags,
        ]  # fmt: skip
        self._env = {**os.environ, **env}
        self.process: subprocess.Popen[str] | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> Server:
        """Start and wait until it serves. AssertionError, with its output, if it ends instead."""
        self.launch()
        try:
            match = self.wait_for(_SERVING)
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise
        self.url, self.metrics_url, self.admin_url = match.groups()
        return self

    def launch(self) -> None:
        """Start without waiting."""
        if "GATEWAY_STATE" not in self._env and "--state" not in self._command:
            self._make_state()
        self.process = subprocess.Popen(
            self._command,
            cwd=self._cwd,
            env=self._env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._collect, args=(self.process.stderr,), daemon=True).start()

    def _make_state(self) -> None:
        """A repository that is used for the first time gets an empty database: making one takes a while."""
        folder = self.repository / STATE_FOLDER
        is_ours = self.repository.is_dir() and self.repository.stat().st_mode & stat.S_IWUSR
        if is_ours and not folder.exists():
            folder.mkdir(0o700)
            (folder / "state.db").write_bytes(_empty_state())

    def wait_for(self, pattern: re.Pattern[str] | str, after: int = 0) -> re.Match[str]:
        """The first line from number `after` on that holds the pattern."""
        compiled = re.compile(pattern)

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines[after:] if (m := compiled.search(line))), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, timeout=START_DEADLINE_S)
        match = found()
        assert match, f"no {pattern!r} in:\n" + "\n".join(self.lines)
        return match

    _ended = False

    def _collect(self, stream) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def workers(self) -> list[int]:
        """Process ids of the live workers."""
        return self._children("gateway.serving.worker")

    def frontends(self) -> list[int]:
        """Process ids of the live front ends."""
        return self._children("gateway.frontend.server")

    def _children(self, module: str) -> list[int]:
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [pid for pid in map(int, text.split()) if module in command_line(pid)]

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Ask it to end; the exit status."""
        self.process.send_signal(signal_number)
        return self.process.wait(STOP_DEADLINE_S)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if error is not None:
            print("\n".join(self.lines), file=sys.stderr)


def command_line(pid: int) -> str:
    """The command line of a process, empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_gone(pid: int, deadline_s: float = STOP_DEADLINE_S) -> None:
    """Wait until a process, which need not be our child, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(deadline_s * 1000), f"process {pid} did not end"
    finally:
        os.close(pidfd)


def run_time_ns(pid: int) -> int:
    """CPU time that the scheduler counts for a process's main thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def wait_run_time(pid: int, beyond_ns: int, deadline_s: float = STOP_DEADLINE_S) -> None:
    """Wait until a process has computed for so long."""
    deadline = time.monotonic() + deadline_s
    while run_time_ns(pid) < beyond_ns:
        assert time.monotonic() < deadline, f"process {pid} does not compute"
        time.sleep(POLL_S)
