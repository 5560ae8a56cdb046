"""A server of our own, for commands that show one at work.

It runs in a session of its own: a Ctrl-C in the terminal reaches the command alone, which stops what it
is doing first and then ends the server the way any service manager would, by SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp

from gateway.errors import GatewayError

START_DEADLINE_S = 180
POLL_S = 0.05
STOP_DEADLINE_S = 45
"""A little more than what the server itself allows for draining."""

LINE_BYTES = 1 << 20
"""Longest line of its log that is read."""

_SERVING = re.compile(
    r"serving \d+ model versions on ([^\s,]+), metrics on ([^\s,]+), admin on ([^\s,]+)"
)
_ROUTINE = re.compile(r"\S+ \S+ (DEBUG|INFO) ")


class ServerProcess:
    """``gateway serve`` as a child of ours.

    ``url``, ``metrics_url`` and ``admin_url`` are known after `wait_ready`.

    Args:
        on_trouble: called with what it writes from then on, routine log lines excepted.
    """

    def __init__(self, on_trouble: Callable[[str], None]) -> None:
        self.url = self.metrics_url = self.admin_url = ""
        self._on_trouble = on_trouble
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self._last_line = ""

    async def start(
        self, repository: Path, state: str, port: int, metrics_port: int, admin_port: int
    ) -> None:
        """Start it on loopback, with a database of its own. Port 0 means any free one."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway", "serve"),
            *("--model-repository", str(repository), "--host", "127.0.0.1"),
            *("--port", str(port), "--metrics-port", str(metrics_port)),
            *("--admin-host", "127.0.0.1", "--admin-port", str(admin_port), "--state", state),
            *("--log-level", "info", "--log-format", "text"),
            env={**os.environ, "GATEWAY_ORPHAN_GRACE_S": "0"},  # `stop` may have to kill it
            limit=LINE_BYTES,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def wait_ready(self) -> None:
        """Wait until it is ready. GatewayError, with its last line, if it ends instead."""
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._read_addresses()
                self._log = asyncio.create_task(self._follow_log())
                await self._poll_readiness()
        except (TimeoutError, aiohttp.ClientError):
            raise GatewayError(f"the server did not become ready: {self._reason()}") from None

    async def ended(self) -> None:
        """Return, by GatewayError, when it ends of itself."""
        status = await self._process.wait() if self._process else None
        raise GatewayError(f"the server ended of itself, with status {status}")

    async def stop(self) -> bool:
        """End it by SIGTERM; by SIGKILL when that takes too long or this task is cancelled again.

        Returns:
            Whether there was anything to end.
        """
        if self._process is None or self._process.returncode is not None:
            return False
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                await self._process.wait()
        except (TimeoutError, asyncio.CancelledError):
            with suppress(ProcessLookupError):
                self._process.kill()  # its children see that it is gone, and end too
            await self._process.wait()
        return True

    def worker(self, model: str, version: int) -> int | None:
        """The first process that runs the version, None where the system does not tell."""
        name = f"{model}/{version}#0".encode()
        pid = self._process.pid if self._process else 0
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if name in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    return int(child)
        return None

    async def _read_addresses(self) -> None:
        while not self.url:
            line = await self._read_line()
            if line is None:
                raise GatewayError(f"the server did not start: {self._reason()}")
            if match := _SERVING.search(line):
                self.url, self.metrics_url, self.admin_url = match.groups()

    async def _poll_readiness(self) -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{self.url}/readyz") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(POLL_S)

    async def _read_line(self) -> str | None:
        stream = self._process.stderr if self._process else None
        raw = await stream.readline() if stream else b""
        if not raw:
            return None
        self._last_line = raw.decode(errors="replace").rstrip() or self._last_line
        return self._last_line

    async def _follow_log(self) -> None:
        while (line := await self._read_line()) is not None:
            if not _ROUTINE.match(line):
                self._on_trouble(line)

    def _reason(self) -> str:
        reason = self._last_line.removeprefix("gateway: ") or "it said nothing"
        if "cannot listen" in reason:
            reason += "; choose others with --port, --metrics-port and --admin-port (0: any free)"
        return reason
