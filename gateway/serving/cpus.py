"""The CPUs and the memory that this process may really use, and lists of CPUs.

A container sees every CPU and all the memory of its machine; what it may take of them stands in its
control groups (cgroups). As many threads as the machine has CPUs, in a container of two, would share
its quota and be stopped for most of each period.

Limits stand in files of two forms: version 2 (one tree) and version 1 (a tree for each resource). A
group's limit holds for all that is below it, so that the ancestors count, too. In a container with a
cgroup namespace, as most have, the tree that it sees begins at its own group; without one, the path
in /proc/self/cgroup is the host's, which need not be visible: then the root that is mounted stands for
it. A file that is missing or malformed is no limit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
_COUNT = re.compile(r"\d{1,20}", re.ASCII)


def parse_cpus(text: str) -> frozenset[int]:
    """The CPUs in a list such as ``0-3,8``. ValueError: it is none."""
    cpus = set[int]()
    for piece in text.split(","):
        found = _RANGE.fullmatch(piece)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ValueError("expected a list of CPUs such as 0-3,8")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: by its affinity and its groups' quotas, rounded up.

    Args:
        root: the folder that holds proc and sys.
    """
    quotas = [quota for folder in _groups(root, "cpu") if (quota := _quota(folder))]
    return max(1, math.ceil(min([float(len(os.sched_getaffinity(0))), *quotas])))


def usable_memory_bytes(root: Path = ROOT) -> int:
    """Memory that the processes of this machine or container may take together.

    Args:
        root: the folder that holds proc and sys.
    """
    limits = [
        limit
        for folder in _groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(_read(folder / name)))
    ]
    return min([_machine_memory_bytes(root), *limits])


def _quota(group: Path) -> float | None:
    """CPUs that a group may keep busy on average; None: no limit."""
    runtime_us, _, period_us = _read(group / "cpu.max").strip().partition(" ")
    if not runtime_us:
        runtime_us = _read(group / "cpu.cfs_quota_us")  # -1: no limit
        period_us = _read(group / "cpu.cfs_period_us")
    runtime, period = _number(runtime_us), _number(period_us)
    return runtime / period if runtime and period else None


def _machine_memory_bytes(root: Path) -> int:
    """MemTotal; what the C library says where /proc does not."""
    for line in _read(root / "proc/meminfo").split("\n"):
        key, _, value = line.partition(":")
        kib = _number(value.removesuffix(" kB"))
        if key == "MemTotal" and kib:
            return kib << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and its ancestors, in both forms' trees; some do not exist."""
    tree = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inner = PurePosixPath(path.lstrip("/"))
        if number == "0" and not controllers:
            tops = (tree, tree / "unified")
        elif controller in controllers.split(","):
            tops = (tree / controllers, tree / controller)
        else:
            continue
        if ".." in inner.parts:  # a group outside the namespace's root
            inner = PurePosixPath()
        for top in tops:
            yield from (top / group for group in (inner, *inner.parents))


def _read(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    """The whole number that is all of the text; None for everything else, ``max`` and -1 among it."""
    found = _COUNT.fullmatch(text.strip())
    return int(found[0]) if found else None
