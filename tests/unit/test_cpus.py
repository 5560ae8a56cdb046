"""CPUs and memory that a container may use, over made-up /proc and /sys; lists of CPUs."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.cpus import parse_cpus, usable_cpus, usable_memory_bytes

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1024 kB\n"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root of its own: 8 CPUs and 16 GiB, if nothing else is said."""

    def write(files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def in_groups(lines, files):
    """The files of a process in these groups; names are relative to /sys/fs/cgroup."""
    return {"proc/self/cgroup": lines, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}


# ---- CPUs ----------------------------------------------------------------------------------------

V1_CPU = "9:name=systemd:/\n4:cpu,cpuacct:/docker/ab\n"


@pytest.mark.parametrize(
    ("lines", "files", "cpus"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/a/b\n", {"c/cpu.max": "100000 100000\n"}, 8),
        ("0::/a:b\n", {"a:b/cpu.max": "200000 100000\n"}, 2),
        # The group is outside what this namespace shows, and above the mounted root.
        ("0::/../x\n", {"cpu.max": "200000 100000\n"}, 2),
        # Both forms at once, as systemd's hybrid layout has them.
        (
            V1_CPU + "0::/\n",
            {
                "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
                "unified/cpu.max": "max 100000\n",
            },
            4,
        ),
        (V1_CPU, {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1_CPU, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (V1_CPU, {"cpu/cpu.cfs_quota_us": "100000\n"}, 8),
    ],
)
def test_a_quota_bounds_the_cpus(machine, lines, files, cpus):
    assert usable_cpus(machine(in_groups(lines, files))) == cpus


@pytest.mark.parametrize(
    "text", ["", "\n", "max", "100000", "1 0", "0 100000", "-1 100000", "1 2 3", "x y", b"\xff 1"]
)
def test_a_malformed_quota_is_none(machine, text):
    assert usable_cpus(machine(in_groups("0::/\n", {"cpu.max": text}))) == 8


def test_the_affinity_bounds_the_cpus(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5})
    assert usable_cpus(machine({})) == 2
    assert usable_cpus(machine(in_groups("0::/\n", {"cpu.max": "500000 100000\n"}))) == 2


# ---- memory --------------------------------------------------------------------------------------

V1_MEMORY = "4:memory:/docker/ab\n"


@pytest.mark.parametrize(
    ("lines", "files", "limit_bytes"),
    [
        ("0::/\n", {}, 16 * GIB),
        ("0::/\n", {"memory.max": "max\n"}, 16 * GIB),
        ("0::/\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("0::/\n", {"memory.max": f"{99 * GIB}\n"}, 16 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": f"{3 * GIB}", "a/memory.max": f"{2 * GIB}"}, 2 * GIB),
        ("0::/\n", {"memory.max": "much\n"}, 16 * GIB),
        ("0::/\n", {"memory.max": "0\n"}, 16 * GIB),
        (V1_MEMORY, {"memory/docker/ab/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (V1_MEMORY, {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        # What version 1 says where there is no limit.
        (V1_MEMORY, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16 * GIB),
        # A limit of another resource's tree is none of ours.
        ("4:cpu:/\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, 16 * GIB),
    ],
)
def test_a_limit_bounds_the_memory(machine, lines, files, limit_bytes):
    assert usable_memory_bytes(machine(in_groups(lines, files))) == limit_bytes


@pytest.mark.parametrize("text", ["", "MemTotal: lots kB\n", "MemFree: 5 kB\n", b"MemTotal:\xff"])
def test_without_a_total_the_machine_is_asked_otherwise(machine, text):
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory_bytes(machine({"proc/meminfo": text})) == pages


@given(st.binary(max_size=80))
def test_nothing_that_a_kernel_may_write_fails(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("root")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    for lines in (text, b"0::/" + text, b"0::/\n1:cpu,memory:/" + text):
        for path in (root / "proc/meminfo", group / "cpu.max", group / "memory.max"):
            path.write_bytes(text)
        (root / "proc/self/cgroup").write_bytes(lines)
        assert 1 <= usable_cpus(root) <= 8
        assert usable_memory_bytes(root) > 0


def test_this_machine_has_cpus_and_memory():
    assert 1 <= usable_cpus() <= 8
    assert usable_memory_bytes() > 1 << 20


# ---- lists of CPUs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", {0}),
        ("0-3,8", {0, 1, 2, 3, 8}),
        ("8,0-1", {0, 1, 8}),
        ("5-5", {5}),
        ("1,1-2", {1, 2}),
    ],
)
def test_a_list_of_cpus(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text",
    ["", " ", "-", "1-", "-1", "3-1", "1,,2", "1,", "1-2-3", "a", "0x1", "1 2", "١", "10000"],
)  # fmt: skip
def test_no_list_of_cpus(text):
    with pytest.raises(ValueError, match="0-3,8"):
        parse_cpus(text)


@given(st.sets(st.integers(0, 9999), min_size=1))
def test_every_set_of_cpus_can_be_written(cpus):
    assert parse_cpus(",".join(map(str, cpus))) == cpus
