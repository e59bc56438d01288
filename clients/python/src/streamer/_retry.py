"""Repeats calls that failed because the server could not be reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from streamer._backoff import Backoff
from streamer._channel import service_error
from streamer._tokens import TokenSource

_Answer = TypeVar("_Answer")

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

    async def wait(self) -> bool:
        """Waits before the next try; False, at once, when it has been long enough."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if self._limit is not None and now - self._since >= self._limit:
            return False
        await asyncio.sleep(self._backoff.next())
        return True


async def unary(
    call: Callable[[tuple[tuple[str, str], ...]], Awaitable[_Answer]],
    tokens: TokenSource,
    patience: Patience,
    *,
    repeat: bool,
) -> _Answer:
    """Makes a call; when `repeat`, until it is answered. Raises `ServiceError`."""
    while True:
        metadata = await tokens.metadata()
        try:
            return await call(metadata)
        except grpc.aio.AioRpcError as error:
            away = error.code() is grpc.StatusCode.UNAVAILABLE
            if not (repeat and away and await patience.wait()):
                raise service_error(error) from error


def is_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether a stream that ended so is to be opened again."""
    return error.code() in _LOST
