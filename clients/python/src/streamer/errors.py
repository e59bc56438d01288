"""Errors that handlers, clients and workers raise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class ErrorCode(str, Enum):
    """Error codes, the same in the gRPC and the WebSocket protocol."""

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
    """Failure of a request or an attempt, as recorded in its log."""

    code: ErrorCode
    message: str
    retryable: bool = False
    """Whether the same request may succeed when it is sent again unchanged."""
    details: Any = None
    """A JSON object with details, or None."""

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


class StreamerError(Exception):
    """Base class of all errors in this package."""


# Raised by handlers.


class HandlerError(StreamerError):
    """The attempt failed. Another attempt may succeed if `retryable` is true."""

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        code: ErrorCode | str = ErrorCode.PROCESSING_FAILED,
        details: Any = None,
    ) -> None:
        """`code` is an `ErrorCode` or its name. Raises ValueError if the name is unknown."""
        super().__init__(message)
        self.failure = Failure(ErrorCode(code), str(message), bool(retryable), details)

    @property
    def code(self) -> ErrorCode:
        """The error code."""
        return self.failure.code

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed."""
        return self.failure.retryable


class FatalError(HandlerError):
    """The attempt failed, and no other attempt can succeed."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | str = ErrorCode.PROCESSING_FAILED,
        details: Any = None,
    ) -> None:
        super().__init__(message, retryable=False, code=code, details=details)


class InvalidPayload(FatalError):
    """The payload is invalid: `field` (such as `payload.rows[3]`) violates `rule`."""

    def __init__(self, field: str, rule: str) -> None:
        violation = {"field": field, "description": rule}
        super().__init__(
            f"{field}: {rule}",
            code=ErrorCode.VALIDATION_ERROR,
            details={"violations": [violation]},
        )


class LimitExceeded(FatalError):
    """A value exceeds a size limit of the server, and was not sent."""

    def __init__(self, field: str, size: int, limit: int, limit_name: str) -> None:
        super().__init__(f"{field}: must be at most {limit} bytes ({limit_name}), is {size}")
        self.field = field
        self.size = size
        self.limit = limit


class Cancelled(FatalError):
    """The attempt must stop: it was cancelled, or this worker no longer owns it."""

    def __init__(self, message: str = "the attempt was cancelled") -> None:
        super().__init__(message, code=ErrorCode.CANCELLED)


# Raised by clients and workers.


@dataclass(frozen=True)
class Violation:
    """One rule that a field of a call violates."""

    field: str
    description: str


class ServiceError(StreamerError):
    """The server rejected a call, or could not be reached (`code` is then UNAVAILABLE)."""

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
        """Rules that the call violates."""
        self.retry_after = retry_after
        """Seconds to wait before a retry; None if the server did not specify a delay."""


class WorkerRefused(StreamerError):
    """The server rejected this worker, and a retry cannot succeed."""


class RequestFailed(StreamerError):
    """The request failed."""

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
    """The received log is incomplete: an event is missing, or the output does not match the digest
    in the terminal event."""


def sync_failure(error: ServiceError, request_id: str) -> StreamerError:
    """Returns the error for a caller that waits for a result: `RequestFailed` if `error` is the
    failure of a sync action, which has no log, and `error` otherwise."""
    if error.code in (ErrorCode.PROCESSING_FAILED, ErrorCode.TIMEOUT):
        return RequestFailed(request_id, Failure(error.code, error.message))
    return error
