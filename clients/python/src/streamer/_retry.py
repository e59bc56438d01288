"""Repeats calls that failed because the server could not be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
import grpc.aio

from streamer._backoff import Backoff
from streamer._channel import Calls, away, service_error
from streamer._tokens import BadToken, TokenSource
from streamer.errors import ErrorCode, ServiceError

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")

UNARY_SECONDS = 30.0
"""How long a call may take that has nothing to wait for."""

# How a stream ends when what is between it and the server breaks.
_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Patience:
    """How long a server that cannot be reached is tried again: full jitter between the tries."""

    def __init__(self, limit: float | None) -> None:
        """`limit` in seconds of failure without a break; None for ever."""
        self._limit = limit
        self._backoff = Backoff()
        self._since: float | None = None

    def worked(self) -> None:
        """It can be reached."""
        self._since = None
        self._backoff.reset()

    async def wait(self, at_least: float = 0.0) -> bool:
        """Waits before the next try, so many seconds at least; False, at once, when it has been
        long enough."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if self._limit is not None and now - self._since >= self._limit:
            return False
        await asyncio.sleep(at_least + self._backoff.next())
        return True


async def unary(
    calls: Calls,
    call: grpc.aio.UnaryUnaryMultiCallable[_Question, _Answer],
    question: _Question,
    tokens: TokenSource,
    patience: Patience,
    *,
    repeat: bool,
    timeout: float = UNARY_SECONDS,
) -> _Answer:
    """Makes a call; when `repeat`, until it is answered. `timeout` is that of one try, in seconds.
    Raises `ServiceError`."""
    while True:
        metadata = await metadata_of(tokens)
        try:
            with closing(calls):
                return await call(question, metadata=metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if not (repeat and away(error) and await patience.wait()):
                raise service_error(error) from error


async def metadata_of(tokens: TokenSource) -> tuple[tuple[str, str], ...]:
    """The metadata of a call. Raises `ServiceError` when the token cannot be one."""
    try:
        return await tokens.metadata()
    except BadToken as error:
        raise ServiceError(ErrorCode.UNAUTHORIZED, str(error)) from error


@contextmanager
def closing(calls: Calls) -> Iterator[None]:
    """Around what waits for a call: raises `ServiceError` when the client is closed meanwhile, or
    was before."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
        if not calls.closed or _is_cancelled():
            raise
        raise ServiceError(ErrorCode.CANCELLED, "the client was closed") from error


def _is_cancelled() -> bool:
    """Whether it is the task that was cancelled, rather than the call. Python 3.10 cannot tell."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is not None and cancelling() > 0


def is_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether a stream that ended so is to be opened again."""
    return error.code() in _LOST
