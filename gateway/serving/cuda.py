"""The few calls of the CUDA runtime that serving needs, through ctypes, each status checked.

Streams and events of the runtime are the driver's own, so it does not matter whether this is the very
library that ONNX Runtime uses; it is where that one is loaded, to keep a process to one of them.

Rejected: CuPy, PyTorch and cuda-python, of which any is larger than the gateway, for a dozen functions;
an extension module, which would need CUDA's headers where the gateway is built.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SONAMES = ("libcudart.so.13", "libcudart.so.12")
"""What is loaded where ONNX Runtime has loaded none yet, best first."""

_LOADED = re.compile(r"/\S*/libcudart[^/\s]*\.so[.\d]*$", re.MULTILINE)

SUCCESS = 0

HOST_REGISTER_DEFAULT = 0
HOST_REGISTER_READ_ONLY = 8
"""cudaHostRegisterReadOnly: needed for memory that this process has mapped read-only."""

ATTRIBUTE_REGISTERS_READ_ONLY = 113
"""cudaDevAttrHostRegisterReadOnlySupported: 0 on many cards that sit on PCI Express."""

_STREAM_NON_BLOCKING = 1  # it does not wait for the default stream
_EVENT_BLOCKING_SYNC = 1  # who waits for it sleeps
_EVENT_NO_TIMING = 2
_COPY_BY_ADDRESS = 4  # cudaMemcpyDefault: from where to where is told from the addresses

_HANDLE = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (ctypes.c_int,),
    "cudaDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cudaDeviceSynchronize": (),
    "cudaGetLastError": (),
    "cudaMalloc": (ctypes.POINTER(_HANDLE), _SIZE),
    "cudaMemcpyAsync": (_HANDLE, _HANDLE, _SIZE, ctypes.c_int, _HANDLE),
    "cudaMemsetAsync": (_HANDLE, ctypes.c_int, _SIZE, _HANDLE),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cudaStreamSynchronize": (_HANDLE,),
    "cudaStreamWaitEvent": (_HANDLE, _HANDLE, ctypes.c_uint),
    "cudaEventCreateWithFlags": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cudaEventRecord": (_HANDLE, _HANDLE),
    "cudaEventSynchronize": (_HANDLE,),
    "cudaHostRegister": (_HANDLE, _SIZE, ctypes.c_uint),
    "cudaHostUnregister": (_HANDLE,),
}  # each gives a status


class CudaError(Exception):
    """A call of the CUDA runtime failed, or there is no runtime.

    Attributes:
        code: its status; 0 where the runtime itself is missing.
    """

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Gpu:
    """One GPU of this process, with a stream for each direction of copies and one to compute on.

    Addresses, streams and events are plain integers. Nothing is given back but by `unregister`: a
    worker's context ends with its process.

    Args:
        library: the CUDA runtime, as ctypes has it.
        ordinal: of the GPU, counted as CUDA does.

    Raises:
        CudaError: there is no such GPU, or it cannot be used.
    """

    def __init__(self, library: Any, ordinal: int) -> None:
        self._library = library
        self.ordinal = ordinal
        for name, signature in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise CudaError(f"the CUDA runtime has no {name}") from None
            function.argtypes, function.restype = signature, ctypes.c_int
        library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        library.cudaGetErrorString.restype = ctypes.c_char_p
        self._check("cudaSetDevice", ordinal)
        self.copy_in_stream = self._stream()
        self.compute_stream = self._stream()
        self.copy_out_stream = self._stream()

    @classmethod
    def open(cls, ordinal: int) -> Gpu:
        """The GPU, by the runtime that is loaded, else by the first of `SONAMES` that can be.

        Raises:
            CudaError: no runtime can be loaded, or there is no such GPU.
        """
        for name in (*_loaded_libraries(), *SONAMES):
            try:
                library = ctypes.CDLL(name)
            except OSError:
                continue
            return cls(library, ordinal)
        raise CudaError(f"the CUDA runtime cannot be loaded: none of {', '.join(SONAMES)} is there")

    def _check(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != SUCCESS:
            text = self._library.cudaGetErrorString(status) or b"unknown"
            # Some statuses stay for the next call to find, ONNX Runtime's among them.
            self._library.cudaGetLastError()
            raise CudaError(f"{name}: {text.decode(errors='replace')} ({status})", status)

    def _new(self, name: str, *arguments: object) -> int:
        handle = _HANDLE()
        self._check(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def is_lost(self) -> bool:
        """Whether every further call will fail, as after a kernel's illegal access. Waits for the GPU."""
        self._library.cudaGetLastError()
        return bool(self._library.cudaDeviceSynchronize() != SUCCESS)

    def attribute(self, number: int) -> int:
        """An attribute of the GPU, by CUDA's number."""
        value = ctypes.c_int()
        self._check("cudaDeviceGetAttribute", ctypes.byref(value), number, self.ordinal)
        return value.value

    # Memory

    def allocate(self, nbytes: int) -> int:
        """New memory of the GPU; its address."""
        return self._new("cudaMalloc", nbytes)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy between any two of this process's and the GPU's addresses.

        From memory that is not pinned it has been read when this returns; into such memory it has been
        written when this returns.
        """
        self._check("cudaMemcpyAsync", to, source, nbytes, _COPY_BY_ADDRESS, stream)

    def clear(self, at: int, nbytes: int, stream: int) -> None:
        """Queue zeros for memory of the GPU."""
        self._check("cudaMemsetAsync", at, 0, nbytes, stream)

    def register(self, at: int, nbytes: int, flags: int) -> None:
        """Pin memory of this process; all its pages become resident."""
        self._check("cudaHostRegister", at, nbytes, flags)

    def unregister(self, at: int) -> None:
        """The inverse of `register`, by the same address."""
        self._check("cudaHostUnregister", at)

    # Order

    def _stream(self) -> int:
        return self._new("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def event(self) -> int:
        """A new event; waiting for it sleeps."""
        return self._new("cudaEventCreateWithFlags", _EVENT_BLOCKING_SYNC | _EVENT_NO_TIMING)

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all that is queued on the stream so far."""
        self._check("cudaEventRecord", event, stream)

    def wait_in(self, stream: int, event: int) -> None:
        """Let what is queued on the stream from now on wait for the event as it was last recorded."""
        self._check("cudaStreamWaitEvent", stream, event, 0)

    def wait_for(self, event: int) -> None:
        """Sleep until the event has happened. CudaError: what it stands for failed, or earlier work."""
        self._check("cudaEventSynchronize", event)

    def drain(self) -> None:
        """Sleep until nothing is queued on any stream. CudaError: some of it failed."""
        for stream in (self.copy_in_stream, self.compute_stream, self.copy_out_stream):
            self._check("cudaStreamSynchronize", stream)


def _loaded_libraries() -> Iterator[str]:
    """Paths of CUDA runtimes that are mapped into this process."""
    maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    yield from dict.fromkeys(_LOADED.findall(maps))
