"""Opens WebSocket connections, and reconnects while the session needs a connection."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import NoReturn

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from streamer._retry import RetryBudget
from streamer._tokens import InvalidToken, TokenSource
from streamer._websocket.session import Session
from streamer.errors import ErrorCode, ServiceError

_PROTOCOL = Subprotocol("streamer.v1.json")
_MAX_FRAME_BYTES = 256 * 1024 * 1024
# Close codes and HTTP status codes after which a reconnect with the same configuration would fail.
_FATAL_CODES = {
    4400: ErrorCode.VALIDATION_ERROR,
    4401: ErrorCode.UNAUTHORIZED,
    4403: ErrorCode.FORBIDDEN,
    400: ErrorCode.VALIDATION_ERROR,
    401: ErrorCode.UNAUTHORIZED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
}
# Close code for too many connections or too many messages. The server may close a connection with
# this code after a successful handshake.
_RATE_LIMITED = 4429
# Additional delay before a reconnect after close code `_RATE_LIMITED`, in seconds.
_RATE_LIMITED_DELAY = 1.0
# Time for which a connection must stay open after `connected` to reset the retry budget.
_STABLE_SECONDS = 3.0

_logger = logging.getLogger("streamer.websocket")


async def keep_connected(
    url: str, tokens: TokenSource, session: Session, retry_for: float | None
) -> None:
    """Connects while the session needs a connection, until a fatal error closes the session."""
    try:
        await _reconnect_loop(url, tokens, session, retry_for)
    except ServiceError as fatal:
        session.close(fatal)
    except Exception as error:
        # Close the session, so that no caller waits for it indefinitely.
        _logger.exception("connection to %s failed", url)
        message = f"the connection failed: {type(error).__name__}: {error}"
        session.close(ServiceError(ErrorCode.INTERNAL_ERROR, message))


async def _reconnect_loop(
    url: str, tokens: TokenSource, session: Session, retry_for: float | None
) -> None:
    """Runs one connection at a time. Raises `ServiceError` if a reconnect cannot succeed."""
    budget = RetryBudget(retry_for)
    while True:
        while not session.needs_connection:
            session.changed.clear()
            await session.changed.wait()
        try:
            reason = await _run_connection(url, tokens, session, budget)
        finally:
            session.on_disconnect()
        _logger.info("connection to %s lost: %s", url, reason)
        if session.reconnect_after:
            await asyncio.sleep(random.uniform(0, session.reconnect_after))
            session.reconnect_after = 0.0
        elif not await budget.wait(_RATE_LIMITED_DELAY if _is_rate_limited(reason) else 0.0):
            message = f"{url} cannot be reached: {reason or type(reason).__name__}"
            session.fail_all(ServiceError(ErrorCode.UNAVAILABLE, message))
            budget = RetryBudget(retry_for)


async def _run_connection(
    url: str, tokens: TokenSource, session: Session, budget: RetryBudget
) -> Exception:
    """Runs one connection until it is lost, and returns the reason. Raises `ServiceError` if a
    reconnect cannot succeed."""
    try:
        token = await tokens.get()
    except InvalidToken as error:
        raise ServiceError(ErrorCode.UNAUTHORIZED, str(error)) from error
    except Exception as error:
        _logger.warning("failed to get a token", exc_info=True)
        return error
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with connect(
            url, subprotocols=[_PROTOCOL], additional_headers=headers, max_size=_MAX_FRAME_BYTES
        ) as socket:
            await _read_and_write(socket, session, budget)
    except InvalidStatus as error:
        _raise_if_fatal(error.response.status_code, error.response.body.decode(errors="replace"))
        return error
    except ConnectionClosed as error:
        if error.rcvd is not None:
            _raise_if_fatal(error.rcvd.code, error.rcvd.reason)
        return error
    except (OSError, ValueError, WebSocketException, asyncio.TimeoutError) as error:
        return error
    raise AssertionError("a connection ends with an exception")


async def _read_and_write(socket: ClientConnection, session: Session, budget: RetryBudget) -> None:
    """Reads and writes messages concurrently until one of the two fails, and raises its error."""
    tasks = [
        asyncio.create_task(_read(socket, session, budget)),
        asyncio.create_task(_write(socket, session)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _read(socket: ClientConnection, session: Session, budget: RetryBudget) -> NoReturn:
    stable_timer: asyncio.TimerHandle | None = None
    try:
        while True:
            text = await socket.recv()
            if isinstance(text, str):
                session.handle_message(text)
            if stable_timer is None and session.connected:
                loop = asyncio.get_running_loop()
                stable_timer = loop.call_later(_STABLE_SECONDS, budget.reset)
    finally:
        if stable_timer is not None:
            stable_timer.cancel()


async def _write(socket: ClientConnection, session: Session) -> NoReturn:
    while True:
        while session.outbox:
            await socket.send(session.outbox.popleft())
        session.changed.clear()
        await session.changed.wait()


def _is_rate_limited(reason: Exception) -> bool:
    """Returns whether the server rejected the connection because of a rate or connection limit."""
    if isinstance(reason, InvalidStatus):
        return reason.response.status_code == 429
    return (
        isinstance(reason, ConnectionClosed)
        and reason.rcvd is not None
        and reason.rcvd.code == _RATE_LIMITED
    )


def _raise_if_fatal(code: int, reason: str) -> None:
    if code in _FATAL_CODES:
        message = reason or f"the server closed the connection with code {code}"
        raise ServiceError(_FATAL_CODES[code], message)
