"""The WebSocket client: many requests over one connection, with automatic reconnects.

Requires the extra `websocket`: `pip install streamer-client[websocket]`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, final
from urllib.parse import urlsplit

from streamer import _tracing, events, payload
from streamer._callbacks import Callbacks, OnOutput, OnProgress, OnRetry
from streamer._tokens import Token, TokenSource
from streamer._websocket.connection import keep_connected
from streamer._websocket.follower import Follower, Response
from streamer._websocket.session import Session
from streamer.action import Seconds, seconds
from streamer.errors import ErrorCode, ServiceError, sync_failure
from streamer.events import Event

__all__ = ["WebSocketClient"]


@final
class WebSocketClient:
    """A client of one gateway, for any number of concurrent requests; use it as an async context
    manager.

    `url` is `ws://host:port/ws` or `wss://…`; `token` is a JWT, or an async callable that returns a
    fresh one: it is called for each connection, and when the token in use is about to expire. The
    client connects on first use, and reconnects with full jitter: it sends unacknowledged messages
    again, and resumes events after the last one received. Methods raise `ServiceError` if the
    server rejects the call, closes the connection with code 4400, 4401 or 4403 (the client does not
    reconnect), or cannot be reached for `retry_for` seconds (None means no limit).
    """

    def __init__(self, url: str, token: Token, *, retry_for: float | None = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"url: must be ws://host:port/ws or wss://host:port/ws, is {url!r}")
        self._url = url
        self._tokens = TokenSource(token)
        self._retry_for = retry_for
        self._session = Session(self._tokens, retry_for)
        self._connection: asyncio.Task[None] | None = None

    async def __aenter__(self) -> WebSocketClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Pending calls raise `ServiceError`; requests on the server
        continue."""
        self._session.close(ServiceError(ErrorCode.CANCELLED, "the client is closed"))
        if self._connection is not None:
            self._connection.cancel()
            await asyncio.gather(self._connection, return_exceptions=True)

    async def request(
        self,
        action: str,
        payload: Any = None,
        *,
        on_progress: OnProgress | None = None,
        on_output: OnOutput | None = None,
        on_retry: OnRetry | None = None,
        id: str | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Submits a request, watches it until it ends, and returns its result.

        The arguments are those of `Client.run`. Without an `id`, a random ID is used, so that the
        submission can be retried. Cancelling this call does not cancel the request. Raises
        `RequestFailed`, `RequestCancelled`, and `BrokenLog` if events or output are missing.
        """
        request_id = id or uuid.uuid4().hex
        message = _submission(request_id, action, payload, priority, delay, metadata)
        follower = self._follow(request_id, message, 0)
        callbacks = Callbacks(on_progress, on_output, on_retry)
        try:
            while True:
                item = await self._next(follower)
                if isinstance(item, Response):
                    return _value(item)
                await callbacks.notify(item)
                if isinstance(item, events.Terminal):
                    return events.completed(item, request_id, "").unwrap()
        except ServiceError as error:
            raise sync_failure(error, request_id) from error
        finally:
            self._session.unfollow(follower)

    async def watch(self, request_id: str, after_seq: int = 0) -> AsyncGenerator[Event, None]:
        """Yields the events of a request after `after_seq`, past and future, up to the terminal
        event.

        Raises `BrokenLog` if an event is missing or, when all events are read (`after_seq` 0), if
        the output does not match the digest in the terminal event. A slow reader does not delay
        other requests. Closing the iterator does not cancel the request.
        """
        follower = self._follow(request_id, None, after_seq)
        try:
            while True:
                try:
                    event = await self._next(follower)
                except EOFError:
                    return
                if isinstance(event, Response):
                    continue
                yield event
                if isinstance(event, events.Terminal):
                    return
        finally:
            self._session.unfollow(follower)

    async def cancel(self, request_id: str, reason: str = "") -> None:
        """Requests cancellation, and returns once the server acknowledges it. A running request
        ends, with a terminal event, when its handler stops. Cancelling a request that has ended has
        no effect."""
        self._connect()
        await self._session.cancel(request_id, reason)

    def _follow(self, request_id: str, submission: str | None, after_seq: int) -> Follower:
        follower = self._session.follow(request_id, submission, after_seq)
        self._connect()
        return follower

    async def _next(self, follower: Follower) -> Event | Response:
        if follower.has_caught_up:
            self._session.resume(follower)
        return await follower.next()

    def _connect(self) -> None:
        if self._connection is None:
            running = keep_connected(self._url, self._tokens, self._session, self._retry_for)
            self._connection = asyncio.create_task(running, name=f"websocket {self._url}")


def _value(response: Response) -> Any:
    return payload.decode(response.content_type, response.data)


def _submission(
    request_id: str,
    action: str,
    content: Any,
    priority: int,
    delay: Seconds | None,
    metadata: dict[str, Any] | None,
) -> str:
    """Returns the submission message, in which `RawJson` values are unchanged."""
    message: dict[str, Any] = {"type": "request", "id": request_id, "action": action}
    if content is not None:
        message["payload"] = content
    if metadata is not None:
        message["metadata"] = metadata
    if priority:
        message["priority"] = priority
    if delay is not None:
        message["delay_ms"] = round(seconds(delay) * 1000)
    message |= _tracing.headers()
    texts = (f'"{name}":{payload.encode_json(one).decode()}' for name, one in message.items())
    return "{" + ",".join(texts) + "}"
