"""A real PostgreSQL of the tests' own: one server a session, one database a test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

INSTALL = "needs PostgreSQL's server: apt-get install postgresql"
USER = "gateway"
_OTHERS = ("postgres", "nobody")


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        versions = Path("/usr/lib/postgresql").glob(f"*/bin/{program}")
        found = next((str(path) for path in sorted(versions, reverse=True)), None)
    if found is None:
        pytest.skip(INSTALL)
    return found


def _other_user() -> pwd.struct_passwd | None:
    """Whom the server runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next(known[name] for name in _OTHERS if name in known)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class PostgresServer:
    """A running server; everybody on this machine may connect as `USER`."""

    def __init__(self) -> None:
        initdb, self._pg_ctl = _find("initdb"), _find("pg_ctl")
        # Not below pytest's own folder, which no other user may enter.
        self._folder = Path(tempfile.mkdtemp(prefix="gateway-postgres-"))
        self._data = self._folder / "data"
        self._user = _other_user()
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--locale=C"]
        self._run(initdb, *options, "--no-sync", f"--pgdata={self._data}")
        self.port = _free_port()
        # No test takes the machine's power away, so nothing need reach the disk.
        server = f"-F -h 127.0.0.1 -p {self.port} -k {self._folder}"
        log = self._folder / "log"
        self._control("start", f"--options={server}", f"--log={log}", "--timeout=60")
        self._names = (f"test_{number}" for number in count())

    def make_database(self) -> str:
        """A new, empty database; its URL."""
        name = next(self._names)
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def stop(self) -> None:
        self._control("stop", "--mode=immediate")
        shutil.rmtree(self._folder)

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def _control(self, verb: str, *options: str) -> None:
        self._run(self._pg_ctl, verb, "--wait", f"--pgdata={self._data}", *options)

    def _run(self, *command: str) -> None:
        other = {}
        if self._user is not None:
            other = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        done = subprocess.run(
            command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=90, **other,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture
def postgres_url(postgres_server) -> str:
    """The URL of a new, empty database."""
    return postgres_server.make_database()
