"""One connection after another, for as long as there is something to be had from the server."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import NoReturn

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from streamer._retry import Patience
from streamer._tokens import BadToken, TokenSource
from streamer._websocket.session import Session
from streamer.errors import ErrorCode, ServiceError

_PROTOCOL = Subprotocol("streamer.v1.json")
_MAX_FRAME_BYTES = 256 * 1024 * 1024
# With these close codes, and HTTP statuses, coming back as we are does not help.
_FINAL = {
    4400: ErrorCode.VALIDATION_ERROR,
    4401: ErrorCode.UNAUTHORIZED,
    4403: ErrorCode.FORBIDDEN,
    400: ErrorCode.VALIDATION_ERROR,
    401: ErrorCode.UNAUTHORIZED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
}
# The close code of a server with too many connections, or too many messages; a handshake is no
# sign that it has room.
_TOO_MANY = 4429
_BUSY_SECONDS = 1.0
# A connection that has lasted so long after the server's hello works.
_STEADY_SECONDS = 3.0

_logger = logging.getLogger("streamer.websocket")


async def keep_connected(
    url: str, tokens: TokenSource, session: Session, retry_for: float | None
) -> None:
    """Connects whenever the session wants it, until the server does not want us any more."""
    try:
        await _connections(url, tokens, session, retry_for)
    except ServiceError as final:
        session.end(final)
    except Exception as error:
        # Whoever waits for the connection must not wait for ever.
        _logger.exception("the connection to %s", url)
        told = f"the connection failed: {type(error).__name__}: {error}"
        session.end(ServiceError(ErrorCode.INTERNAL_ERROR, told))


async def _connections(
    url: str, tokens: TokenSource, session: Session, retry_for: float | None
) -> None:
    """One after another. Raises `ServiceError` when it is no use to come back."""
    patience = Patience(retry_for)
    while True:
        while not session.wants_connection:
            session.changed.clear()
            await session.changed.wait()
        try:
            reason = await _one_connection(url, tokens, session, patience)
        finally:
            session.lost()
        _logger.info("the connection to %s is lost: %s", url, reason)
        if session.reconnect_after:
            await asyncio.sleep(random.uniform(0, session.reconnect_after))
            session.reconnect_after = 0.0
        elif not await patience.wait(_BUSY_SECONDS if _is_busy(reason) else 0.0):
            told = f"{url} cannot be reached: {reason or type(reason).__name__}"
            session.give_up(ServiceError(ErrorCode.UNAVAILABLE, told))
            patience = Patience(retry_for)


async def _one_connection(
    url: str, tokens: TokenSource, session: Session, patience: Patience
) -> Exception:
    """Speaks over one connection until it is lost; why. Raises `ServiceError` when it is no use to
    come back."""
    try:
        token = await tokens.get()
    except BadToken as error:
        raise ServiceError(ErrorCode.UNAUTHORIZED, str(error)) from error
    except Exception as error:
        _logger.warning("getting a token failed", exc_info=True)
        return error
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with connect(
            url, subprotocols=[_PROTOCOL], additional_headers=headers, max_size=_MAX_FRAME_BYTES
        ) as socket:
            await _converse(socket, session, patience)
    except InvalidStatus as error:
        _raise_if_final(error.response.status_code, error.response.body.decode(errors="replace"))
        return error
    except ConnectionClosed as error:
        if error.rcvd is not None:
            _raise_if_final(error.rcvd.code, error.rcvd.reason)
        return error
    except (OSError, ValueError, WebSocketException, asyncio.TimeoutError) as error:
        return error
    raise AssertionError("a connection ends with an exception")


async def _converse(socket: ClientConnection, session: Session, patience: Patience) -> None:
    """Reads and writes until one of them fails; raises what it failed with."""
    sides = [
        asyncio.create_task(_read(socket, session, patience)),
        asyncio.create_task(_write(socket, session)),
    ]
    try:
        done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for side in sides:
            side.cancel()
        await asyncio.gather(*sides, return_exceptions=True)
    for side in done:
        side.result()


async def _read(socket: ClientConnection, session: Session, patience: Patience) -> NoReturn:
    steady: asyncio.TimerHandle | None = None
    try:
        while True:
            text = await socket.recv()
            if isinstance(text, str):
                session.hear(text)
            if steady is None and session.connected:
                loop = asyncio.get_running_loop()
                steady = loop.call_later(_STEADY_SECONDS, patience.worked)
    finally:
        if steady is not None:
            steady.cancel()


async def _write(socket: ClientConnection, session: Session) -> NoReturn:
    while True:
        while session.outbox:
            await socket.send(session.outbox.popleft())
        session.changed.clear()
        await session.changed.wait()


def _is_busy(reason: Exception) -> bool:
    """Whether the server has had enough of us for the moment."""
    if isinstance(reason, InvalidStatus):
        return reason.response.status_code == 429
    return (
        isinstance(reason, ConnectionClosed)
        and reason.rcvd is not None
        and reason.rcvd.code == _TOO_MANY
    )


def _raise_if_final(code: int, reason: str) -> None:
    if code in _FINAL:
        raise ServiceError(_FINAL[code], reason or f"the server closed with {code}")
