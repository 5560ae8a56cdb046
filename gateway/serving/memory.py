"""Anonymous shared memory: memfds that have no name, so nothing is left behind in /dev/shm.

Rejected: ``multiprocessing.shared_memory``, whose resource tracker unlinks other processes' segments
on Python 3.11 and 3.12, and whose names are visible to every process of the user.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1: existing mappings stay writable, no new ones can be (not in ``fcntl`` before 3.13)."""

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(purpose: str, nbytes: int) -> int:
    """A new memfd of a fixed size, zeroed, its pages taken only when touched.

    Args:
        purpose: shown in /proc/PID/fd for whoever debugs; not a name that can be opened.
        nbytes: its size; sealed, so that no peer can make a mapping fault by shrinking it.
    """
    fd = os.memfd_create(f"gateway-{purpose}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_writable(fd: int, nbytes: int) -> mmap.mmap:
    """Map a memfd for reading and writing."""
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def map_read_only(fd: int, nbytes: int) -> mmap.mmap:
    """Map a memfd for reading."""
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def forbid_new_writers(fd: int) -> None:
    """Let nobody else map the memfd writable; the caller's own mapping stays as it is."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)


def address(mapping: mmap.mmap) -> int:
    """Where a mapping begins in this process; valid until it is closed."""
    return int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
