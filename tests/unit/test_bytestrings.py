import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import bytestrings

ELEMENTS = st.lists(st.binary(max_size=20), max_size=12)


@given(ELEMENTS)
def test_what_is_serialised_is_read_back(elements):
    data = memoryview(bytestrings.serialise(elements))
    assert len(data) == sum(bytestrings.PREFIX_BYTES + len(e) for e in elements)
    assert bytestrings.elements(data) == elements
    assert bytestrings.skip(data, len(elements)) == len(data)


def test_the_form():
    assert bytestrings.serialise([b"a\0", b""]) == b"\x02\0\0\0a\0\0\0\0\0"
    assert bytestrings.serialise([]) == b""


@given(ELEMENTS, st.data())
def test_skipping_ends_between_elements(elements, data):
    before = data.draw(st.integers(0, len(elements)))
    count = data.draw(st.integers(0, len(elements) - before))
    raw = memoryview(bytestrings.serialise(elements))
    start = len(bytestrings.serialise(elements[:before]))
    end = bytestrings.skip(raw, count, start)
    assert bytestrings.elements(raw[start:end]) == elements[before : before + count]


@given(ELEMENTS.filter(bool), st.data())
def test_data_that_end_early(elements, data):
    whole = bytestrings.serialise(elements)
    bounds = {len(bytestrings.serialise(elements[:n])) for n in range(len(elements) + 1)}
    length = data.draw(st.integers(0, len(whole)).filter(lambda n: n not in bounds))
    cut = memoryview(whole[:length])
    with pytest.raises(ValueError, match="the data end within"):
        bytestrings.elements(cut)
    with pytest.raises(ValueError, match="the data end within"):
        bytestrings.skip(cut, len(elements))


def test_lengths_that_promise_too_much():
    for data in (b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"ab"):
        with pytest.raises(ValueError, match="within a string"):
            bytestrings.elements(memoryview(data))
        for count in (1, 2):
            with pytest.raises(ValueError, match="within a string"):
                bytestrings.skip(memoryview(data), count)


def test_skipping_past_the_end():
    for count in range(3):
        with pytest.raises(ValueError, match=f"the data end after {count}$"):
            bytestrings.skip(memoryview(bytestrings.serialise([b"ab"] * count)), 3)
    with pytest.raises(ValueError, match="within a length"):
        bytestrings.skip(memoryview(bytestrings.serialise([b"ab"]) + b"\0"), 2)


def test_elements_are_copies():
    buffer = bytearray(bytestrings.serialise([b"ab"]))
    with memoryview(buffer) as data:
        (element,) = bytestrings.elements(data)
    buffer.clear()  # BufferError while anything still shows it
    assert element == b"ab"


def test_a_string_that_no_length_can_name():
    class Huge(bytes):
        def __len__(self):
            return 1 << 32

    with pytest.raises(ValueError, match="4 GiB"):
        bytestrings.serialise([Huge()])
