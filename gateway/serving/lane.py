"""A front end's side of a lane: shared memory, slots, and the requests whose rows are in them.

The lane places requests, drops them, answers completed slots and finds what a dead worker held. What
to do about a slot that failed is the dispatcher's decision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from mmap import mmap
from typing import NamedTuple

from gateway import bytestrings
from gateway._kernels import pack, ring
from gateway._kernels.slots import SlotMemory
from gateway.protocols.call import InferCall, InputTensor, OutputTensor
from gateway.serving import descriptors, geometry, memory
from gateway.serving.packing import materialise, raw, write_tensor
from gateway.serving.padding import Padder
from gateway.serving.request import Slot, State, Submission
from gateway.tensors import Signature, element_count


class Outputs(NamedTuple):
    """A DONE slot's outputs: where each lies in ``data``, which views shared memory."""

    placements: tuple[geometry.Placement, ...]
    data: memoryview


class Lane:
    """One lane. Owns its memfds, mappings and bell; `close` gives them back.

    Args:
        number: unique among this front end's lanes of the version.
        spec: its geometry.
        signature: the model's.
        padder: the model's.
        board: mapping of the version's board.

    Raises:
        OSError: no memory, address space or descriptors for it; nothing is left behind.
    """

    def __init__(
        self,
        number: int,
        spec: geometry.LaneSpec,
        signature: Signature,
        padder: Padder,
        board: mmap,
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
        self.memory = SlotMemory(
            self.producer,
            self._inputs,
            self._outputs,
            spec.input_slot_bytes,
            spec.output_slot_bytes,
        )
        self._padder = padder
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

    def open(self, request: Submission) -> Slot:
        """Put the request into a free slot. InvalidRequest: its data do not decode."""
        slot, key = self._free[-1], request.key
        slot.key = key
        request.write(self, slot)
        self.producer.open(
            slot.index,
            request.rows,
            request.arrived_ns,
            key.id,
            key.shape.capacity,
            key.dims,
            request.due_ns,
        )
        self._free.pop()
        self._enter(slot, request)
        return slot

    def append(self, slot: Slot, request: Submission) -> bool:
        """Put the request behind the rows of an open slot of its shape, in which it fits.

        Returns False when a worker had sealed the slot: the request is then not placed.
        InvalidRequest: its data do not decode; the slot is as it was.
        """
        if self.producer.phase(slot.index) != ring.OPEN:
            return False
        request.write(self, slot)
        if not self.producer.append(slot.index, request.rows, request.due_ns):
            return False
        self._enter(slot, request)
        return True

    def drop(self, slot: Slot, request: Submission) -> bool:
        """Take a placed request out of its slot; False when a worker was first and it will run."""
        if not self.is_unsealed(slot) or not self.producer.edit(slot.index):
            return False
        tail = slot.rows - request.start - request.rows
        if tail:
            base = slot.index * self.spec.input_slot_bytes
            for p in slot.key.shape.inputs:  # each has rows: the others take no mates
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

    def is_spilled(self, slot: Slot) -> bool:
        """Whether a DONE slot's outputs did not fit it, and lie in a memfd of their own."""
        is_described = slot.key.shape.outputs is None
        return is_described and descriptors.is_spilled(self._output_region(slot))

    def outputs(self, slot: Slot, spill: memoryview | None = None) -> Outputs | None:
        """Where a DONE slot's outputs lie; None where its worker described nonsense.

        Args:
            slot: DONE.
            spill: what they lie in if not in the slot.
        """
        region = self._output_region(slot)
        if slot.key.shape.outputs is not None:
            return Outputs(slot.key.shape.outputs, region)
        data = region if spill is None else spill
        placements = descriptors.read_descriptors(region, data, self.signature, slot.rows)
        return None if placements is None else Outputs(placements, data)

    def views(self, outputs: Outputs, request: Submission) -> list[OutputTensor]:
        """The request's own rows of a slot's outputs: views, or copies where padding is cut off."""
        tensors = []
        for p in outputs.placements:
            begin, end = p.span(request.start, request.rows)
            data, dims = outputs.data[begin:end], p.dims(request.rows)
            if request.lengths and p.spec.datatype.numpy is not None:
                data, dims = self._padder.cut(data, dims, p, request.lengths)
            tensors.append(OutputTensor(p.spec.name, p.spec.datatype, dims, data))
        return tensors

    def error(self, slot: Slot) -> str:
        """What the worker of a FAILED slot said."""
        return descriptors.read_error(self._output_region(slot))

    def copy_out(self, slot: Slot, request: Submission) -> None:
        """Give a placed request its data back as private bytes, so that it can be placed again.

        They are as they were written: padded ones stay so.
        """
        base = slot.index * self.spec.input_slot_bytes
        copies = []
        with memoryview(self._inputs)[base : base + self.spec.input_slot_bytes] as inputs:
            for p in slot.key.shape.inputs:
                begin, end = p.span(request.start, request.rows if p.has_rows else 1)
                data = bytes(inputs[begin:end])
                if p.spec.datatype.numpy is None:
                    rows = geometry.STRINGS.iter_unpack(data)
                    data = b"".join(bytes(inputs[at : at + size]) for at, size in rows)
                dims = p.dims(request.rows)
                copies.append(InputTensor(p.spec.name, p.spec.datatype, dims, memoryview(data)))
        request.take_back(copies)
        request.slot = None

    def release(self, slot: Slot) -> None:
        """Free a slot that is done with: after DONE, FAILED, CORRUPT or its owner's death."""
        self.producer.free(slot.index)
        self._give_back(slot)

    def close(self) -> None:
        """Give back memory and descriptors. Requests still placed must have been failed before."""
        self.memory.close()
        self.producer.close()
        for mapping in (self._control, self._inputs, self._outputs):
            with suppress(BufferError):  # a view lives on in a traceback: unmapped with it
                mapping.close()
        for fd in self.fds:
            os.close(fd)

    def _output_region(self, slot: Slot) -> memoryview:
        start = slot.index * self.spec.output_slot_bytes
        return memoryview(self._outputs)[start : start + self.spec.output_slot_bytes]

    def write_call(self, slot: Slot, call: InferCall, lengths: Mapping[str, int]) -> None:
        """Write a call's rows behind those of the slot, where no worker looks yet.

        Args:
            slot: free or open, of the call's shape.
            call: what to write.
            lengths: what padding changed, by symbol.
        """
        base = slot.index * self.spec.input_slot_bytes
        tensors = {tensor.name: tensor for tensor in call.inputs}
        strings_at = slot.key.shape.input_bytes + slot.string_bytes
        for p in slot.key.shape.inputs:
            tensor = tensors[p.spec.name]
            at = base + p.offset + slot.rows * p.row_bytes
            if p.spec.datatype.numpy is None:
                strings_at = self._write_strings(at, base, strings_at, tensor, p)
            elif tensor.shape == p.dims(call.rows):
                write_tensor(self._inputs, at, tensor)
            else:
                materialise(tensor)
                self._padder.write(self._inputs, at, tensor, p)

    def _write_strings(
        self, at: int, base: int, strings_at: int, tensor: InputTensor, p: geometry.Placement
    ) -> int:
        """Write strings into the slot's heap and the records of their rows; where the heap goes on."""
        data = raw(tensor)
        pack.copy_in(self._inputs, base + strings_at, data)
        begin = 0
        for row in range(tensor.shape[0] if p.has_rows else 1):
            end = bytestrings.skip(data, element_count(p.inner), begin)
            record = at + row * geometry.STRINGS.size
            geometry.STRINGS.pack_into(self._inputs, record, strings_at + begin, end - begin)
            begin = end
        return strings_at + len(data)

    def _enter(self, slot: Slot, request: Submission) -> None:
        request.slot = slot
        request.start = slot.rows
        request.move(State.PLACED)
        slot.requests.append(request)
        slot.rows += request.rows
        if slot.key.string_bytes:
            slot.string_bytes += request.string_bytes

    def _give_back(self, slot: Slot) -> None:
        slot.clear()
        self._free.append(slot)
