"""What aiohttp is given of a connection, and when it gives the connection back."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from gateway.frontend import aside
from gateway.frontend.aside import MAX_HEAD_BYTES, Aside, message_bytes


def head(*lines: str, first: str = "POST / HTTP/1.1") -> bytes:
    return "\r\n".join([first, "Host: test", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("lines", "body_bytes"),
    [
        ([], 0),
        (["Content-Length: 0"], 0),
        (["Content-Length: 12"], 12),
        (["content-length:12"], 12),
        (["CONTENT-LENGTH: \t12 \t"], 12),
        (["Content-Length: 0012"], 12),
        (["Content-Length: " + "9" * 15], 10**15 - 1),
        (["X-Content-Length: 12"], 0),
        (["X: Content-Length: 12"], 0),
    ],
)
def test_a_message_is_as_long_as_its_one_length_says(lines, body_bytes):
    assert message_bytes(head(*lines)) == len(head(*lines)) + body_bytes


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 12", "Content-Length: 12"],
        ["Content-Length: 12", "content-length: 13"],
        ["Content-Length: 12, 12"],
        ["Content-Length: -1"],
        ["Content-Length: +1"],
        ["Content-Length: 1 2"],
        ["Content-Length:"],
        ["Content-Length: " + "9" * 16],
        ["Content-Length-Extra: 12"],
        ["Content-Length: 12", "Transfer-Encoding: chunked"],
        ["transfer-encoding: identity"],
        ["Upgrade: websocket"],
    ],
)
def test_a_message_that_is_framed_otherwise_has_no_known_length(lines):
    assert message_bytes(head(*lines)) is None


class Handler:
    """Stands in for aiohttp's: keeps what it is given."""

    def __init__(self, asides: Aside, _server: None, **_options: object) -> None:
        self.aside = asides
        self.given = b""
        self.kept = 0

    def connection_made(self, transport: str) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.given += data

    def keep_alive(self, is_kept: bool) -> None:
        self.kept += is_kept


class Connection:
    """Stands in for the kernel's: counts how often it is given back."""

    transport = "transport"

    def __init__(self) -> None:
        self.resumed = 0

    def resume(self) -> None:
        self.resumed += 1


class Loop:
    def __init__(self) -> None:
        self.soon: list[tuple] = []

    def call_soon(self, function, *args) -> None:
        self.soon.append((function, args))

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for function, args in soon:
            function(*args)


@pytest.fixture
def loop(monkeypatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    monkeypatch.setattr(aside, "_Handler", Handler)
    return made


@pytest.fixture
def connection() -> Connection:
    return Connection()


@pytest.fixture
def turn_of(loop, connection) -> Aside:
    return Aside(connection, None, {})


def passed(loop: Loop) -> None:
    """So many turns that whatever was to come soon has come."""
    for _ in range(4):
        loop.turn()


def fed(turn: Aside, *pieces: bytes) -> bytes:
    """Give it a message in pieces; what it gave back."""
    first, *others = pieces
    turn.begin()
    return b"".join(map(turn.feed, [first, *others]))


BODY = head("Content-Length: 4") + b"body"


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n", b"\n\r\n\r\n\r\n"])
@pytest.mark.parametrize("message", [head(), BODY, head("Content-Length: 0")])
def test_it_is_given_one_message_wherever_that_is_cut(loop, connection, before, message):
    sent = before + message
    behind = b"GET /next HTTP/1.1\r\nHost: test\r\n\r\n"
    for cuts in itertools.combinations(range(len(sent) + 1), 2):
        turn = Aside(connection, None, {})
        pieces = [sent[a:b] for a, b in itertools.pairwise((0, *cuts, len(sent)))]
        pieces[-1] += behind
        assert fed(turn, *pieces) == behind
        assert turn.handler.given == sent


def test_the_connection_goes_back_once_it_is_read_and_answered(loop, connection, turn_of):
    fed(turn_of, BODY)
    passed(loop)
    assert connection.resumed == 0
    turn_of.answered(is_kept=True)
    assert connection.resumed == 0  # aiohttp has yet to set its timer
    passed(loop)
    assert (connection.resumed, turn_of.handler.kept) == (1, 1)
    passed(loop)
    assert connection.resumed == 1


def test_an_answer_before_the_end_of_the_body_is_not_the_end(loop, connection, turn_of):
    fed(turn_of, BODY[:-1])
    turn_of.answered(is_kept=True)
    passed(loop)
    assert connection.resumed == 0
    assert turn_of.feed(BODY[-1:] + b"next") == b"next"
    passed(loop)
    assert connection.resumed == 1


def test_a_timer_that_the_handlers_task_sets_a_turn_later_is_cancelled(loop, connection, turn_of):
    """aiohttp's handler runs in a task of its own: who set it going hears of its end in the next turn."""
    order: list[str] = []
    turn_of.handler.keep_alive = lambda _kept: order.append("timer cancelled")
    fed(turn_of, BODY)
    turn_of.answered(is_kept=True)
    loop.call_soon(order.append, "timer set")
    passed(loop)
    assert order == ["timer set", "timer cancelled"]


def test_a_connection_that_ends_does_not_go_back(loop, connection, turn_of):
    fed(turn_of, BODY)
    turn_of.answered(is_kept=False)
    passed(loop)
    assert connection.resumed == 0


@pytest.mark.parametrize(
    "line", ["Transfer-Encoding: chunked", "Upgrade: h2c", "Content-Length: x"]
)
def test_a_message_without_a_known_end_keeps_the_connection(loop, connection, turn_of, line):
    sent = head(line)
    assert fed(turn_of, sent[:9], sent[9:] + b"behind", head()) == b""
    assert turn_of.handler.given == sent + b"behind" + head()
    turn_of.answered(is_kept=True)
    passed(loop)
    assert connection.resumed == 0


def test_a_head_without_an_end_is_not_looked_through_for_ever(loop, connection, turn_of):
    piece = b"x" * (MAX_HEAD_BYTES // 4)
    assert fed(turn_of, *[piece] * 5, b"\r\n\r\nrest") == b""
    assert turn_of.handler.given == piece * 5 + b"\r\n\r\nrest"


def test_the_next_turn_begins_anew(loop, connection, turn_of):
    for number, message in enumerate([BODY, head(), BODY], 1):
        assert fed(turn_of, message[:5], message[5:] + b"next") == b"next"
        turn_of.answered(is_kept=True)
        passed(loop)
        assert connection.resumed == number
    assert turn_of.handler.given == BODY + head() + BODY
