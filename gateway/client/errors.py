"""Answers that are errors, back to the gateway's error tree; and the errors of the way there."""

from __future__ import annotations

from gateway.errors import (
    DeadlineExceeded,
    Forbidden,
    GatewayError,
    InferenceFailed,
    InvalidRequest,
    NotFound,
    NotSupported,
    QueueFull,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)


class ConnectionFailed(Unavailable):
    """No address could be connected to; nothing was sent."""

    code = "connection_failed"


class ConnectionLost(ConnectionFailed):
    """The connection ended after some of the request was sent: it may have been run."""

    code = "connection_lost"


class BadAnswer(GatewayError):
    """What came back is not an answer of the Open Inference Protocol."""

    status = 502
    code = "bad_answer"


_BY_STATUS: dict[int, type[GatewayError]] = {
    error.status: error
    for error in (
        InvalidRequest, Forbidden, NotFound, TooLarge, UnsupportedMediaType, QueueFull,
        InferenceFailed, NotSupported, Unavailable, DeadlineExceeded,
    )
}  # fmt: skip


def from_status(status: int, message: str, code: str | None = None) -> GatewayError:
    """The error that an answer stands for.

    Args:
        status: of the answer, anything but 200.
        message: what its ``{"error"}`` says.
        code: its ``x-error-code``, None where it has none (other servers). It tells the gateway's own
            failures from those of a model, which are 500 alike.

    Returns:
        The error of the status; `InvalidRequest` for a 4xx and `GatewayError` for another status that
        has no class of its own.
    """
    if status == GatewayError.status and code == GatewayError.code:
        return GatewayError(message)
    kind = _BY_STATUS.get(status)
    if kind is None:
        kind = InvalidRequest if 400 <= status < 500 else GatewayError
    return kind(message)
