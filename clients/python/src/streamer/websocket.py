"""The WebSocket client, for programs outside: many requests over one connection, which may break.

Needs the extra `websocket`: `pip install streamer-client[websocket]`.
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
from streamer._websocket.follow import Follow, Response
from streamer._websocket.link import keep_connected
from streamer._websocket.session import Session
from streamer.action import Seconds, seconds
from streamer.errors import ErrorCode, ServiceError, sync_failure
from streamer.events import Event

__all__ = ["WebSocketClient"]


@final
class WebSocketClient:
    """A client of one gateway; use it as an async context manager, for any number of requests at
    once.

    `url` is `ws://host:port/ws` or `wss://…`; `token` a JWT, or an async callable that returns a
    fresh one: it is asked for each connection, and when the token in use is about to expire. The
    connection is made when it is first needed and, when it is lost, made again with full jitter:
    what was not acknowledged is sent again, and events are resumed where they broke off. Methods
    raise `ServiceError` when the server refuses, closes with 4400, 4401 or 4403 (which is final),
    or cannot be reached for `retry_for` seconds (None: ever).
    """

    def __init__(self, url: str, token: Token, *, retry_for: float | None = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"url: must look like ws://host:port/ws, is {url!r}")
        self._url = url
        self._tokens = TokenSource(token)
        self._retry_for = retry_for
        self._session = Session(self._tokens, retry_for)
        self._link: asyncio.Task[None] | None = None

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
        """Closes the connection. Requests on the server go on; calls that wait raise
        `ServiceError`."""
        self._session.end(ServiceError(ErrorCode.CANCELLED, "the client was closed"))
        if self._link is not None:
            self._link.cancel()
            await asyncio.gather(self._link, return_exceptions=True)

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
        """Asks for an action, sees it to its end, and returns its result.

        The arguments are those of `Client.run`. Without an `id` a random one is used, so that the
        request can be sent again. Cancelling this call does not cancel the request. Raises
        `RequestFailed`, `RequestCancelled`, and `BrokenLog` when events or output are missing.
        """
        request_id = id or uuid.uuid4().hex
        message = _submission(request_id, action, payload, priority, delay, metadata)
        follow = self._follow(request_id, message, 0)
        callbacks = Callbacks(on_progress, on_output, on_retry)
        try:
            while True:
                arrived = await self._next(follow)
                if isinstance(arrived, Response):
                    return _value(arrived)
                await callbacks.tell(arrived)
                if isinstance(arrived, events.Terminal):
                    return events.completed(arrived, request_id, "").unwrap()
        except ServiceError as error:
            raise sync_failure(error, request_id) from error
        finally:
            self._session.unfollow(follow)

    async def watch(self, request_id: str, after_seq: int = 0) -> AsyncGenerator[Event, None]:
        """The events of a request after `after_seq`, past and to come, up to its terminal one.

        `seq` is checked to be contiguous and, when all events are read (`after_seq` 0), the output
        is checked against the proof in the terminal event: raises `BrokenLog` otherwise. A reader
        that is slow holds up nobody else. Ending it cancels nothing.
        """
        follow = self._follow(request_id, None, after_seq)
        try:
            while True:
                try:
                    event = await self._next(follow)
                except EOFError:
                    return
                if isinstance(event, Response):
                    continue
                yield event
                if isinstance(event, events.Terminal):
                    return
        finally:
            self._session.unfollow(follow)

    async def cancel(self, request_id: str, reason: str = "") -> None:
        """Asks that a request end; returns once the server has heard it. A running one ends when
        its handler notices: its terminal event tells. Cancelling what has ended changes nothing."""
        self._connect()
        await self._session.cancel(request_id, reason)

    def _follow(self, request_id: str, submission: str | None, after_seq: int) -> Follow:
        follow = self._session.follow(request_id, submission, after_seq)
        self._connect()
        return follow

    async def _next(self, follow: Follow) -> Event | Response:
        if follow.has_caught_up:
            self._session.caught_up(follow)
        return await follow.next()

    def _connect(self) -> None:
        if self._link is None:
            running = keep_connected(self._url, self._tokens, self._session, self._retry_for)
            self._link = asyncio.create_task(running, name=f"websocket {self._url}")


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
    """The message, with payload and metadata as the very JSON that they are."""
    told: dict[str, Any] = {"type": "request", "id": request_id, "action": action}
    if content is not None:
        told["payload"] = content
    if metadata is not None:
        told["metadata"] = metadata
    if priority:
        told["priority"] = priority
    if delay is not None:
        told["delay_ms"] = round(seconds(delay) * 1000)
    told |= _tracing.headers()
    texts = (f'"{name}":{payload.encode_json(one).decode()}' for name, one in told.items())
    return "{" + ",".join(texts) + "}"
