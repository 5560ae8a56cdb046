"""What is believed of what a worker wrote at the head of an output region."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import bytestrings
from gateway.serving import descriptors, geometry
from gateway.tensors import DATATYPES, MAX_RANK, Signature, TensorSpec

FP64, BYTES = DATATYPES["FP64"], DATATYPES["BYTES"]
REGION_BYTES = 4096
AT = 1024


def outputs(*specs: TensorSpec, rows: int = 8) -> Signature:
    return Signature((), specs, rows)


NUMBERS = outputs(TensorSpec("y", FP64, ("n", "length", 2)))
STRINGS = outputs(TensorSpec("s", BYTES, ("n", "length")))
WHOLE = outputs(TensorSpec("y", FP64, None), rows=0)
WHOLE_STRINGS = outputs(TensorSpec("s", BYTES, None), rows=0)
BOTH = outputs(TensorSpec("y", FP64, ("n",)), TensorSpec("s", BYTES, ("n",)))

ALL = (NUMBERS, STRINGS, WHOLE, WHOLE_STRINGS, BOTH)


def region(content: bytes = b"", at: int = AT) -> memoryview:
    made = bytearray(REGION_BYTES)
    made[at : at + len(content)] = content
    return memoryview(made)


def read(described, signature, rows, content=b"", **options):
    made = region(content)
    descriptors.write_descriptors(made, described, **options)
    return descriptors.read_descriptors(made, made, signature, rows)


def test_error_texts_are_cut_and_never_trusted():
    made = memoryview(bytearray(geometry.head_bytes(1)))
    descriptors.write_error(made, "the reason")
    assert descriptors.read_error(made) == "the reason"
    descriptors.write_error(made, "ü" * 1000)
    assert 0 < len(descriptors.read_error(made)) <= geometry.ERROR_BYTES
    made[:4] = b"\xff\xff\xff\xff"
    assert len(descriptors.read_error(made).encode()) <= 3 * geometry.ERROR_BYTES


def test_numbers_round_trip():
    (p,) = read([((2, 5, 2), AT, 160)], NUMBERS, 2)
    assert (p.inner, p.row_bytes, p.offset) == ((5, 2), 80, AT)
    assert p.dims(2) == (2, 5, 2)
    assert p.span(1, 1) == (AT + 80, AT + 160)


def test_rows_without_elements_round_trip():
    (p,) = read([((2, 0, 2), AT, 0)], NUMBERS, 2)
    assert (p.dims(2), p.span(0, 2)) == ((2, 0, 2), (AT, AT))


@pytest.mark.parametrize(
    ("dims", "offset", "nbytes"),
    [
        ((3, 5, 2), AT, 240),  # another number of rows
        ((2, 5, 2), AT, 161),  # bytes that do not fit the dims
        ((2, 5, 2), 4000, 160),  # past the end
        ((2, 5, 2), (1 << 64) - 80, 160),  # a sum beyond 64 bits
        ((2, -5, -2), AT, 160),  # negative dims
        ((2, 1 << 62, 1 << 62), 0, 0),  # a product beyond 64 bits
        ((), AT, 8),  # no batch
    ],
)
def test_a_worker_that_describes_nonsense_is_not_believed(dims, offset, nbytes):
    assert read([(dims, offset, nbytes)], NUMBERS, 2) is None


def test_a_rank_beyond_the_record_is_not_believed():
    made = region()
    descriptors.write_descriptors(made, [((1,) * MAX_RANK, AT, 8)])
    assert descriptors.read_descriptors(made, made, WHOLE, 1) is not None
    made[:4] = (MAX_RANK + 1).to_bytes(4, "little")
    assert descriptors.read_descriptors(made, made, WHOLE, 1) is None


@pytest.mark.parametrize("dims", [(), (3,), (0, 7), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_a_whole_output_has_any_rank_and_no_batch(dims):
    count = 1
    for dim in dims:
        count *= dim
    (p,) = read([(dims, AT, 8 * count)], WHOLE, 1)
    assert (p.has_rows, p.dims(1)) == (False, dims)
    assert p.span(0, 1) == (AT, AT + 8 * count)
    assert read([(dims, AT, 8 * count + 8)], WHOLE, 1) is None


ROWS = [[b"a", b"\0\xff"], [b"", b"longer than the others"], [b"b", b""]]
SERIALISED = [bytestrings.serialise(row) for row in ROWS]
TEXT = b"".join(SERIALISED)


def test_rows_of_strings_are_found():
    (p,) = read([((3, 2), AT, len(TEXT))], STRINGS, 3, TEXT)
    assert p.starts[0] == AT
    made = region(TEXT)
    for i, row in enumerate(ROWS):
        begin, end = p.span(i, 1)
        assert bytestrings.elements(made[begin:end]) == row
    assert p.span(0, 3) == (AT, AT + len(TEXT))


def test_strings_of_a_whole_model_and_rows_without_any():
    (p,) = read([((), AT, 5)], WHOLE_STRINGS, 1, bytestrings.serialise([b"x"]))
    assert (p.dims(1), p.span(0, 1)) == ((), (AT, AT + 5))
    (p,) = read([((4, 0), AT, 0)], STRINGS, 4)
    assert (p.dims(4), p.span(0, 4)) == ((4, 0), (AT, AT))


@pytest.mark.parametrize(
    ("dims", "nbytes"),
    [
        ((3, 2), len(TEXT) - 1),  # truncated within the last one
        ((3, 2), len(TEXT) + 1),  # a byte behind
        ((3, 1), len(TEXT)),  # more strings than it says
        ((3, 3), len(TEXT)),  # fewer
        ((3, 1 << 60), len(TEXT)),  # a count that nobody could look for
        ((3, 0), len(TEXT)),
        ((2, 3), len(TEXT)),  # another number of rows
    ],
)
def test_strings_that_are_not_what_was_described_are_not_believed(dims, nbytes):
    assert read([(dims, AT, nbytes)], STRINGS, 3, TEXT) is None


def test_a_length_that_leads_out_of_the_output_is_not_believed():
    lie = (REGION_BYTES).to_bytes(4, "little") + b"abcd"
    assert read([((1, 1), AT, 8)], STRINGS, 1, lie) is None
    # Within the region, but beyond the output: its neighbour's bytes.
    lie = (5).to_bytes(4, "little") + b"abcdefgh"
    assert read([((1, 1), AT, 8)], STRINGS, 1, lie) is None


def test_one_bad_output_spoils_the_description():
    good = [((2,), AT, 16), ((2,), 2048, 10)]
    made = region(bytestrings.serialise([b"a", b"b"]), 2048)
    descriptors.write_descriptors(made, good)
    assert len(descriptors.read_descriptors(made, made, BOTH, 2)) == 2
    descriptors.write_descriptors(made, [good[0], ((2,), 2048, 9)])
    assert descriptors.read_descriptors(made, made, BOTH, 2) is None


def test_a_spill_is_told_from_a_slot_and_bounds_the_offsets():
    head, spill = region(), memoryview(bytearray(8192))
    descriptors.write_descriptors(head, [((2, 5, 2), 8000, 160)], is_spilled=True)
    assert descriptors.is_spilled(head)
    assert descriptors.read_descriptors(head, head, NUMBERS, 2) is None
    (p,) = descriptors.read_descriptors(head, spill, NUMBERS, 2)
    assert p.span(0, 2) == (8000, 8160)
    assert descriptors.read_descriptors(head, spill[:8159], NUMBERS, 2) is None
    descriptors.write_descriptors(head, [((2, 5, 2), AT, 160)])
    assert not descriptors.is_spilled(head)


SMALL = st.integers(-1, 40)
FIELDS = st.one_of(SMALL, st.integers(-(1 << 63), (1 << 63) - 1))


@given(
    signature=st.sampled_from(ALL),
    rows=st.integers(1, 64),
    noise=st.binary(max_size=300),
    text=st.binary(max_size=200),
)
def test_noise_is_never_an_error_and_never_leads_out_of_the_region(signature, rows, noise, text):
    made = region(text, 400)
    made[: len(noise)] = noise
    check(made, signature, rows if signature.is_batched else 1)


@given(
    signature=st.sampled_from(ALL),
    rows=st.integers(1, 4),
    rank=st.integers(0, 9),
    dims=st.lists(FIELDS, min_size=MAX_RANK, max_size=MAX_RANK),
    offset=st.integers(0, REGION_BYTES + 9),
    nbytes=st.integers(0, 400),
    text=st.binary(max_size=200),
)
def test_likely_noise_neither(signature, rows, rank, dims, offset, nbytes, text):
    made = region(text)
    for i in range(len(signature.outputs)):
        geometry.DESCRIPTOR.pack_into(
            made, i * geometry.DESCRIPTOR.size, rank, 0, *dims, offset, nbytes
        )
    check(made, signature, rows if signature.is_batched else 1)


def check(made, signature, rows):
    descriptors.read_error(made)
    descriptors.is_spilled(made)
    for p in descriptors.read_descriptors(made, made, signature, rows) or ():
        end = 0
        for i in range(rows if p.has_rows else 1):
            begin, end = p.span(i, 1)
            assert 0 <= begin <= end <= len(made)
            if p.spec.datatype.numpy is None:
                bytestrings.elements(made[begin:end])
        assert p.span(0, rows if p.has_rows else 1)[1] == end
