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
from streamer._tokens import TokenSource
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

_logger = logging.getLogger("streamer.websocket")


async def keep_connected(
    url: str, tokens: TokenSource, session: Session, retry_for: float | None
) -> None:
    """Connects whenever the session wants it, until the server does not want us any more."""
    patience = Patience(retry_for)
    while True:
        while not session.wants_connection:
            session.changed.clear()
            await session.changed.wait()
        try:
            reason: Exception = await _one_connection(url, tokens, session, patience)
        except ServiceError as final:
            session.end(final)
            return
        finally:
            session.lost()
        _logger.info("the connection to %s is lost: %s", url, reason)
        if session.reconnect_after:
            await asyncio.sleep(random.uniform(0, session.reconnect_after))
            session.reconnect_after = 0.0
        elif not await patience.wait():
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
    except Exception as error:
        _logger.warning("getting a token failed", exc_info=True)
        return error
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with connect(
            url, subprotocols=[_PROTOCOL], additional_headers=headers, max_size=_MAX_FRAME_BYTES
        ) as socket:
            patience.worked()
            await _converse(socket, session)
    except InvalidStatus as error:
        _raise_if_final(error.response.status_code, error.response.body.decode(errors="replace"))
        return error
    except ConnectionClosed as error:
        if error.rcvd is not None:
            _raise_if_final(error.rcvd.code, error.rcvd.reason)
        return error
    except (OSError, ValueError, WebSocketException, asyncio.TimeoutError) as error:
        return error


async def _converse(socket: ClientConnection, session: Session) -> NoReturn:
    writing = asyncio.create_task(_write(socket, session))
    try:
        while True:
            text = await socket.recv()
            if isinstance(text, str):
                session.hear(text)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def _write(socket: ClientConnection, session: Session) -> None:
    while True:
        while session.outbox:
            await socket.send(session.outbox.popleft())
        session.changed.clear()
        await session.changed.wait()


def _raise_if_final(code: int, reason: str) -> None:
    if code in _FINAL:
        raise ServiceError(_FINAL[code], reason or f"the server closed with {code}")
