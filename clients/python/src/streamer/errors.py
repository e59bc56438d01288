"""What can go wrong: errors that handlers raise, and errors that clients and workers meet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class ErrorCode(str, Enum):
    """What went wrong, in one word; the words of the gRPC and of the WebSocket protocol."""

    VALIDATION_ERROR = "VALIDATION_ERROR"
    INVALID_ACTION = "INVALID_ACTION"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    CONFLICT = "CONFLICT"
    RATE_LIMITED = "RATE_LIMITED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    PROCESSING_FAILED = "PROCESSING_FAILED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True)
class Failure:
    """Why a request or an attempt failed, as its log tells it."""

    code: ErrorCode
    message: str
    retryable: bool = False
    """Whether the same request may succeed when sent again unchanged."""
    details: Any = None
    """A JSON object with more, or None."""

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


class StreamerError(Exception):
    """Every error of this package."""


# Raised by handlers.


class HandlerError(StreamerError):
    """A handler says that its attempt failed. `retryable`: another attempt may do better."""

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        code: ErrorCode | str = ErrorCode.PROCESSING_FAILED,
        details: Any = None,
    ) -> None:
        """`code` may be given by its name; raises ValueError when there is none of that name."""
        super().__init__(message)
        self.failure = Failure(ErrorCode(code), str(message), bool(retryable), details)

    @property
    def code(self) -> ErrorCode:
        """The kind of failure."""
        return self.failure.code

    @property
    def retryable(self) -> bool:
        """Whether another attempt may do better."""
        return self.failure.retryable


class FatalError(HandlerError):
    """The attempt failed, and no other would do better."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | str = ErrorCode.PROCESSING_FAILED,
        details: Any = None,
    ) -> None:
        super().__init__(message, retryable=False, code=code, details=details)


class InvalidPayload(FatalError):
    """The payload breaks a rule: which field (`payload.rows[3]`), and which rule."""

    def __init__(self, field: str, rule: str) -> None:
        violation = {"field": field, "description": rule}
        super().__init__(
            f"{field}: {rule}",
            code=ErrorCode.VALIDATION_ERROR,
            details={"violations": [violation]},
        )


class LimitExceeded(FatalError):
    """Something is larger than the server takes. It was not sent."""

    def __init__(self, field: str, size: int, limit: int, limit_name: str) -> None:
        super().__init__(f"{field}: must be at most {limit} bytes ({limit_name}), is {size}")
        self.field = field
        self.size = size
        self.limit = limit


class Cancelled(FatalError):
    """The attempt is to stop: somebody cancelled it, or it is not this worker's any more."""

    def __init__(self, message: str = "the attempt was cancelled") -> None:
        super().__init__(message, code=ErrorCode.CANCELLED)


# Met by clients and workers.


@dataclass(frozen=True)
class Violation:
    """One rule that one field of a call breaks."""

    field: str
    description: str


class ServiceError(StreamerError):
    """The server refused a call, or could not be reached (`code` is then UNAVAILABLE)."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        """Every rule that the call breaks."""
        self.retry_after = retry_after
        """When to try again, in seconds from now, if the server said."""


class WorkerRefused(StreamerError):
    """The server does not take this worker, and repeating would not help."""


class RequestFailed(StreamerError):
    """The request has ended in failure."""

    def __init__(self, request_id: str, failure: Failure) -> None:
        super().__init__(f"request {request_id} failed: {failure}")
        self.request_id = request_id
        self.failure = failure


class RequestCancelled(StreamerError):
    """The request was cancelled."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"request {request_id} was cancelled: {reason or 'no reason given'}")
        self.request_id = request_id
        self.reason = reason


class BrokenLog(StreamerError):
    """What was received is not the request's whole log: an event is missing, or the output is
    not the one that the terminal event proves."""


def sync_failure(error: ServiceError, request_id: str) -> StreamerError:
    """What a refusal means to somebody who waits for a result: a sync action, which has no log,
    that failed is told so."""
    if error.code in (ErrorCode.PROCESSING_FAILED, ErrorCode.TIMEOUT):
        return RequestFailed(request_id, Failure(error.code, error.message))
    return error
