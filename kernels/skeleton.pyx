"""Divides a request's body into its skeleton and its numbers, and reads the numbers into a tensor.

The requests of one client differ in their numbers, and in little else. The skeleton of a body is
what is left when its arrays of numbers, its raw tensors and its id are cut out. Who remembers what
the general parser made of a body may take it for every body of the same skeleton, and has only the
spans left to read.

Sound is that for this reason. What stands for a span in a skeleton, MARK or ID_MARK, can stand
nowhere else in one: bytes below 0x20 that are no whitespace are refused everywhere in JSON, and
msgpack has no use for 0xC1. (A msgpack payload needs no mark: its header, which stays, tells that
it is cut.) So a skeleton tells where its spans were, and all the rest of the body. In a body that
the general parser took, a span was one whole value; put another array of numbers in its place, and
the body is as well formed, means the same, and differs in those numbers alone. Two things make
that true: dims are no such numbers, so an array under the key "shape" is never cut; and a key with
an escape in it, which might spell "shape" or "id" in another way, is refused.

What this does not tell is which tensor a span belongs to, if any: a key may be given twice, and a
field may be one that nobody reads. Who remembers a skeleton finds out, for instance by parsing it
with a different number in the place of each mark.

Nothing here is an error. A body that is refused, by -1, goes the general way, which finds the
words if it is malformed.

Rejected: a full check of JSON's grammar, which the general parser has made of the first body of a
skeleton, and which holds for the others.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.math cimport isinf
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "numbers.h":
    enum:
        GW_MIN_POWER, GW_MAX_POWER
    uint64_t[651][2] gw_powers_of_five
    ctypedef void* locale_t
    locale_t gw_c_locale
    ctypedef struct gw_number:
        uint64_t mantissa
        bint negative
        bint integer
        bint exact
    const char* gw_read_number(const char* at, const char* end, gw_number* number) nogil
    double gw_to_double(const gw_number* number) nogil
    enum:
        GW_REFUSED, GW_REAL
    ctypedef struct gw_element:
        int kind
        int itemsize
        uint64_t highest
        uint64_t lowest
    const gw_element[14] GW_ELEMENTS

cdef extern from "<locale.h>":
    int LC_ALL_MASK
    locale_t newlocale(int mask, const char* name, locale_t base)

cdef extern from "json_blocks.h":
    ctypedef struct gw_block:
        uint64_t open
        uint64_t close
        uint64_t comma
        uint64_t foreign
    void gw_classify(const char* text, Py_ssize_t n, gw_block* block) nogil
    int gw_lowest(uint64_t bits) nogil
    int gw_count(uint64_t bits) nogil

cdef enum:
    DATATYPES = 14
    MARK = 0x01  # in the place of an array of numbers in JSON
    ID_MARK = 0x02  # in the place of the inside of an id in JSON
    MSGPACK_ID_MARK = 0xC1  # in the place of an id and its header in msgpack
    MAX_ID_BYTES = 256  # longest id that is cut
    MAX_DEPTH = 32  # levels of containers in a skeleton; bounds Levels and the rescans of brackets
    MAX_NESTING = 100  # levels of a tensor's lists, as the decode kernel takes
    MAX_RANK = 8  # as in gateway/tensors.py; bounds the counts of parse_numbers

cdef enum:
    # What is odd in a string.
    ESCAPED = 1
    NOT_PRINTABLE_ASCII = 2

cdef enum:
    # The keys that matter; no key is NO_KEY.
    NO_KEY
    OTHER_KEY
    SHAPE_KEY
    ID_KEY
    DATA_KEY


cdef struct Cuts:
    # A body on its way to a skeleton and spans.
    const char* text
    Py_ssize_t n
    Py_ssize_t done  # up to here the text is in the skeleton or in a span
    char* skeleton
    Py_ssize_t used
    Py_ssize_t room
    gw_span* spans
    int count
    int ids


# -- JSON --------------------------------------------------------------------------------------------


cdef int split_json(
    const char* text, Py_ssize_t n, char* skeleton, Py_ssize_t room, Py_ssize_t* skeleton_len,
    gw_span* spans, int* span_count,
) noexcept nogil:
    """Divides a JSON body.

    Cut are the largest arrays that hold numbers and arrays of such alone, and at least one digit,
    and the inside of a string under the key "id" of the outermost object. Of an array that is cut,
    only that its brackets match is known, and that no strings, objects or words are in it; it is for
    `parse_numbers` to find out that the rest is numbers. All else is kept, byte for byte.

    Args:
        text, n: the body and its bytes.
        skeleton, room: where the skeleton goes and how many bytes it may take.
        skeleton_len: how many it took.
        spans: room for MAX_SPANS, in the order of the body.
        span_count: how many there are.

    Returns:
        0, or -1 for a body that has to go the general way; the results are then undefined.
    """
    cdef Cuts cuts = Cuts(text, n, 0, skeleton, 0, room, spans, 0, 0)
    cdef Py_ssize_t at = 0
    cdef int depth = 0
    cdef char c
    while at < n:
        if at - cuts.done > room:
            return -1
        c = text[at]
        if c == c'"':
            at = split_string(&cuts, at, depth)
        elif c == c'[':
            at = split_array(&cuts, at, &depth)
        else:
            if c == c'{':
                depth += 1
            elif c == c'}' or c == c']':
                depth -= 1
            elif is_control(c):
                return -1
            at += 1
        if at < 0 or depth < 0 or depth > MAX_DEPTH:
            return -1
    if depth != 0 or not keep(&cuts, n):
        return -1
    skeleton_len[0] = cuts.used
    span_count[0] = cuts.count
    return 0


cdef inline Py_ssize_t split_string(Cuts* cuts, Py_ssize_t at, int depth) noexcept nogil:
    """Handles a string and, if it is a key, what its value needs. Returns where to go on, or -1."""
    cdef int oddities, key
    cdef Py_ssize_t value
    # What is kept may not be longer than the skeleton.
    cdef Py_ssize_t end = string_end(cuts.text, at, min(cuts.n, at + cuts.room + 1), &oddities)
    if end < 0:
        return -1
    value = skip_space(cuts.text, end, cuts.n)
    if value == cuts.n or cuts.text[value] != c':':
        return end
    if oddities & ESCAPED:
        return -1
    key = which_key(cuts.text + at + 1, end - at - 2)
    value = skip_space(cuts.text, value + 1, cuts.n)
    if key == SHAPE_KEY and value < cuts.n and cuts.text[value] == c'[':
        return shape_end(cuts, value)
    if key != ID_KEY or depth != 1:
        return value
    # A second id would take the place of the first.
    if cuts.ids or value == cuts.n or cuts.text[value] != c'"':
        return -1
    end = string_end(cuts.text, value, min(cuts.n, value + MAX_ID_BYTES + 2), &oddities)
    if end < 0 or oddities:
        return -1
    if not cut(cuts, SPAN_ID, value + 1, end - 1, 0, ID_MARK):
        return -1
    return end


cdef inline Py_ssize_t split_array(Cuts* cuts, Py_ssize_t at, int* depth) noexcept nogil:
    """Cuts an array of numbers or enters another. Returns where to go on, or -1."""
    cdef Py_ssize_t stop, commas
    cdef bint closed = array_end(cuts.text, at, cuts.n, &stop, &commas)
    if not has_digit(cuts.text + at, cuts.text + stop):
        # All of it will be kept; no longer scan than what can be is repeated by the arrays in it.
        if stop - at > cuts.room:
            return -1
        depth[0] += 1
        return at + 1
    # Numbers beside something else are not worth a place in anyone's memory.
    if not closed or not cut(cuts, SPAN_NUMBERS, at, stop, commas + 1, MARK):
        return -1
    return stop


cdef Py_ssize_t string_end(
    const char* text, Py_ssize_t at, Py_ssize_t stop, int* oddities
) noexcept nogil:
    """One past the closing quote of the string that opens at `at`, and what is odd in it.

    -1 where it has a control byte or does not end before `stop`.
    """
    cdef uint8_t c
    oddities[0] = 0
    at += 1
    while at < stop:
        c = <uint8_t>text[at]
        if c == c'"':
            return at + 1
        if c < 0x20:
            return -1
        if c == c'\\':
            oddities[0] |= ESCAPED
            at += 1
            if at == stop or <uint8_t>text[at] < 0x20:
                return -1
        elif c > 0x7E:
            oddities[0] |= NOT_PRINTABLE_ASCII
        at += 1
    return -1


cdef Py_ssize_t shape_end(Cuts* cuts, Py_ssize_t at) noexcept nogil:
    """One past the array of dims that opens at `at`; -1 where it holds what no dims do."""
    cdef Py_ssize_t stop = min(cuts.n, at + cuts.room + 1)
    cdef char c
    at += 1
    while at < stop:
        c = cuts.text[at]
        if c == c']':
            return at + 1
        if c == c'[' or c == c'{' or c == c'}' or c == c'"' or is_control(c):
            return -1
        at += 1
    return -1


cdef bint array_end(
    const char* text, Py_ssize_t at, Py_ssize_t n, Py_ssize_t* stop, Py_ssize_t* commas
) noexcept nogil:
    """Whether the bracket at `at` closes before anything comes that arrays of numbers do not have.

    `stop` is one past the closing bracket, or where that other byte or the text's end is.
    """
    cdef gw_block block
    cdef uint64_t brackets, bit
    cdef Py_ssize_t depth = 0
    commas[0] = 0
    while at < n:
        gw_classify(text + at, n - at, &block)
        # Below the first foreign byte, if there is one.
        brackets = (block.open | block.close) & (block.foreign - 1) & ~block.foreign
        while brackets:
            bit = brackets & (0 - brackets)
            depth += 1 if block.open & bit else -1
            if depth == 0:
                commas[0] += gw_count(block.comma & (bit - 1))
                stop[0] = at + gw_lowest(bit) + 1
                return True
            brackets ^= bit
        if block.foreign:
            stop[0] = at + gw_lowest(block.foreign)
            return False
        commas[0] += gw_count(block.comma)
        at += 64
    stop[0] = n
    return False


cdef inline bint has_digit(const char* at, const char* end) noexcept nogil:
    """Whether there is a digit in the bytes from `at` to `end`."""
    while at < end:
        if c'0' <= at[0] <= c'9':
            return True
        at += 1
    return False


cdef inline Py_ssize_t skip_space(const char* text, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
    """Where the whitespace that begins at `at`, if any, ends."""
    while at < n and is_space(text[at]):
        at += 1
    return at


cdef inline bint is_space(char c) noexcept nogil:
    """Whether a byte is whitespace in JSON."""
    return c == c' ' or c == c'\n' or c == c'\r' or c == c'\t'


cdef inline bint is_control(char c) noexcept nogil:
    """Whether a byte is a control character that JSON does not have."""
    return <uint8_t>c < 0x20 and not is_space(c)


cdef inline int which_key(const char* text, Py_ssize_t n) noexcept nogil:
    """What a key without escapes is called."""
    if n == 2 and memcmp(text, b"id", 2) == 0:
        return ID_KEY
    if n == 4 and memcmp(text, b"data", 4) == 0:
        return DATA_KEY
    if n == 5 and memcmp(text, b"shape", 5) == 0:
        return SHAPE_KEY
    return OTHER_KEY


cdef inline bint keep(Cuts* cuts, Py_ssize_t end) noexcept nogil:
    """Copies the text up to `end` to the skeleton; False if there is no room."""
    cdef Py_ssize_t n = end - cuts.done
    if n > cuts.room - cuts.used:
        return False
    memcpy(cuts.skeleton + cuts.used, cuts.text + cuts.done, n)
    cuts.used += n
    cuts.done = end
    return True


cdef inline bint cut(
    Cuts* cuts, int kind, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t count, int mark
) noexcept nogil:
    """Keeps what lies before a span and puts a mark, unless 0, in its place; False: no room."""
    if cuts.count == MAX_SPANS or not keep(cuts, begin):
        return False
    if mark:
        if cuts.used == cuts.room:
            return False
        cuts.skeleton[cuts.used] = <char>mark
        cuts.used += 1
    cuts.done = end
    cuts.spans[cuts.count] = gw_span(begin, end, count, kind)
    cuts.count += 1
    cuts.ids += kind == SPAN_ID
    return True


# -- msgpack -----------------------------------------------------------------------------------------

cdef enum:
    # The kinds of values that are told apart; 0 is none of them.
    SCALAR = 1
    STRING
    BINARY
    ARRAY
    MAP


cdef struct Header:
    # The first bytes of a value in msgpack.
    int kind
    int nbytes  # of the header; of SCALAR the whole value
    uint64_t length  # bytes of STRING and BINARY, items of ARRAY and MAP


cdef struct Levels:
    # The containers around a value in msgpack, the outermost first.
    uint64_t[MAX_DEPTH] left  # values that are yet to come, keys among them
    bint[MAX_DEPTH] is_map
    int depth


cdef int split_msgpack(
    const char* text, Py_ssize_t n, char* skeleton, Py_ssize_t room, Py_ssize_t* skeleton_len,
    gw_span* spans, int* span_count,
) noexcept nogil:
    """Divides a msgpack body, which must be one map.

    Cut are, of a `bin` of at least one byte under a key "data", the payload, and the `str` under the
    key "id" of the outermost map with its header, if it is plain ASCII. All else is kept, the
    headers of what was cut among it: equal skeletons have payloads of equal lengths.

    Args and Returns: as `split_json`.
    """
    cdef Cuts cuts = Cuts(text, n, 0, skeleton, 0, room, spans, 0, 0)
    cdef Levels levels
    cdef Header header
    cdef Py_ssize_t at = 0, end
    cdef int key = NO_KEY
    levels.depth = 0
    while at == 0 or levels.depth:
        if at - cuts.done > room or not read_header(text + at, n - at, &header):
            return -1
        end = at + header.nbytes
        if header.kind == STRING or header.kind == BINARY:
            if header.length > <uint64_t>(n - end):
                return -1
            end += <Py_ssize_t>header.length
        if comes_key(&levels):
            if header.kind != STRING:
                return -1
            key = which_key(text + at + header.nbytes, <Py_ssize_t>header.length)
        else:
            if not split_value(&cuts, at, end, &header, key, levels.depth):
                return -1
            key = NO_KEY
        if not step(&levels, &header):
            return -1
        at = end
    if at != n or not keep(&cuts, n):
        return -1
    skeleton_len[0] = cuts.used
    span_count[0] = cuts.count
    return 0


cdef inline bint comes_key(const Levels* levels) noexcept nogil:
    """Whether the next value is the key of a map."""
    cdef int innermost = levels.depth - 1
    return innermost >= 0 and levels.is_map[innermost] and levels.left[innermost] % 2 == 0


cdef inline bint split_value(
    Cuts* cuts, Py_ssize_t at, Py_ssize_t end, const Header* header, int key, int depth
) noexcept nogil:
    """Cuts a value, if it is one to cut; False: it is odd or there is no room."""
    cdef Py_ssize_t begin = at + header.nbytes
    if depth == 0:
        return header.kind == MAP
    if key == ID_KEY and depth == 1:
        return (
            header.kind == STRING
            and end - begin <= MAX_ID_BYTES
            and is_plain(cuts.text + begin, cuts.text + end)
            and keep(cuts, at)
            and cut_id(cuts, begin, end)
        )
    if key == DATA_KEY and header.kind == BINARY and end > begin:
        return cut(cuts, SPAN_BIN, begin, end, 0, 0)
    return True


cdef inline bint cut_id(Cuts* cuts, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Cuts an id whose header has not been kept yet, and leaves that out."""
    cuts.done = begin
    return cut(cuts, SPAN_ID, begin, end, 0, MSGPACK_ID_MARK)


cdef inline bint is_plain(const char* at, const char* end) noexcept nogil:
    """Whether a text is of printable ASCII, without quotes and backslashes, as ids in JSON are."""
    while at < end:
        if not 0x20 <= at[0] <= 0x7E or at[0] == c'"' or at[0] == c'\\':
            return False
        at += 1
    return True


cdef inline bint step(Levels* levels, const Header* header) noexcept nogil:
    """Goes past a value, or into it if it is a container; False where that is too deep."""
    if levels.depth:
        levels.left[levels.depth - 1] -= 1
    if header.kind == ARRAY or header.kind == MAP:
        if levels.depth == MAX_DEPTH:
            return False
        levels.is_map[levels.depth] = header.kind == MAP
        levels.left[levels.depth] = header.length * (2 if header.kind == MAP else 1)
        levels.depth += 1
    while levels.depth and levels.left[levels.depth - 1] == 0:
        levels.depth -= 1
    return True


cdef bint read_header(const char* text, Py_ssize_t n, Header* header) noexcept nogil:
    """Reads what a value begins with; False where it is cut off, an extension or of no kind."""
    cdef int i, tag, size = 0
    if n <= 0:
        return False
    tag = <uint8_t>text[0]
    header.kind = SCALAR
    header.length = 0
    header.nbytes = 1
    if tag < 0x80 or tag >= 0xE0 or tag == 0xC0 or tag == 0xC2 or tag == 0xC3:
        return True
    if tag < 0xC0:  # the length is in the tag itself
        header.kind = MAP if tag < 0x90 else ARRAY if tag < 0xA0 else STRING
        header.length = tag & (0x1F if tag >= 0xA0 else 0x0F)
        return True
    if 0xC4 <= tag <= 0xC6:
        header.kind = BINARY
        size = 1 << (tag - 0xC4)
    elif 0xD9 <= tag <= 0xDB:
        header.kind = STRING
        size = 1 << (tag - 0xD9)
    elif tag == 0xDC or tag == 0xDD:
        header.kind = ARRAY
        size = 2 << (tag - 0xDC)
    elif tag >= 0xDE:
        header.kind = MAP
        size = 2 << (tag - 0xDE)
    elif tag == 0xCA or tag == 0xCB:  # floats
        header.nbytes = 5 if tag == 0xCA else 9
    elif 0xCC <= tag <= 0xD3:  # integers, without and with a sign
        header.nbytes = 1 + (1 << (tag & 3))
    else:
        return False
    header.nbytes += size
    if header.nbytes > n:
        return False
    for i in range(size):
        header.length = header.length << 8 | <uint8_t>text[1 + i]
    return True


# -- numbers -----------------------------------------------------------------------------------------


cdef struct Nesting:
    # Where in nested lists a number is.
    const Py_ssize_t* dims
    int rank  # below 0: any nesting will do
    int depth  # open brackets
    Py_ssize_t[MAX_RANK + 1] seen  # elements of each open list, by depth


cdef int parse_numbers(
    const char* text, Py_ssize_t n, int datatype_index, char* dst, Py_ssize_t count,
    const Py_ssize_t* dims, int rank,
) noexcept nogil:
    """Reads a span of numbers into a tensor, as orjson and the decode kernel would together.

    Args:
        text, n: a JSON array of numbers, flat or nested, and its bytes.
        datatype_index: `DataType.index` of the elements.
        dst: where `count` elements go, row-major and little-endian; needs no alignment.
        count: how many there must be.
        dims, rank: how they must nest, each dim at least 0 and their product `count`; with a rank
            below 0 any nesting of up to 100 levels will do.

    Returns:
        0, or -1 where that fails, with `dst` partly written: the text is not such an array, or holds
        a number that the type does not take, or one of an exponent too long to be read here.
    """
    cdef Nesting nesting
    cdef const gw_element* element
    cdef const char* at = text
    cdef const char* end = text + n
    cdef Py_ssize_t done = 0
    cdef bint comes_value = True, is_first = False
    cdef gw_number number
    if not 0 <= datatype_index < DATATYPES or rank == 0 or rank > MAX_RANK:
        return -1
    if n < 2 or text[0] != c'[' or text[n - 1] != c']':  # so no number reaches the end
        return -1
    element = &GW_ELEMENTS[datatype_index]
    if element.kind == GW_REFUSED:
        return -1
    nesting.dims = dims
    nesting.rank = rank
    nesting.depth = 0
    while True:
        while is_space(at[0]):
            at += 1
        if comes_value and at[0] != c'[' and not (is_first and at[0] == c']'):
            at = gw_read_number(at, end, &number)
            if at == NULL or done == count or not takes_number(&nesting):
                return -1
            if not store(dst, &number, element):
                return -1
            dst += element.itemsize
            done += 1
            comes_value = False
            if at[0] == c',':  # nearly always
                at += 1
                comes_value = True
                is_first = False
        elif at[0] == c'[' and comes_value:
            if not enter(&nesting):
                return -1
            at += 1
            is_first = True
        elif at[0] == c']':
            if not leave(&nesting):
                return -1
            at += 1
            if nesting.depth == 0:
                return 0 if at == end and done == count else -1
            if at == end:
                return -1
            comes_value = False
            is_first = False
        elif at[0] == c',':
            at += 1
            comes_value = True
            is_first = False
        else:
            return -1


cdef inline bint takes_number(Nesting* nesting) noexcept nogil:
    """Counts a number; False where it is not on the innermost level."""
    if nesting.rank > 0:
        if nesting.depth != nesting.rank:
            return False
        nesting.seen[nesting.depth] += 1
    return True


cdef inline bint enter(Nesting* nesting) noexcept nogil:
    """Goes into a list; False where that is too deep."""
    if nesting.depth == (nesting.rank if nesting.rank > 0 else MAX_NESTING):
        return False
    if nesting.rank > 0:
        if nesting.depth:
            nesting.seen[nesting.depth] += 1
        nesting.seen[nesting.depth + 1] = 0
    nesting.depth += 1
    return True


cdef inline bint leave(Nesting* nesting) noexcept nogil:
    """Goes out of a list; False where it has not as many elements as its dim says."""
    nesting.depth -= 1
    return nesting.rank <= 0 or nesting.seen[nesting.depth + 1] == nesting.dims[nesting.depth]


cdef inline bint store(char* dst, const gw_number* number, const gw_element* element) noexcept nogil:
    """Writes a number as one element; False where the type does not take it."""
    cdef double real
    cdef float narrow
    cdef uint64_t bits
    if element.kind == GW_REAL:
        real = gw_to_double(number)
        if element.itemsize == 8:
            memcpy(dst, &real, 8)
            return not isinf(real)
        narrow = <float>real
        memcpy(dst, &narrow, 4)
        return not isinf(narrow)
    if not number.integer or not number.exact:
        return False
    if number.mantissa > (element.lowest if number.negative else element.highest):
        return False
    bits = 0 - number.mantissa if number.negative else number.mantissa
    if element.itemsize == 8:
        memcpy(dst, &bits, 8)
    elif element.itemsize == 4:
        memcpy(dst, &bits, 4)
    elif element.itemsize == 2:
        memcpy(dst, &bits, 2)
    else:
        memcpy(dst, &bits, 1)
    return True


# -- for tests and benchmarks ------------------------------------------------------------------------

ctypedef int (*Split)(
    const char*, Py_ssize_t, char*, Py_ssize_t, Py_ssize_t*, gw_span*, int*
) noexcept nogil


def json_parts(body, Py_ssize_t room):
    """`split_json` as Python sees it: the skeleton and tuples of a span's fields.

    Args:
        body: a C-contiguous buffer. Borrowed for the call.
        room: most bytes of the skeleton.

    Returns:
        The skeleton and (begin, end, count, kind) of each span, or None for -1.

    Raises:
        ValueError: `room` is negative.
    """
    return split(split_json, body, room)


def msgpack_parts(body, Py_ssize_t room):
    """`split_msgpack` as Python sees it. Args, returns and raises as `json_parts`."""
    return split(split_msgpack, body, room)


def numbers(text, int datatype_index, Py_ssize_t count, tuple dims):
    """`parse_numbers` as Python sees it.

    Args:
        text: a C-contiguous buffer that holds a span. Borrowed for the call.
        datatype_index: `DataType.index` of the elements.
        count: how many there must be.
        dims: how they must nest, 1 to 8 ints whose product is `count`; None for any nesting.

    Returns:
        The elements' bytes, or None for -1.

    Raises:
        ValueError: an unknown datatype or a negative count.
    """
    cdef Py_buffer view
    cdef Py_ssize_t[MAX_RANK] limits
    cdef int rank = -1, result
    if not 0 <= datatype_index < DATATYPES:
        raise ValueError(f"datatype_index: expected 0 to {DATATYPES - 1}")
    if count < 0:
        raise ValueError("count: must not be negative")
    if dims is not None:
        rank = <int>min(len(dims), MAX_RANK + 1)
        for i in range(min(rank, MAX_RANK)):
            limits[i] = dims[i]
    PyObject_GetBuffer(text, &view, PyBUF_SIMPLE)
    try:
        if count > view.len:  # a number has at least a digit
            return None
        found = PyBytes_FromStringAndSize(NULL, count * GW_ELEMENTS[datatype_index].itemsize)
        result = parse_numbers(
            <const char*>view.buf, view.len, datatype_index, PyBytes_AS_STRING(found), count,
            limits, rank,
        )
    finally:
        PyBuffer_Release(&view)
    return None if result else found


cdef object split(Split divide, body, Py_ssize_t room):
    """What a body divides into, None for -1. ValueError if `room` is negative."""
    cdef Py_buffer view
    cdef gw_span[MAX_SPANS] spans
    cdef Py_ssize_t used
    cdef int count
    cdef char* skeleton
    if room < 0:
        raise ValueError("room: must not be negative")
    skeleton = <char*>PyMem_Malloc(room)
    if skeleton == NULL:
        raise MemoryError
    try:
        PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
        try:
            if divide(<const char*>view.buf, view.len, skeleton, room, &used, spans, &count):
                return None
        finally:
            PyBuffer_Release(&view)
        return skeleton[:used], [
            (spans[i].begin, spans[i].end, spans[i].count, spans[i].kind) for i in range(count)
        ]
    finally:
        PyMem_Free(skeleton)


# -- tables ------------------------------------------------------------------------------------------


cdef int make_tables() except -1:
    """Sets what numbers.h needs. MemoryError if there is no locale to be had."""
    global gw_c_locale
    for power in range(GW_MIN_POWER, GW_MAX_POWER + 1):
        bits = power_of_five(power)
        gw_powers_of_five[power - GW_MIN_POWER][0] = bits >> 64
        gw_powers_of_five[power - GW_MIN_POWER][1] = bits & ((1 << 64) - 1)
    gw_c_locale = newlocale(LC_ALL_MASK, b"C", NULL)
    if gw_c_locale == NULL:
        raise MemoryError
    return 0


cdef object power_of_five(power):
    """The first 128 bits of 5**power; of a reciprocal rounded up, as Eisel and Lemire have it."""
    five = 5 ** abs(power)
    if power >= 0:
        return five << 128 >> five.bit_length()
    # Between 2**127 and 2**128, if this were exact; never a whole number, so rounded up is plus one.
    return (1 << (five.bit_length() + 127)) // five + 1


make_tables()
