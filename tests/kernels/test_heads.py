from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from email.utils import formatdate
from types import ModuleType
from typing import Any

import pytest
from aiohttp import http_parser
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import parse_content_type
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, ROOT, load
from tests.twins import heads as twin

FUZZ = settings(deadline=None, max_examples=300)
FIRST = b"POST /v2/models/m/infer HTTP/1.1"
HOST, LENGTH = b"Host: localhost:8000", b"Content-Length: 12"
TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BODY = b'{"inputs":[]}'
MAX_S = 253402300799  # the last second of the year 9999


def head(*lines: bytes, first: bytes = FIRST, end: bytes = b"\r\n") -> bytes:
    return end.join((first, *lines, b"", b""))


def short(case: object) -> str:
    """What pytest calls a case."""
    return repr(case)[:40]


def plain(*lines: bytes, first: bytes = FIRST) -> bytes:
    """A plain head with more lines."""
    return head(HOST, *lines, LENGTH, first=first)


WRK = plain(b"Content-Type: application/json")
TRITON = plain(
    b"Accept-Encoding: identity",
    b"Content-Type: application/octet-stream",
    b"Inference-Header-Content-Length: 7",
    b"User-Agent: geventhttpclient/2.3.1",
)
TRACED = plain(
    b"accept: */*",
    b"connection: keep-alive",
    b"x-request-id: a/b:c.d+e=f@g_h-1",
    b"traceparent:\t" + TRACE + b" ",
    b"tracestate: vendor=1",
    b"authorization: Bearer t",
)
SAMPLES = pytest.mark.parametrize("sample", [WRK, TRITON, TRACED], ids=["wrk", "triton", "traced"])


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def heads(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "heads")


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "heads")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def verdict(heads: ModuleType, data: bytes, start: int = 0) -> Any:
    """The fields of the head as a tuple, None for more, or "aside"."""
    parsed = heads.parse(data, start)
    return "aside" if parsed is heads.ASIDE else parsed


# -- what is plain -----------------------------------------------------------------------------------


def test_what_a_head_says(heads: ModuleType) -> None:
    path, length = "/v2/models/m/infer", 12
    assert verdict(heads, WRK) == (len(WRK), path, length, None, 1, None, None)
    assert verdict(heads, TRITON + BODY) == (len(TRITON), path, length, 7, 2, None, None)
    ids = ("a/b:c.d+e=f@g_h-1", TRACE.decode())
    traced = verdict(heads, BODY + TRACED + BODY, len(BODY))
    assert traced == (len(TRACED), path, length, None, 0, *ids)


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Encoding: Identity",
        b"Connection: Keep-Alive",
        b"Connection:keep-alive",
        b"Inference-Header-Content-Length: 0",
        b"X-Request-ID: " + b"i" * 128,
        b"TE: trailers",
        b"Accept-Encoding: gzip",
        b"Transfer_Encoding: chunked",  # a header of its own, not the one with a hyphen
        b"Keep-Alive: timeout=5",
        b"Cookie: a=b; c=\td",
        b"X-Empty:",
        b"X-Empty: \t ",
        b"!#$%&'*+.^_`|~-09azAZ: any token",
    ],
    ids=short,
)
def test_a_plain_line(heads: ModuleType, line: bytes) -> None:
    for data in (head(line, HOST, LENGTH), plain(line), head(HOST, LENGTH, line)):
        assert heads.parse(data).head_bytes == len(data)


def test_the_two_lines_that_every_plain_head_has(heads: ModuleType) -> None:
    data = head(b"hOST:[::1]:80", b"CONTENT-LENGTH:\t 000000000000012\t ")
    assert heads.parse(data).content_length == 12
    for missing in (head(), head(HOST), head(LENGTH)):
        assert heads.parse(missing) is heads.ASIDE


@pytest.mark.parametrize(
    ("template", "others"),
    [
        (b"POST /%b HTTP/1.1\r\nHost: a\r\n", b"-._~/:"),
        (
            b"POST / HTTP/1.1\r\nHost: a%b\r\n",
            b"-._:[] \t",
        ),  # trailing white space is no part of it
        (b"POST / HTTP/1.1\r\nHost: a\r\nx%bx: y\r\n", b"-._!#$%&'*+^`|~:"),  # a colon ends it
        (b"POST / HTTP/1.1\r\nHost: a\r\nx-request-id: a%bb\r\n", b"-._:/+=@"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nx: a%bb\r\n", bytes([9, *range(32, 127)])),
    ],
    ids=["target", "host", "name", "request id", "value"],
)
def test_every_byte(heads: ModuleType, template: bytes, others: bytes) -> None:
    every = [bytes([byte]) for byte in range(256)]
    data = [template % byte + b"Content-Length: 0\r\n\r\n" for byte in every]
    kept = [b for b, each in zip(every, data, strict=True) if heads.parse(each) is not heads.ASIDE]
    assert kept == [b for b in every if b.isalnum() or b in others]


@pytest.mark.parametrize(
    ("value", "media"),
    [
        (b"application/json", 1),
        (b"Application/JSON;charset=UTF-8", 1),
        (b"application/json \t; charset=utf-8", 1),
        (b"application/octet-stream", 2),
        (b"application/msgpack", 3),
        (b"application/x-msgpack", 4),
        (b"application/vnd.msgpack", 5),
        (b"text/plain", 6),
        (b"application/jsonx", 6),
        (b"application/jso", 6),
    ],
)
def test_media_types(heads: ModuleType, value: bytes, media: int) -> None:
    assert heads.parse(plain(b"Content-Type: " + value)).media == media
    name, _ = parse_content_type(value.decode())
    assert (twin.MEDIA.index(name) + 1 if name in twin.MEDIA else 6) == media


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        (
            plain(first=b"POST /%s HTTP/1.1" % (b"t" * 511)),
            plain(first=b"POST /%s HTTP/1.1" % (b"t" * 512)),
        ),
        (plain(*[b"a: b"] * 62), plain(*[b"a: b"] * 63)),
        (head(HOST, b"Content-Length: " + b"9" * 15), head(HOST, b"Content-Length: " + b"9" * 16)),
        (plain(b"x-request-id: " + b"i" * 128), plain(b"x-request-id: " + b"i" * 129)),
        (
            plain(b"a: ".ljust(8000 - 2 - len(plain()), b"v")),
            plain(b"a: ".ljust(8000 - 1 - len(plain()), b"v")),
        ),
    ],
    ids=["target", "headers", "digits", "request id", "head"],
)
def test_limits(heads: ModuleType, within: bytes, beyond: bytes) -> None:
    assert heads.parse(within).head_bytes == len(within) <= 8000
    assert heads.parse(beyond) is heads.ASIDE


def test_a_head_that_cannot_end_in_time_is_not_waited_for(heads: ModuleType) -> None:
    begun = head(HOST)[:-2] + b"a: "
    assert heads.parse(begun.ljust(7999, b"v")) is None
    for full in (begun.ljust(8000, b"v"), begun.ljust(7998, b"v") + b"\r\n"):
        assert heads.parse(full) is heads.ASIDE
    assert heads.parse(head(*[b"a: b"] * 64)[:-2]) is None
    assert heads.parse(head(*[b"a: b"] * 64)[:-2] + b"a") is heads.ASIDE


# -- what steps aside --------------------------------------------------------------------------------

REQUEST_LINES = [b" " + FIRST, b"\r\n" + FIRST, b"\n" + FIRST, FIRST + b" ", FIRST + b"\r"]
REQUEST_LINES += [b"post / HTTP/1.1", b"GET / HTTP/1.1", b"CONNECT / HTTP/1.1", b"P@ST / HTTP/1.1"]
REQUEST_LINES += [b"", b"POST", b"POST /", b"POST / ", b"POST / HTTP/1.0", b"POST / HTTP/1.32"]
REQUEST_LINES += [b"POST / HTTP/2.0", b"POST / HTTP/0.9", b"POST / http/1.1", b"POST / HTTP/1.1\n"]
REQUEST_LINES += [
    b"POST  / HTTP/1.1",
    b"POST /  HTTP/1.1",
    b"POST\t/ HTTP/1.1",
    b"POST /\tHTTP/1.1",
]
REQUEST_LINES += [b"POST %s HTTP/1.1" % path for path in (b"", b"*", b"a", b"a:80", b"http://a/b")]
REQUEST_LINES += [
    b"POST /%s HTTP/1.1" % path for path in (b"?b", b"%20", b"#b", b"\0", b"\xc3\xa9")
]
REQUEST_LINES += [b"POST /%s HTTP/1.1" % path for path in (b"\x7f", b"\r", b"\n", b"a" * 8000)]
REQUEST_LINES += [b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]
"""Each is odd by itself."""

LINES = [b" X: y", b"\tX: y", b"X : y", b"X\t: y", b"X", b": y", b":", b" ", b"X(: y", b'"X": y']
LINES += [b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\nY: b", b"X: a\rY: b", b"X: \r\r", b"\rX: a", b"\n"]
LINES += [b"X: \0", b"X: \x01", b"X: \x0b", b"X: \x7f", b"X: \x80", b"X: caf\xc3\xa9", b"X\0: y"]
LINES += [b"X\xc3\xa9: y", b"X: " + b"v" * 16384, b"Transfer-Encoding: chunked", b"Trailer: X"]
LINES += [
    b"transfer-encoding: identity",
    b"Transfer-Encoding:",
    b"Upgrade: h2c",
    b"Expect: 100-continue",
]
LINES += [b"Proxy-Connection: keep-alive", b"Sec-WebSocket-Key1: a", b"Max-Forwards: 1", b"ETag: a"]
LINES += [b"Content-Range: bytes 0-1/2", b"Content-Location: /", b"Server: a"]
"""Each makes a plain head step aside."""

VALUES = {
    b"Host": [b"", b"a b", b"u@a/x", b"a,b", b"a/", b"a\tb", b"a%20", b"a?", b"a#b"],
    b"Content-Length": [
        *(b"", b"+1", b"-1", b"0x1", b"1_0", b"1 0", b"1, 1", b"1,1", b"1e0", b"1.0", b"1;"),
        *(b'"1"', b"a", "１".encode(), b"1" * 20, b"18446744073709551617"),
    ],
    b"Inference-Header-Content-Length": [b"", b"-1", b"1 0", b"1" * 20],
    b"Content-Type": [
        *(b"", b"json", b"/json", b"application/", b"a/b/c", b"a/b;", b"a/b charset=utf-8"),
        *(b"a/b; charset=latin-1", b"a/b; charset=utf-8; c=d", b"a/b,a/b", b"a /b", b"a,b"),
    ],
    b"Content-Encoding": [b"", b"gzip", b"identity, identity", b"identit", b"identityy"],
    b"Connection": [b"", b"close", b"upgrade", b"keep-alive, close", b"keep-alive, TE"],
    b"x-request-id": [b"", b"a b", b"a,b", b'"', b"\t;", b"i" * 129],
    b"traceparent": [
        *(b"", TRACE[:-1], TRACE + b"0", b"01" + TRACE[2:], TRACE.upper(), TRACE[:-1] + b"g"),
        *(TRACE[:at] + b"_" + TRACE[at + 1 :] for at in (2, 35, 52)),
        *(TRACE[:3] + b"0" * 32 + TRACE[35:], TRACE[:36] + b"0" * 16 + TRACE[52:]),
    ],
}
"""By header, what makes a head that is otherwise plain step aside."""

KNOWN = [b"Content-Type: text/plain", b"Content-Encoding: identity", b"Connection: keep-alive"]
KNOWN += [b"Inference-Header-Content-Length: 1", b"x-request-id: a", b"traceparent: " + TRACE]
KNOWN += [b"Authorization: Bearer t", b"User-Agent: a"]
"""Lines that a plain head may have, but once."""


@pytest.mark.parametrize("first", REQUEST_LINES, ids=short)
def test_an_odd_request_line_steps_aside(heads: ModuleType, first: bytes) -> None:
    assert heads.parse(plain(first=first)) is heads.ASIDE


@pytest.mark.parametrize("line", LINES, ids=short)
def test_an_odd_line_steps_aside(heads: ModuleType, line: bytes) -> None:
    for data in (head(HOST, LENGTH, line), head(line, HOST, LENGTH), plain(line)):
        assert heads.parse(data + BODY) is heads.ASIDE


@pytest.mark.parametrize("line", [HOST, LENGTH, *KNOWN], ids=short)
def test_a_known_header_comes_once(heads: ModuleType, line: bytes) -> None:
    once = plain() if line in (HOST, LENGTH) else plain(line)
    name, _, value = line.partition(b":")
    assert heads.parse(once).head_bytes == len(once)
    assert heads.parse(once[:-2] + name.upper() + b":" + value + b"\r\n\r\n") is heads.ASIDE


@pytest.mark.parametrize("name", VALUES, ids=bytes.decode)
def test_an_odd_value_steps_aside(heads: ModuleType, name: bytes) -> None:
    for value in VALUES[name]:
        lines = dict((HOST.split(b": "), LENGTH.split(b": "))) | {name: value}
        data = head(*map(b": ".join, lines.items()))
        assert heads.parse(data) is heads.ASIDE, value


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\n\r", b"\r\r\n", b"\r\n\r"])
def test_other_line_ends_step_aside(heads: ModuleType, end: bytes) -> None:
    assert heads.parse(head(HOST, LENGTH, end=end)) is heads.ASIDE
    for count in range(3):  # of plain lines before the odd one
        lines = [FIRST, HOST, LENGTH]
        odd = b"\r\n".join(lines[: count + 1]) + end + b"\r\n".join(lines[count + 1 :])
        assert heads.parse(odd + b"\r\n\r\n") is heads.ASIDE


def test_a_head_ends_with_crlf_crlf(heads: ModuleType) -> None:
    for end in (b"\n", b"\rX", b"\r\r\n", b"\0\r\n"):  # the second: CVE-2025-23167
        assert heads.parse(plain()[:-2] + end) is heads.ASIDE


# -- incomplete heads --------------------------------------------------------------------------------


@SAMPLES
def test_a_part_of_a_plain_head_waits_for_more(heads: ModuleType, sample: bytes) -> None:
    assert [n for n in range(len(sample)) if heads.parse(sample[:n]) is not None] == []
    assert heads.parse(sample).head_bytes == len(sample)


@SAMPLES
@pytest.mark.parametrize("bad", [b"\0", b"\n", b"\x1f", b"\x7f", b"\x80", b"\xff"])
def test_a_bad_byte_steps_aside_at_once(heads: ModuleType, sample: bytes, bad: bytes) -> None:
    starts = (sample[:n] for n in range(len(sample)))
    waiting = [s for s in starts if heads.parse(s + bad) is not heads.ASIDE]
    assert waiting == ([s for s in waiting if s.endswith(b"\r")] if bad == b"\n" else [])


def read_up_to_a_fence(build: str) -> None:
    """Parse every part of every sample where the next byte cannot be read: SIGSEGV if it is."""
    heads, page = load(build, "heads"), mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    for sample in (WRK, TRITON, TRACED):
        for size in range(len(sample) + 1):
            memory[page - size : page] = sample[:size]
            parsed = heads.parse(memoryview(memory)[:page], page - size)
            assert (parsed is None) == (size < len(sample))


@pytest.mark.parametrize("build", BUILDS)
def test_nothing_behind_the_data_is_read(build: str) -> None:
    code = f"from tests.kernels import test_heads; test_heads.read_up_to_a_fence({build!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# -- against the twin, and against aiohttp -----------------------------------------------------------

PLAIN_LINES = [
    *KNOWN,
    *(
        b"Accept: */*",
        b"X-Empty:",
        b"TE: trailers",
        b"Accept-Encoding: gzip, br",
        b"a: \tb\t ",
        b"Cookie: a=b",
    ),
]
FIRSTS = [
    b"POST %s HTTP/1.1" % path
    for path in (b"/", b"/v2/models/m/infer", b"//a/b", b"/v1/models/m:predict")
]
BITS = [
    b"\r\n",
    b"\r",
    b"\n",
    b":",
    b" ",
    b"\t",
    b"\0",
    b"\x7f",
    b"\x80",
    b"0",
    b"9",
    b"a",
    b",",
    b";",
    b"X: y\r\n",
]


@st.composite
def plain_heads(draw: st.DrawFn) -> bytes:
    """Heads that are plain, of any order and case."""
    length = b"Content-Length: %d" % draw(st.integers(0, 99))
    lines = [HOST, length, *draw(st.lists(st.sampled_from(PLAIN_LINES), unique=True, max_size=8))]
    recased = [
        draw(st.sampled_from([bytes.lower, bytes.upper, bytes]))(name) + colon + value
        for name, colon, value in (line.partition(b":") for line in draw(st.permutations(lines)))
    ]
    return head(*recased, first=draw(st.sampled_from(FIRSTS)))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Plain heads, then odd ones among their lines, then bytes changed, put in and taken out."""
    lines = draw(plain_heads()).split(b"\r\n")
    values = [name + b": " + value for name in VALUES for value in VALUES[name]]
    odd = st.sampled_from(LINES + values)
    for line in draw(st.lists(odd, max_size=1)):
        lines.insert(draw(st.integers(1, len(lines) - 2)), line)
    data = b"\r\n".join(lines) + BODY
    for bit in draw(st.lists(st.sampled_from(BITS), max_size=2)):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + bit + data[at + draw(st.integers(0, 2)) :]
    return data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]


def check_against_aiohttp(parsed: Any, data: bytes, loop: asyncio.AbstractEventLoop) -> None:
    """That aiohttp takes the same message from the data, ending at the same byte."""
    parser = http_parser.HttpRequestParser(BaseProtocol(loop), loop, 2**16)
    end = parsed.head_bytes
    assert parser.feed_data(data[: end - 1])[0] == ()
    [(message, payload)], upgraded, _ = parser.feed_data(data[end - 1 : end])
    said, json_bytes = message.headers, message.headers.get("Inference-Header-Content-Length")
    assert (message.method, message.path, message.version) == ("POST", parsed.target, (1, 1))
    assert int(said["Content-Length"]) == parsed.content_length
    assert (None if json_bytes is None else int(json_bytes)) == parsed.json_bytes
    assert said.get("x-request-id") == parsed.request_id
    assert said.get("traceparent") == parsed.traceparent
    assert len(said) == data[:end].count(b"\r\n") - 2
    assert (upgraded, message.upgrade, message.chunked) == (False, False, False)
    assert (message.should_close, message.compression) == (False, None)
    if parsed.content_length < 1000:
        assert payload.is_eof() == (parsed.content_length == 0)
        parser.feed_data(b"x" * (parsed.content_length - 1))
        assert payload.is_eof() == (parsed.content_length == 0)
        parser.feed_data(b"x" * (parsed.content_length > 0))
        assert payload.is_eof()


@FUZZ
@given(data=plain_heads())
def test_plain_heads_are_what_aiohttp_reads(
    compiled: ModuleType, loop: asyncio.AbstractEventLoop, data: bytes
) -> None:
    parsed = compiled.parse(data)
    assert parsed == twin.parse(data)
    check_against_aiohttp(parsed, data, loop)


@FUZZ
@given(data=mutated())
def test_other_heads_are_what_the_twin_says(
    compiled: ModuleType, loop: asyncio.AbstractEventLoop, data: bytes
) -> None:
    parsed = compiled.parse(data)
    assert verdict(compiled, data) == verdict(twin, data)
    if parsed is not None and parsed is not compiled.ASIDE:
        check_against_aiohttp(parsed, data, loop)


@FUZZ
@given(data=mutated(), cut=st.integers(0, 400))
def test_more_bytes_never_change_a_verdict(compiled: ModuleType, data: bytes, cut: int) -> None:
    first = verdict(compiled, data[:cut])
    assert first is None or verdict(compiled, data) == first


# -- the arguments -----------------------------------------------------------------------------------


def test_where_a_request_begins(heads: ModuleType) -> None:
    assert heads.parse(bytearray(WRK), len(WRK)) is None
    for start in (-1, len(WRK) + 1):
        with pytest.raises(ValueError, match=f"within the buffer of {len(WRK)} bytes"):
            heads.parse(WRK, start)
    with pytest.raises(TypeError):
        heads.parse(WRK.decode())


# -- answers -----------------------------------------------------------------------------------------


@FUZZ
@given(value=st.integers(0, 2**64 - 1) | st.integers(0, 19).map(lambda power: 10**power))
def test_numbers(heads: ModuleType, value: int) -> None:
    assert heads.uint_text(value) == str(value).encode()
    assert heads.uint_text(value - 1 if value else 0) == str(max(value - 1, 0)).encode()


@pytest.mark.parametrize("value", [-1, 2**64])
def test_numbers_that_do_not_fit(heads: ModuleType, value: int) -> None:
    with pytest.raises(OverflowError):
        heads.uint_text(value)


@FUZZ
@given(unix_s=st.integers(0, MAX_S))
def test_dates(compiled: ModuleType, unix_s: int) -> None:
    assert compiled.date_text(unix_s) == formatdate(unix_s, usegmt=True).encode()


def test_every_day_of_two_centuries(compiled: ModuleType) -> None:
    days = range(86399, 86400 * 366 * 200, 86400)
    assert [d for d in days if compiled.date_text(d) != formatdate(d, usegmt=True).encode()] == []


def test_dates_that_have_no_form_are_the_nearest_that_have(heads: ModuleType) -> None:
    assert heads.date_text(-1) == b"Thu, 01 Jan 1970 00:00:00 GMT"
    assert heads.date_text(MAX_S + 1) == b"Fri, 31 Dec 9999 23:59:59 GMT"


def test_request_ids_are_splitmix64(heads: ModuleType) -> None:
    ids = heads.RequestIds(struct.pack("<2Q", 1234567, 1234567))
    known = 6457827717110365317, 3203168211198807973, 9817491932198370423
    assert [ids.take() for _ in known] == [b"%016x%016x" % (word, word) for word in known]


@FUZZ
@given(seed=st.binary(min_size=16, max_size=16))
def test_request_ids_do_not_repeat(heads: ModuleType, seed: bytes) -> None:
    ids = heads.RequestIds(seed)
    taken = [ids.take() for _ in range(100)]
    assert len({half for each in taken for half in (each[:16], b"-" + each[16:])}) == 200
    assert all(re.fullmatch(rb"[0-9a-f]{32}", each) for each in taken)
    for each, other in itertools.pairwise(taken):
        assert each[:8] != other[:8]


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_seed_of_another_size(heads: ModuleType, size: int) -> None:
    with pytest.raises(ValueError, match=f"expected 16 bytes, got {size}"):
        heads.RequestIds(bytes(size))
