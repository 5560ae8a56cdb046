"""The one error tree.

Each class fixes its HTTP status, its machine-readable code and whether the same request may succeed
when sent again a little later.
Messages are shown to clients: they say what was expected, what came and what to do,
and never hold tensor data, paths, names of shared memory or client bytes (names that match their
grammar excepted).
"""

from __future__ import annotations


class GatewayError(Exception):
    """Base of every error that the gateway raises on purpose."""

    status = 500
    code = "internal"
    retryable = False

    @property
    def message(self) -> str:
        """The text that a client or an operator is shown."""
        return str(self.args[0]) if self.args else self.code


class InvalidRequest(GatewayError):
    """The request is wrong in itself; sending it again gives the same answer."""

    status = 400
    code = "invalid_request"


class NotFound(GatewayError):
    """The named model, version, label or resource does not exist."""

    status = 404
    code = "not_found"


class Unauthorized(GatewayError):
    """No key, or one that is not known, expired or revoked; answered with ``WWW-Authenticate``."""

    status = 401
    code = "unauthorized"


class Forbidden(GatewayError):
    """The caller may not do this here."""

    status = 403
    code = "forbidden"


class Conflict(GatewayError):
    """What is there already contradicts the request: other content, a rollout that runs, a state."""

    status = 409
    code = "conflict"


class PreconditionFailed(GatewayError):
    """``If-Match`` names another revision than the resource has now: read it again."""

    status = 412
    code = "precondition_failed"


class TooLarge(GatewayError):
    """A body, decompressed body or tensor is over a limit; the message names the setting."""

    status = 413
    code = "too_large"


class UnsupportedMediaType(GatewayError):
    """Content-Type or Content-Encoding is not one the gateway reads."""

    status = 415
    code = "unsupported_media_type"


class PreconditionRequired(GatewayError):
    """A change of something that exists needs ``If-Match`` with the revision that it was decided on."""

    status = 428
    code = "precondition_required"


class QueueFull(GatewayError):
    """The model's queue is at ``queue.max_size``; answered with ``Retry-After``."""

    status = 429
    code = "queue_full"
    retryable = True


class InferenceFailed(GatewayError):
    """The model itself failed on this request (ONNX Runtime raised, or the worker died of it)."""

    status = 500
    code = "inference_failed"


class NotSupported(GatewayError):
    """A known operation that this server or model does not offer."""

    status = 501
    code = "not_implemented"


class Unavailable(GatewayError):
    """The version, or the server as a whole, cannot take requests now."""

    status = 503
    code = "unavailable"
    retryable = True


class DeadlineExceeded(GatewayError):
    """The request's time in the queue ran out before a worker took it."""

    status = 504
    code = "deadline_exceeded"


class ConfigurationError(GatewayError):
    """A setting, a file or the environment is wrong; one line for the operator, never a client."""

    code = "configuration"


class LoadError(GatewayError):
    """A model version cannot be loaded.

    The message is the reason that clients may see; ``detail`` is what operators read in the log, where
    it says more (ONNX Runtime's own text, which may name paths).
    """

    code = "load_failed"

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message
