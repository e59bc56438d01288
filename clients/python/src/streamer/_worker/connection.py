"""Opens `Work` streams, and reconnects until the worker is closed. Numbers in brackets are rules of
docs/worker-protocol.md."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from streamer._backoff import Backoff
from streamer._channel import open_channel, open_work, parse_server
from streamer._proto import worker_pb2
from streamer._tokens import InvalidToken, TokenSource
from streamer._worker.registry import AttemptRegistry
from streamer._worker.stream import StreamLost, WorkStream
from streamer.errors import WorkerRefused

# Status codes before `welcome` after which a retry cannot succeed [5].
_FATAL_CODES = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
}
# Status codes that a message of this worker probably caused. The worker sends that message again on
# the next stream, so the backoff is not reset [5].
_PROTOCOL_ERROR_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_logger = logging.getLogger("streamer.worker")

TOKEN_EXPIRED = (
    "the token has expired and cannot be refreshed; pass a function that returns fresh tokens, such"
    " as token_file"
)


class Connection:
    """Keeps the registry connected to the server."""

    def __init__(
        self,
        server: str,
        tokens: TokenSource,
        registry: AttemptRegistry,
        hello: Callable[[], worker_pb2.Hello],
    ) -> None:
        self._server = server
        self._address = parse_server(server)
        self._tokens = tokens
        self._registry = registry
        self._hello = hello

    async def run(self) -> None:
        """Opens one stream after another until the registry is closed. Raises `WorkerRefused`."""
        backoff = Backoff()
        while not self._registry.closed.is_set():
            if await self._run_stream():
                backoff.reset()
            if not self._registry.closed.is_set():
                await self._sleep(backoff.next())

    async def _run_stream(self) -> bool:
        """Runs one stream until it ends; returns whether the backoff can be reset."""
        metadata = await self._metadata()
        if metadata is None:
            return False
        # A separate channel for each stream, so that no state of a broken connection is reused.
        async with open_channel(self._address) as channel:
            call = open_work(channel, metadata)
            stream = WorkStream(call, self._registry, self._tokens)
            resets_backoff = True
            try:
                await stream.run(self._hello())
            except StreamLost as error:
                _logger.warning("stream to %s abandoned: %s", self._server, error)
            except grpc.aio.AioRpcError as error:
                resets_backoff = self._check_status(error.code(), error.details(), stream.welcomed)
            except asyncio.InvalidStateError:
                # A write to an ended stream raises this error; the status contains the reason.
                status = await call.code(), await call.details()
                resets_backoff = self._check_status(*status, stream.welcomed)
            finally:
                call.cancel()
                self._registry.on_stream_end()
        if stream.token_expired:
            raise WorkerRefused(TOKEN_EXPIRED)
        return stream.heartbeat_answered and resets_backoff

    async def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        """Returns the metadata of a stream, including a token; None if no token can be obtained or
        the worker is closed first."""
        getting = asyncio.ensure_future(self._tokens.metadata())
        closed = asyncio.ensure_future(self._registry.closed.wait())
        try:
            await asyncio.wait({getting, closed}, return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else None
        except InvalidToken as error:
            raise WorkerRefused(str(error)) from error
        except Exception:
            _logger.warning("failed to get a token", exc_info=True)
            return None
        finally:
            getting.cancel()
            closed.cancel()

    def _check_status(self, code: grpc.StatusCode, details: str | None, welcomed: bool) -> bool:
        """Logs why a stream ended; returns whether its status allows resetting the backoff. Raises
        `WorkerRefused` if a reconnect cannot succeed."""
        status = f"{code.name}: {details}"
        # A token that cannot be refreshed remains invalid after it has expired.
        expired = code is grpc.StatusCode.UNAUTHENTICATED and not self._tokens.renewable
        if (code in _FATAL_CODES and not welcomed) or expired:
            raise WorkerRefused(f"{self._server} rejected this worker: {status}")
        if code is grpc.StatusCode.ALREADY_EXISTS:
            raise WorkerRefused(f"another program uses this worker's ID: {status}")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            _logger.error("stream to %s violated the protocol: %s", self._server, status)
        elif not self._registry.closed.is_set():
            _logger.warning("stream to %s ended: %s", self._server, status)
        return code not in _PROTOCOL_ERROR_CODES

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._registry.closed.wait(), seconds)
        except asyncio.TimeoutError:
            pass
