"""Retries calls that failed because the server could not be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
import grpc.aio

from streamer._backoff import Backoff
from streamer._channel import Calls, is_unreachable, service_error
from streamer._tokens import InvalidToken, TokenSource
from streamer.errors import ErrorCode, ServiceError

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")

UNARY_TIMEOUT = 30.0
"""Default timeout of one call, in seconds."""

# Status codes after which a stream can be reopened: it was lost, not rejected.
_RETRYABLE_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class RetryBudget:
    """Limits the time during which operations are retried, with full jitter between retries."""

    def __init__(self, limit: float | None) -> None:
        """`limit` is the maximum time of continuous failure, in seconds; None means no limit."""
        self._limit = limit
        self._backoff = Backoff()
        self._since: float | None = None

    def reset(self) -> None:
        """Restores the full budget after a success."""
        self._since = None
        self._backoff.reset()

    async def wait(self, at_least: float = 0.0) -> bool:
        """Waits for at least `at_least` seconds before the next retry, and returns True. If the
        budget is exhausted, returns False without waiting."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if self._limit is not None and now - self._since >= self._limit:
            return False
        await asyncio.sleep(at_least + self._backoff.next())
        return True


async def unary(
    calls: Calls,
    call: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT],
    request: _RequestT,
    tokens: TokenSource,
    budget: RetryBudget,
    *,
    repeat: bool,
    timeout: float = UNARY_TIMEOUT,
) -> _ResponseT:
    """Makes a call and, if `repeat` is set, retries it until the server responds or the budget is
    exhausted. `timeout`, in seconds, applies to each attempt. Raises `ServiceError`."""
    while True:
        metadata = await call_metadata(tokens)
        try:
            with raises_if_closed(calls):
                return await call(request, metadata=metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if not (repeat and is_unreachable(error) and await budget.wait()):
                raise service_error(error) from error


async def call_metadata(tokens: TokenSource) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call. Raises `ServiceError` if the token is malformed."""
    try:
        return await tokens.metadata()
    except InvalidToken as error:
        raise ServiceError(ErrorCode.UNAUTHORIZED, str(error)) from error


@contextmanager
def raises_if_closed(calls: Calls) -> Iterator[None]:
    """Raises `ServiceError` if the client is closed before or during the enclosed call."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
        if not calls.closed or _is_cancelled():
            raise
        raise ServiceError(ErrorCode.CANCELLED, "the client is closed") from error


def _is_cancelled() -> bool:
    """Returns whether the current task, not the call, was cancelled; False on Python 3.10."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is not None and cancelling() > 0


def is_retryable(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether a stream that ended with `error` can be reopened."""
    return error.code() in _RETRYABLE_CODES
