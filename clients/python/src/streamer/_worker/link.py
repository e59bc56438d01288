"""One stream after another, for as long as the worker lives [5]."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from streamer._backoff import Backoff
from streamer._channel import open_channel, open_work, parse_server
from streamer._proto import worker_pb2
from streamer._tokens import BadToken, TokenSource
from streamer._worker.conversation import Conversation, StreamLost
from streamer._worker.core import Core
from streamer.errors import WorkerRefused

# Before `welcome`, these mean that repeating does not help.
_FINAL = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
}
# What ended a stream with one of these was probably said by us, and will be said again [5].
_OURS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_logger = logging.getLogger("streamer.worker")


TOKEN_EXPIRED = "the token has expired and cannot be renewed; give a function that returns fresh tokens, such as token_file"


class Link:
    """Keeps the core connected."""

    def __init__(
        self, server: str, tokens: TokenSource, core: Core, hello: Callable[[], worker_pb2.Hello]
    ) -> None:
        self._server = server
        self._address = parse_server(server)
        self._tokens = tokens
        self._core = core
        self._hello = hello

    async def run(self) -> None:
        """Connects, again and again, until the core is closed. Raises `WorkerRefused`."""
        backoff = Backoff()
        while not self._core.closed.is_set():
            if await self._one_stream():
                backoff.reset()
            if not self._core.closed.is_set():
                await self._pause(backoff.next())

    async def _one_stream(self) -> bool:
        """Speaks over one stream until it ends; whether it lasted: what ended it will not end the
        next one just as soon."""
        metadata = await self._metadata()
        if metadata is None:
            return False
        # A channel of its own: nothing of a broken connection is left over.
        async with open_channel(self._address) as channel:
            call = open_work(channel, metadata)
            conversation = Conversation(call, self._core, self._tokens)
            repeats = True
            try:
                await conversation.run(self._hello())
            except StreamLost as error:
                _logger.warning("the stream to %s is given up: %s", self._server, error)
            except grpc.aio.AioRpcError as error:
                repeats = self._judge(error.code(), error.details(), conversation.welcomed)
            except asyncio.InvalidStateError:
                # Written to a stream that had ended: its status tells why.
                status = await call.code(), await call.details()
                repeats = self._judge(*status, conversation.welcomed)
            finally:
                call.cancel()
                self._core.lost()
        if conversation.token_ended:
            raise WorkerRefused(TOKEN_EXPIRED)
        return conversation.answered and repeats

    async def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        """With a token; None when there is none to be had, or the worker is to end meanwhile."""
        getting = asyncio.ensure_future(self._tokens.metadata())
        closed = asyncio.ensure_future(self._core.closed.wait())
        try:
            await asyncio.wait({getting, closed}, return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else None
        except BadToken as error:
            raise WorkerRefused(str(error)) from error
        except Exception:
            _logger.warning("getting a token failed", exc_info=True)
            return None
        finally:
            getting.cancel()
            closed.cancel()

    def _judge(self, code: grpc.StatusCode, details: str | None, welcomed: bool) -> bool:
        """Looks at how a stream ended; whether coming back soon may go better. Raises
        `WorkerRefused` when coming back is of no use."""
        told = f"{code.name}: {details}"
        # What was let in with a token that cannot be renewed is not let in again.
        expired = code is grpc.StatusCode.UNAUTHENTICATED and not self._tokens.renewable
        if (code in _FINAL and not welcomed) or expired:
            raise WorkerRefused(f"{self._server} does not take this worker: {told}")
        if code is grpc.StatusCode.ALREADY_EXISTS:
            raise WorkerRefused(f"another program uses this worker's id: {told}")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            _logger.error("the stream to %s broke a rule: %s", self._server, told)
        elif not self._core.closed.is_set():
            _logger.warning("the stream to %s ended: %s", self._server, told)
        return code not in _OURS

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._core.closed.wait(), seconds)
        except asyncio.TimeoutError:
            pass
