"""The store, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from gateway.store import engine, migrations, secret, tables
from gateway.store.changes import (
    AddAudit,
    AddEvent,
    DropModel,
    DropVersion,
    PutKey,
    PutModel,
    PutRollout,
    PutVersion,
    RevokeKey,
)
from gateway.store.records import (
    AuditRecord,
    EventRecord,
    KeyRecord,
    ModelRecord,
    RolloutRecord,
    VersionRecord,
)
from gateway.store.store import REPLAY_S, UNANSWERED_S, AsyncStore, Store
from tests.system.postgres import postgres_server, postgres_url  # noqa: F401 - fixtures

MODEL = ModelRecord("m", 1, {"shares": [{"version": 1, "weight_bp": 10_000}]}, {"stable": 1})
VERSION = VersionRecord("m", 1, "ab" * 32, 1 << 40, "upload", 1.5, True)
ROLLOUT = RolloutRecord("r1", "m", True, {"state": "PENDING", "seen": {"canary": [1, 2.5, None]}})
EVENT = EventRecord(2.5, "rollout.step", "m", "ci", "step 1 of 3", "r1", {"p": 0.01})
AUDIT = AuditRecord(3.5, "ci", "put", "models/m", None, {"labels": {"stable": 1}})
KEY = KeyRecord("0123456789ab", "ci", "deployer", ("m", "n"), "cd" * 32, 4.5, 5.5)
LARGEST = (1 << 63) - 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.db"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def open_store(url, clock):
    """Opens a store on the test's database; the second one is as another process's."""
    opened = []

    def make() -> Store:
        store = Store(url, clock)
        store.open()
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store) -> Store:
    return open_store()


def run_sql(url: str, statement: str) -> None:
    """Something that the store itself would not do."""
    if url.startswith(engine.SQLITE):
        connection = sqlite3.connect(url.removeprefix(engine.SQLITE))
    else:
        connection = psycopg.connect(url)
    try:
        connection.execute(statement)
        connection.commit()
    finally:
        connection.close()


# What is written is read again.


def test_a_new_store_is_empty(store):
    assert store.models() == store.versions() == store.rollouts() == store.keys() == []
    assert store.events() == store.audit() == []
    assert store.rollout("r1") is store.key("k") is None
    assert store.revision() == 0


def test_what_is_written_is_read_again_after_opening_it_anew(store, open_store):
    store.write(PutModel(MODEL), PutVersion(VERSION), PutRollout(ROLLOUT), PutKey(KEY))
    store.write(AddEvent(EVENT), AddAudit(AUDIT))
    store.close()
    again = open_store()
    assert again.models() == [MODEL]
    assert again.versions() == [VERSION]
    assert again.rollouts() == [ROLLOUT]
    assert again.rollout("r1") == ROLLOUT
    assert again.events() == [replace(EVENT, id=1)]
    assert again.audit() == [replace(AUDIT, id=1)]
    assert again.keys() == [KEY]
    assert again.key(KEY.id) == KEY
    assert again.revision() == 2


def test_records_are_replaced_and_keep_what_may_be_none(store):
    store.write(PutModel(MODEL), PutVersion(VERSION), PutRollout(ROLLOUT), PutKey(KEY))
    model, version = ModelRecord("m", 2), replace(VERSION, number=1, is_wanted=None)
    rollout, key = replace(ROLLOUT, is_active=False, document={}), replace(KEY, expires_s=None)
    store.write(PutModel(model), PutVersion(version), PutRollout(rollout), PutKey(key))
    assert store.models() == [model]
    assert store.versions() == [version]
    assert store.rollouts() == [rollout]
    assert store.keys() == [key]


def test_numbers_of_64_bits_and_text_of_any_script_are_kept(store):
    version = replace(VERSION, model="n", number=LARGEST, nbytes=LARGEST)
    event = replace(EVENT, text="β → 2 %", numbers={"größe": LARGEST, "text": "a\0b"})
    store.write(PutModel(ModelRecord("n", LARGEST)), PutVersion(version), AddEvent(event))
    assert store.models() == [ModelRecord("n", LARGEST)]
    assert store.versions() == [version]
    assert store.events() == [replace(event, id=1)]


def test_text_that_no_database_takes_does_not_lose_the_event(store):
    store.write(AddEvent(replace(EVENT, text="a\0b\ud800c")))
    assert [event.text for event in store.events()] == ["a�b?c"]


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-LARGEST - 1, LARGEST) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_documents_are_read_as_they_were_written(value):
    column = tables.Json()
    bound = column.process_bind_param({"value": value}, None)
    assert column.process_result_value(bound, None) == {"value": value}


# Models and versions.


def test_lists_are_sorted(store):
    for name in ("b", "a"):
        for number in (10, 9):
            store.write(PutVersion(replace(VERSION, model=name, number=number)))
    assert [model.name for model in store.models()] == ["a", "b"]
    found = [(version.model, version.number) for version in store.versions()]
    assert found == [("a", 9), ("a", 10), ("b", 9), ("b", 10)]


def test_a_version_makes_its_model_and_leaves_one_that_is_there(store):
    store.write(PutVersion(VERSION))
    assert store.models() == [ModelRecord("m")]
    store.write(PutModel(MODEL, expected_revision=0), PutVersion(replace(VERSION, number=2)))
    assert store.models() == [MODEL]


def test_a_dropped_version_is_gone_alone(store):
    second = replace(VERSION, number=2)
    store.write(PutVersion(VERSION), PutVersion(second))
    store.write(DropVersion("m", 1), DropVersion("m", 3))
    assert store.versions() == [second]


def test_a_dropped_model_takes_its_versions_along_but_not_what_happened(store):
    other = replace(VERSION, model="n")
    store.write(PutVersion(VERSION), PutVersion(other), PutRollout(ROLLOUT), AddEvent(EVENT))
    store.write(DropModel("m"), DropModel("nobody"))
    assert store.models() == [ModelRecord("n")]
    assert store.versions() == [other]
    assert store.rollouts() == [ROLLOUT]
    assert len(store.events()) == 1


@pytest.mark.parametrize("expected", [0, 2, 4])
def test_a_stale_revision_changes_nothing(store, expected):
    store.write(PutModel(replace(MODEL, revision=3)))
    before = store.revision()
    with pytest.raises(PreconditionFailed, match=f"revision 3, not {expected}"):
        store.write(AddEvent(EVENT), PutModel(replace(MODEL, revision=5), expected))
    assert store.models() == [replace(MODEL, revision=3)]
    assert store.events() == []
    assert store.revision() == before


def test_the_expected_revision_lets_a_change_through(store):
    store.write(PutModel(replace(MODEL, revision=3)))
    store.write(PutModel(replace(MODEL, revision=4), 3))
    assert store.models() == [replace(MODEL, revision=4)]


def test_only_one_of_two_that_read_the_same_revision_writes(store, open_store):
    store.write(PutModel(MODEL))
    open_store().write(PutModel(replace(MODEL, revision=2), 1))
    with pytest.raises(PreconditionFailed):
        store.write(PutModel(replace(MODEL, revision=2, labels={}), 1))


# Rollouts.


def test_a_model_has_one_active_rollout(store):
    store.write(PutRollout(ROLLOUT))
    with pytest.raises(Conflict, match="another active rollout"):
        store.write(AddEvent(EVENT), PutRollout(replace(ROLLOUT, id="r2")))
    assert store.events() == []
    ended = replace(ROLLOUT, is_active=False)
    store.write(PutRollout(replace(ROLLOUT, id="r2", model="n")), PutRollout(ended))
    store.write(PutRollout(replace(ROLLOUT, id="r3")))
    with pytest.raises(Conflict):
        store.write(PutRollout(ROLLOUT))  # a retry, while another one runs
    assert [each.id for each in store.rollouts(active_only=True)] == ["r3", "r2"]


def test_rollouts_are_listed_from_the_newest_page_by_page(store):
    for number in range(7):
        record = RolloutRecord(f"r{number}", f"m{number % 2}", number > 4, {})
        store.write(PutRollout(record))
    store.write(PutRollout(RolloutRecord("r0", "m0", False, {"changed": True})))
    ids = ["r6", "r5", "r4", "r3", "r2", "r1", "r0"]
    assert [each.id for each in store.rollouts()] == ids
    assert [each.id for each in store.rollouts(limit=2)] == ids[:2]
    assert [each.id for each in store.rollouts(before="r5", limit=3)] == ids[2:5]
    assert [each.id for each in store.rollouts({"m1"}, before="r3")] == ["r1"]
    assert [each.id for each in store.rollouts({"m1"}, active_only=True)] == ["r5"]
    assert [each.id for each in store.rollouts({"m0", "m1"}, before="r5", limit=3)] == ids[2:5]
    assert store.rollouts(before="r0") == []
    for models, before in ((None, "r9"), ({"m1"}, "r2")):
        with pytest.raises(InvalidRequest, match="after"):
            store.rollouts(models, before=before)


# Events and the audit log.


def test_event_ids_ascend_and_are_found_by_what_they_are_about(store):
    assert store.write() == ()
    first = store.write(AddEvent(EVENT), AddAudit(AUDIT), AddEvent(replace(EVENT, rollout="")))
    second = store.write(AddEvent(replace(EVENT, model="n", rollout="r2")))
    assert [*first, *second] == sorted({*first, *second})
    assert [event.id for event in store.events()] == [*first, *second]
    assert [event.id for event in store.events(after=first[0])] == [first[1], *second]
    assert [event.id for event in store.events(model="m", limit=1)] == [first[0]]
    assert [event.id for event in store.events(rollout="r2")] == [*second]
    assert store.events(model="m", rollout="r2") == store.events(after=second[0]) == []
    assert [event.id for event in store.newest_events(limit=2)] == [first[1], *second]
    assert [event.id for event in store.newest_events("m", limit=1)] == [first[1]]
    assert [event.id for event in store.newest_events(rollout="r2")] == [*second]


def test_ids_are_not_used_again(store, open_store, url):
    """Not even where somebody has removed the triggers and the newest events."""
    (last,) = store.write(AddEvent(EVENT))
    if url.startswith(engine.SQLITE):
        run_sql(url, "DROP TRIGGER events_no_delete")
    else:
        run_sql(url, "DROP TRIGGER events_append_only ON events")
    run_sql(url, "DELETE FROM events")
    store.close()
    assert open_store().write(AddEvent(EVENT)) > (last,)


def test_the_audit_log_is_read_page_by_page(store):
    for number in range(5):
        store.write(AddAudit(replace(AUDIT, before={"number": number})))
    ids = [entry.id for entry in store.audit()]
    assert ids == sorted(set(ids))
    assert [entry.before for entry in store.audit(ids[1], limit=2)] == [
        {"number": 2},
        {"number": 3},
    ]


@pytest.mark.parametrize("table", ["events", "audit"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET actor = 'me'", "DELETE FROM {}"])
def test_what_was_logged_cannot_be_changed(store, url, table, statement):
    store.write(AddEvent(EVENT), AddAudit(AUDIT))
    with pytest.raises(
        (sqlite3.IntegrityError, psycopg.errors.RaiseException), match="append-only"
    ):
        run_sql(url, statement.format(table))
    assert (len(store.events()), len(store.audit())) == (1, 1)


def test_a_reader_misses_no_event_of_writers_at_once(open_store):
    """In both databases ids become visible in their order."""
    reader, writers = open_store(), [open_store() for _ in range(3)]
    each = 40

    def write(store: Store) -> None:
        for _ in range(each):
            store.write(AddEvent(EVENT), AddEvent(EVENT))

    threads = [threading.Thread(target=write, args=(store,)) for store in writers]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    while any(thread.is_alive() for thread in threads):
        seen += [event.id for event in reader.events(seen[-1] if seen else 0)]
    for thread in threads:
        thread.join()
    while more := [event.id for event in reader.events(seen[-1] if seen else 0)]:
        seen += more
    assert len(seen) == len(set(seen)) == 2 * each * len(writers)
    assert reader.revision() == each * len(writers)


# Keys.


def test_a_revoked_key_keeps_the_time_at_which_it_was(store):
    store.write(PutKey(KEY), PutKey(replace(KEY, id="other", created_s=1.0, models=())))
    store.write(RevokeKey(KEY.id, 7.0))
    store.write(RevokeKey(KEY.id, 8.0))
    assert store.key(KEY.id) == replace(KEY, revoked_s=7.0)
    assert [key.id for key in store.keys()] == ["other", KEY.id]  # noqa: SIM118


def test_revoking_a_key_that_is_not_there_changes_nothing(store):
    with pytest.raises(NotFound):
        store.write(AddAudit(AUDIT), RevokeKey("nobody", 7.0))
    assert store.audit() == []


# Idempotency.


def test_a_repeated_request_gets_the_first_answer(store, open_store, clock):
    assert store.remember("ci", "k", "aa") is None
    store.answered("ci", "k", 201, {"id": "r1"})
    replay = open_store().remember("ci", "k", "aa")
    assert (replay.status, replay.body, replay.at_s) == (201, {"id": "r1"}, clock.now_s)


def test_a_key_is_one_actors_and_for_one_request(store):
    assert store.remember("ci", "k", "aa") is None
    assert store.remember("other", "k", "bb") is None
    with pytest.raises(Conflict, match="not answered yet"):
        store.remember("ci", "k", "aa")
    store.answered("ci", "k", 201, {})
    with pytest.raises(Conflict, match="another request"):
        store.remember("ci", "k", "bb")


def test_what_failed_for_a_while_can_be_tried_again(store):
    store.remember("ci", "k", "aa")
    store.forget("ci", "k")
    assert store.remember("ci", "k", "bb") is None


def test_what_a_crash_left_unanswered_can_be_tried_again(store, open_store):
    store.remember("ci", "answered", "aa")
    store.answered("ci", "answered", 200, {})
    store.remember("ci", "begun", "aa")
    store.close()
    again = open_store()
    again.forget_unanswered()
    assert again.remember("ci", "begun", "aa") is None
    assert again.remember("ci", "answered", "aa").status == 200


def test_what_nobody_answers_can_be_tried_again_after_a_while(store, clock):
    store.remember("ci", "begun", "aa")
    store.remember("ci", "answered", "aa")
    store.answered("ci", "answered", 200, {})
    clock.now_s += UNANSWERED_S - 1
    with pytest.raises(Conflict, match="not answered yet"):
        store.remember("ci", "begun", "aa")
    clock.now_s += 1
    assert store.remember("ci", "begun", "aa") is None
    assert store.remember("ci", "answered", "aa").status == 200


def test_answers_are_forgotten_after_a_day(store, clock):
    store.remember("ci", "k", "aa")
    store.answered("ci", "k", 201, {})
    clock.now_s += REPLAY_S - 1
    assert store.remember("ci", "k", "aa").status == 201
    clock.now_s += 1
    assert store.remember("ci", "k", "bb") is None
    store.answered("gone", "gone", 200, {})  # as one whose answer took more than a day
    assert store.remember("gone", "gone", "aa") is None


# Leases.


def test_a_lease_has_one_holder_at_a_time(store, open_store):
    other = open_store()
    assert store.lease("lead", "a", ttl_s=1000)
    assert not other.lease("lead", "b", ttl_s=1000)
    assert other.lease("judge", "b", ttl_s=1000)
    assert store.lease("lead", "a", ttl_s=-1)  # it is over already
    assert other.lease("lead", "b", ttl_s=1000)
    assert not store.lease("lead", "a", ttl_s=1000)
    store.release("lead", "a")
    assert not store.lease("lead", "a", ttl_s=1000)
    other.release("lead", "b")
    assert store.lease("lead", "a", ttl_s=1000)


def test_of_many_that_want_a_lease_one_gets_it(open_store):
    stores = [open_store() for _ in range(4)]
    won: list[int] = []
    start = threading.Barrier(len(stores))

    def want(number: int) -> None:
        start.wait(30)
        if stores[number].lease("lead", str(number), ttl_s=1000):
            won.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


# Opening.


def test_the_migrations_make_the_tables_that_the_code_knows(store):
    context = {"version_table": migrations.VERSION_TABLE, "compare_type": True}
    with engine.reading(store._engine) as connection:
        made = MigrationContext.configure(connection, opts=context)
        assert compare_metadata(made, tables.metadata) == []
        script = ScriptDirectory(str(migrations.FOLDER))
        assert made.get_current_revision() == script.get_current_head()


def test_a_database_that_is_up_to_date_needs_no_alembic(run_python, tmp_path):
    code = (
        "import sys; from gateway.store.store import Store; "
        f"store = Store('sqlite:///{tmp_path}/state.db'); store.open(); store.close(); "
        "print('alembic' in sys.modules)"
    )
    assert [run_python(code), run_python(code)] == ["True\n", "False\n"]


OPEN = """
import sys
from gateway.store.store import Store
from gateway.store.changes import AddEvent
from gateway.store.records import EventRecord
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
store.open()
store.write(AddEvent(EventRecord(1.0, "opened", "m", "test", "")))
store.close()
"""


@contextmanager
def python(code: str, *arguments: str):
    """A process with pipes, that is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_processes_that_open_a_new_database_at_once_all_do(url, open_store):
    with python(OPEN, url) as one, python(OPEN, url) as two, python(OPEN, url) as three:
        for process in (one, two, three):
            assert process.stdout.readline() == "ready\n"
        for process in (one, two, three):
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait(60) for process in (one, two, three)] == [0, 0, 0]
    assert len(open_store().events()) == 3


def test_a_newer_database_is_refused(store, open_store, url):
    run_sql(url, f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="newer gateway") as error:
        open_store()
    assert "\n" not in error.value.message


def test_a_database_of_another_program_is_refused(url, open_store):
    run_sql(url, "CREATE TABLE models (something TEXT)")
    with pytest.raises(ConfigurationError, match=r"cannot be used: .*models") as error:
        open_store()
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "url",
    ["mysql://a@b/c", "sqlite:state.db", "sqlite:///", "postgresql://h:port/d", "postgres://h/d"],
)
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigurationError, match="state: expected"):
        Store(url).open()


def test_a_store_that_is_not_open_says_so():
    store = Store("sqlite:///nowhere.db")
    store.close()
    with pytest.raises(RuntimeError, match="not open"):
        store.models()


# SQLite alone.


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "new folder" / "100 %?" / "state.db"


@pytest.fixture
def filed(file):
    store = Store(f"sqlite:///{file}")
    store.open()
    yield store
    store.close()


def test_only_its_owner_can_read_the_files(file, filed):
    filed.write(PutModel(MODEL))
    beside = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert beside == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(file):
    file.parent.mkdir(parents=True)
    file.touch(0o644)
    store = Store(f"sqlite:///{file}")
    store.open()
    store.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_sqlite_is_set_up_to_lose_nothing(filed):
    with engine.reading(filed._engine) as connection:
        set_up = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert set_up == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1,
        "busy_timeout": 1000 * engine.LOCK_TIMEOUT_S,
    }  # fmt: skip


def test_a_database_that_another_process_keeps_is_unavailable_for_now(monkeypatch, file):
    monkeypatch.setattr(engine, "LOCK_TIMEOUT_S", 0)
    store = Store(f"sqlite:///{file}")
    store.open()
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="state database"):
        store.write(PutModel(MODEL))
    assert store.models() == []  # readers go on
    other.rollback()
    other.close()
    store.write(PutModel(MODEL))
    store.close()


def damage_header(content: bytearray) -> None:
    content[:100] = b"\xff" * 100


def damage_page(content: bytearray) -> None:
    content[4096:8192] = b"\xff" * 4096


def damage_length(content: bytearray) -> None:
    del content[-4096:]


@pytest.mark.parametrize("damage", [damage_header, damage_page, damage_length])
def test_a_damaged_file_is_refused_in_one_line(file, damage):
    store = Store(f"sqlite:///{file}")
    store.open()
    store.write(*(PutModel(ModelRecord(f"m{number}")) for number in range(200)))
    store.close()
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^state: the database ") as error:
        store.open()
    assert "\n" not in error.value.message
    assert str(file) not in error.value.message


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Is a directory"):
        Store(f"sqlite:///{tmp_path}").open()


# PostgreSQL alone.


def test_without_its_driver_postgresql_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"inference-gateway\[postgres\]"):
        Store("postgresql://user@127.0.0.1/d").open()


def test_a_server_that_is_not_there_is_refused_in_one_line(postgres_server):  # noqa: F811
    url = f"postgresql://user:password@127.0.0.1:{postgres_server.port}/nothing"
    with pytest.raises(ConfigurationError, match="cannot be used") as error:
        Store(url).open()
    assert "\n" not in error.value.message
    assert "password" not in error.value.message


def test_a_connection_that_was_lost_is_made_again(postgres_url):  # noqa: F811
    store = Store(postgres_url)
    store.open()
    store.write(PutModel(MODEL))
    run_sql(
        postgres_url,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert store.models() == [MODEL]
    store.close()


def test_a_lease_is_timed_by_the_database_whatever_the_clocks_of_gateways_say(postgres_url):  # noqa: F811
    stores = [Store(postgres_url, lambda now_s=now_s: now_s) for now_s in (0.0, 1e12)]
    try:
        for each in stores:
            each.open()
        assert stores[0].lease("lead", "a", ttl_s=1000)
        assert not stores[1].lease("lead", "b", ttl_s=1000)
        assert stores[0].lease("lead", "a", ttl_s=1000)
    finally:
        for each in stores:
            each.close()


# Durability.

WRITE = """
import sys
from gateway.store.store import Store
from gateway.store.changes import AddAudit, AddEvent, PutModel, PutRollout, PutVersion
from gateway.store.records import *
store = Store(sys.argv[1])
store.open()
number = max([model.revision for model in store.models()], default=0)
while True:
    number += 1
    store.write(
        PutVersion(VersionRecord("m", number, "", 1, "upload", 0.0)),
        PutRollout(RolloutRecord("r", "m", True, {"step": number})),
        AddEvent(EventRecord(0.0, "step", "m", "test", "", "r", {"step": number})),
        AddAudit(AuditRecord(0.0, "test", "step", "m", None, {"step": number})),
        PutModel(ModelRecord("m", number, {"to": number}, {"stable": number}), number - 1),
    )
    print(number, flush=True)
"""


def test_a_process_killed_at_any_point_loses_no_write_and_leaves_no_half_of_one(url, open_store):
    chance = random.Random(7)
    for _ in range(5):
        with python(WRITE, url) as process:
            for _ in range(chance.randrange(1, 20)):
                told = int(process.stdout.readline())
            for _ in range(chance.randrange(50_000)):
                pass  # so that it is killed anywhere between two writes
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
            told = max([told, *map(int, process.stdout.read().split("\n")[:-1])])
        store = open_store()
        (model,) = store.models()
        number = model.revision
        assert number >= told, "a write that was told is lost"
        assert model == ModelRecord("m", number, {"to": number}, {"stable": number})
        steps = list(range(1, number + 1))
        assert [version.number for version in store.versions()] == steps
        assert store.rollouts() == [RolloutRecord("r", "m", True, {"step": number})]
        assert [event.numbers["step"] for event in store.events(limit=10**6)] == steps
        assert [entry.after["step"] for entry in store.audit(limit=10**6)] == steps
        assert store.revision() == number
        store.close()


# The secret.


def test_the_secret_is_made_once_and_is_its_owners(tmp_path, filed):
    folder = tmp_path / "state"
    found = filed.secret(folder)
    assert len(found) == 32
    assert filed.secret(folder) == found
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert filed.secret(tmp_path / "other") != found


def test_of_many_that_make_the_secret_all_get_the_same(tmp_path):
    found: list[bytes] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait(30)
        found.append(secret.server_secret(tmp_path / "state"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == [secret.SECRET_FILE]


def test_the_environment_gives_the_secret_before_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv(secret.SECRET_VARIABLE, "0f" * 32)
    assert secret.server_secret(tmp_path) == b"\x0f" * 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "0f" * 31, "0f" * 33, "0g" * 32, "ü" * 64])
def test_a_secret_of_another_form_is_refused_without_being_told(monkeypatch, tmp_path, text):
    (tmp_path / secret.SECRET_FILE).write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=r"expected 64 hexadecimal digits$"):
        secret.server_secret(tmp_path)
    monkeypatch.setenv(secret.SECRET_VARIABLE, text)
    with pytest.raises(ConfigurationError, match="GATEWAY_SECRET: expected 64"):
        secret.server_secret(tmp_path / "new")


def test_a_secret_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / secret.SECRET_FILE).mkdir()
    with pytest.raises(ConfigurationError, match="cannot be used: Is a directory"):
        secret.server_secret(tmp_path)


# In an event loop.


async def test_the_loop_goes_on_while_the_store_works(file):
    store = AsyncStore(Store(f"sqlite:///{file}"))
    await store.open()
    entered, leave = threading.Event(), threading.Event()
    threads = set()

    def slow(inner: Store) -> int:
        threads.add(threading.current_thread())
        entered.set()
        assert leave.wait(30)
        return inner.revision()

    first = asyncio.ensure_future(store.call(slow))
    second = asyncio.ensure_future(store.call(Store.write, AddEvent(EVENT)))
    await asyncio.get_running_loop().run_in_executor(None, entered.wait, 30)
    assert not second.done()
    leave.set()
    assert await first == 0, "calls run in their order"
    assert await second == (1,)
    assert await store.call(Store.events, after=0, model="m") == [replace(EVENT, id=1)]
    assert threading.current_thread() not in threads
    await store.close()


async def test_what_nobody_waits_for_any_more_is_written_all_the_same(file):
    store = AsyncStore(Store(f"sqlite:///{file}"))
    await store.open()
    entered, leave = threading.Event(), threading.Event()

    def write(inner: Store) -> None:
        entered.set()
        assert leave.wait(30)
        inner.write(AddEvent(EVENT))

    waiting = asyncio.ensure_future(store.call(write))
    await asyncio.get_running_loop().run_in_executor(None, entered.wait, 30)
    waiting.cancel()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(await store.call(Store.events)) == 1
    await store.close()
