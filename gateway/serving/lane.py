"""A front end's side of a lane: shared memory, slots, and the requests whose rows are in them.

The lane places requests, drops them, answers completed slots and finds what a dead worker held. What
to do about a slot that failed is the dispatcher's decision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from mmap import mmap

from gateway._kernels import decode, pack, ring
from gateway.errors import InvalidRequest
from gateway.protocols.call import InferCall, InputTensor, OutputTensor
from gateway.serving import geometry, memory
from gateway.serving.request import Request, Slot, State
from gateway.tensors import Signature


class Lane:
    """One lane. Owns its memfds, mappings and bell; `close` gives them back.

    Args:
        number: unique among this front end's lanes of the version.
        spec: its geometry.
        signature: the model's.
        board: mapping of the version's board.

    Raises:
        OSError: no memory, address space or descriptors for it; nothing is left behind.
    """

    def __init__(
        self, number: int, spec: geometry.LaneSpec, signature: Signature, board: mmap
    ) -> None:
        self.number = number
        self.spec = spec
        self.signature = signature
        control_bytes = ring.control_bytes(spec.slot_count, spec.dims_per_slot)
        input_bytes = spec.slot_count * spec.input_slot_bytes
        output_bytes = spec.slot_count * spec.output_slot_bytes
        with ExitStack() as undo:
            self._control_fd = memory.create("control", control_bytes)
            undo.callback(os.close, self._control_fd)
            self._inputs_fd = memory.create("inputs", input_bytes)
            undo.callback(os.close, self._inputs_fd)
            self._outputs_fd = memory.create("outputs", output_bytes)
            undo.callback(os.close, self._outputs_fd)
            self._control = memory.map_writable(self._control_fd, control_bytes)
            self._inputs = memory.map_writable(self._inputs_fd, input_bytes)
            self._outputs = memory.map_read_only(self._outputs_fd, output_bytes)
            memory.forbid_new_writers(self._inputs_fd)
            self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.pop_all()  # all there: from now on `close` gives them back
        self.producer = ring.Producer(self._control, spec.slot_count, spec.dims_per_slot, board)
        self.slots = [Slot(number, i) for i in range(spec.slot_count)]
        # Last-in first-out: a small working set stays in cache, and in the workers' binding caches.
        self._free = list(reversed(self.slots))

    @property
    def fds(self) -> tuple[int, int, int, int]:
        """What a worker needs: control, inputs, outputs, bell."""
        return self._control_fd, self._inputs_fd, self._outputs_fd, self.bell

    def is_unsealed(self, slot: Slot) -> bool:
        """Whether no worker has taken the slot yet."""
        return self.producer.phase(slot.index) in (ring.OPEN, ring.RETRY)

    def has_free_slot(self) -> bool:
        """Whether `open` can succeed."""
        return bool(self._free)

    def open(self, request: Request) -> Slot:
        """Put the request into a free slot. InvalidRequest: its data do not decode."""
        slot, key = self._free[-1], request.key
        self._write(slot.index, 0, request.call, key.shape)
        self.producer.open(
            slot.index,
            request.rows,
            request.arrived_ns,
            key.id,
            key.shape.capacity,
            tuple(dim for inner in key.shape.dims for dim in inner),
        )
        self._free.pop()
        slot.key = key
        self._enter(slot, request)
        return slot

    def append(self, slot: Slot, request: Request) -> bool:
        """Put the request behind the rows of an open slot of its shape, in which it fits.

        Returns False when a worker had sealed the slot: the request is then not placed.
        InvalidRequest: its data do not decode; the slot is as it was.
        """
        if self.producer.phase(slot.index) != ring.OPEN:
            return False
        self._write(slot.index, slot.rows, request.call, slot.key.shape)
        if not self.producer.append(slot.index, request.rows):
            return False
        self._enter(slot, request)
        return True

    def drop(self, slot: Slot, request: Request) -> bool:
        """Take a placed request out of its slot; False when a worker was first and it will run."""
        if not self.is_unsealed(slot) or not self.producer.edit(slot.index):
            return False
        tail = slot.rows - request.start - request.rows
        if tail:
            base = slot.index * self.spec.input_slot_bytes
            for p in slot.key.shape.inputs:
                at = base + p.offset + request.start * p.row_bytes
                pack.move(self._inputs, at, at + request.rows * p.row_bytes, tail * p.row_bytes)
        slot.requests.remove(request)
        slot.rows -= request.rows
        for mate in slot.requests:
            if mate.start > request.start:
                mate.start -= request.rows
        request.slot = None
        self.producer.edited(slot.index, slot.rows)
        if slot.rows == 0:
            self._give_back(slot)
        return True

    def collect(self) -> Iterator[tuple[Slot, int]]:
        """Slots that workers reported, with their phase: DONE, FAILED or CORRUPT."""
        for index in self.producer.collect():
            slot = self.slots[index]
            phase = self.producer.phase(index)
            if slot.requests and phase in (ring.DONE, ring.FAILED, ring.CORRUPT):
                yield slot, phase

    def held_by(self, incarnation: int) -> Iterator[tuple[Slot, int]]:
        """Slots that this worker, whose death is confirmed, had sealed, with their phase.

        CORRUPT ones are among them whoever's they are: it may have written another owner's number.
        """
        for slot in self.slots:
            if not slot.requests:
                continue
            phase = self.producer.phase(slot.index)
            is_its_own = self.producer.owner(slot.index) == incarnation
            if phase == ring.CORRUPT or (
                is_its_own and phase in (ring.SEALED, ring.DONE, ring.FAILED)
            ):
                yield slot, phase

    def outputs(self, slot: Slot) -> list[geometry.Placement] | None:
        """Where a DONE slot's outputs lie; None where its worker described nonsense."""
        if slot.key.shape.outputs is not None:
            return list(slot.key.shape.outputs)
        return geometry.read_descriptors(self._output_region(slot), self.signature, slot.rows)

    def views(
        self, slot: Slot, placements: list[geometry.Placement], request: Request
    ) -> list[OutputTensor]:
        """The request's own rows of a DONE slot's outputs, as views of shared memory."""
        region = self._output_region(slot)
        tensors = []
        for p in placements:
            at = p.offset + request.start * p.row_bytes
            data = region[at : at + request.rows * p.row_bytes]
            tensors.append(
                OutputTensor(p.spec.name, p.spec.datatype, (request.rows, *p.inner), data)
            )
        return tensors

    def error(self, slot: Slot) -> str:
        """What the worker of a FAILED slot said."""
        return geometry.read_error(self._output_region(slot))

    def copy_out(self, slot: Slot, request: Request) -> None:
        """Give a placed request its data back as private bytes, so that it can be placed again."""
        base = slot.index * self.spec.input_slot_bytes
        copies = []
        with memoryview(self._inputs) as inputs:
            for p in slot.key.shape.inputs:
                at = base + p.offset + request.start * p.row_bytes
                data = bytes(inputs[at : at + request.rows * p.row_bytes])
                dims = (request.rows, *p.inner)
                copies.append(InputTensor(p.spec.name, p.spec.datatype, dims, memoryview(data)))
        request.call.inputs = copies
        request.slot = None

    def release(self, slot: Slot) -> None:
        """Free a slot that is done with: after DONE, FAILED, CORRUPT or its owner's death."""
        self.producer.free(slot.index)
        self._give_back(slot)

    def close(self) -> None:
        """Give back memory and descriptors. Requests still placed must have been failed before."""
        self.producer.close()
        for mapping in (self._control, self._inputs, self._outputs):
            with suppress(BufferError):  # a view lives on in a traceback: unmapped with it
                mapping.close()
        for fd in self.fds:
            os.close(fd)

    def _output_region(self, slot: Slot) -> memoryview:
        start = slot.index * self.spec.output_slot_bytes
        return memoryview(self._outputs)[start : start + self.spec.output_slot_bytes]

    def _write(self, index: int, row: int, call: InferCall, shape: geometry.Shape) -> None:
        """Write a call's rows where no worker looks yet."""
        base = index * self.spec.input_slot_bytes
        tensors = {tensor.name: tensor for tensor in call.inputs}
        for p in shape.inputs:
            write_tensor(self._inputs, base + p.offset + row * p.row_bytes, tensors[p.spec.name])

    def _enter(self, slot: Slot, request: Request) -> None:
        request.slot = slot
        request.start = slot.rows
        request.move(State.PLACED)
        slot.requests.append(request)
        slot.rows += request.rows

    def _give_back(self, slot: Slot) -> None:
        slot.clear()
        self._free.append(slot)


def write_tensor(buffer: mmap | bytearray, at: int, tensor: InputTensor) -> None:
    """Write a tensor's elements row-major at a byte offset.

    Raises:
        InvalidRequest: a list that does not decode; names the input, quotes no value.
    """
    if isinstance(tensor.data, memoryview):
        pack.copy_in(buffer, at, tensor.data)
        return
    try:
        decode.fill(buffer, at, tensor.datatype.index, tensor.shape, tensor.data, tensor.strict)
    except ValueError as error:
        raise InvalidRequest(f"input '{tensor.name}': {error}") from None


def materialise(call: InferCall) -> None:
    """Decode a call's lists into private bytes: a request that has to queue is validated first."""
    for tensor in call.inputs:
        if not isinstance(tensor.data, memoryview):
            nbytes = tensor.datatype.itemsize
            for dim in tensor.shape:
                nbytes *= dim
            private = bytearray(nbytes)
            write_tensor(private, 0, tensor)
            tensor.data = memoryview(private)
