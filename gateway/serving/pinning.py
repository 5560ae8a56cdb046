"""Pinned memory: lanes whose pages the GPU reads and writes itself.

Copies from and to pinned memory run beside the caller; others pass through a buffer of the driver's while
the caller waits, which is slower and as correct. So what cannot be pinned is said once, and used as it is.
"""

from __future__ import annotations

import logging

from gateway.serving import cuda
from gateway.serving.attached import AttachedLane

log = logging.getLogger("gateway.worker")


class Pins:
    """What of this process's lanes is pinned.

    Args:
        gpu: the one that copies.
        is_wanted: False: pin nothing.
    """

    def __init__(self, gpu: cuda.Gpu, *, is_wanted: bool = True) -> None:
        self._gpu = gpu
        self._is_wanted = is_wanted
        self._pinned: set[int] = set()
        self._was_said: set[str] = set()

    def pin(self, lane: AttachedLane) -> None:
        """Pin a lane's inputs and outputs, as far as the GPU can."""
        if not self._is_wanted:
            return
        spec = lane.spec
        flags = self._read_only_flags()
        self._register("inputs", lane.inputs_at, spec.slot_count * spec.input_slot_bytes, flags)
        outputs_bytes = spec.slot_count * spec.output_slot_bytes
        self._register("outputs", lane.outputs_at, outputs_bytes, cuda.HOST_REGISTER_DEFAULT)

    def unpin(self, lane: AttachedLane) -> None:
        """Let go of a lane before it is unmapped; nothing may be queued from or to it."""
        for at in (lane.inputs_at, lane.outputs_at):
            if at in self._pinned:
                self._pinned.discard(at)
                self._gpu.unregister(at)

    def _read_only_flags(self) -> int:
        """How memory that is mapped read-only is registered; a GPU that cannot may take it all the same."""
        try:
            can = self._gpu.attribute(cuda.ATTRIBUTE_REGISTERS_READ_ONLY)
        except cuda.CudaError:
            can = 0
        return cuda.HOST_REGISTER_READ_ONLY if can else cuda.HOST_REGISTER_DEFAULT

    def _register(self, what: str, at: int, nbytes: int, flags: int) -> None:
        try:
            self._gpu.register(at, nbytes, flags)
        except cuda.CudaError as error:
            if what not in self._was_said:
                self._was_said.add(what)
                log.warning("%s cannot be pinned, copies take longer: %s", what, error)
            return
        self._pinned.add(at)
