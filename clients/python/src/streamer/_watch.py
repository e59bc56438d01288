"""Watches a request and reopens lost streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc
import grpc.aio

from streamer import events
from streamer._channel import Calls, service_error
from streamer._proto import common_pb2, progress_pb2
from streamer._retry import RetryBudget, call_metadata, is_retryable, raises_if_closed
from streamer._tokens import TokenSource
from streamer.errors import ErrorCode, ServiceError
from streamer.events import Event
from streamer.model import Completed
from streamer.output import LogVerifier, contiguous


async def watch(
    calls: Calls, tokens: TokenSource, budget: RetryBudget, request_id: str, after_seq: int
) -> AsyncGenerator[Event, None]:
    """Implements `Client.watch`."""
    verifier = LogVerifier() if after_seq == 0 else None
    last_seq = after_seq
    while True:
        stream = _stream(calls, tokens, budget, request_id, last_seq)
        try:
            async for response in stream:
                for message in response.events:
                    event = events.from_proto(message)
                    contiguous(last_seq, event.seq)
                    if verifier is not None:
                        verifier.apply(event)
                    last_seq = event.seq
                    yield event
                    if isinstance(event, events.Terminal):
                        return
                if _has_ended(response.snapshot, last_seq):
                    return
        finally:
            await stream.aclose()


async def wait(
    calls: Calls, tokens: TokenSource, budget: RetryBudget, request_id: str
) -> Completed:
    """Implements `Client.wait`."""
    uid = ""
    while True:
        stream = _stream(calls, tokens, budget, request_id, None)
        try:
            async for response in stream:
                if response.HasField("snapshot"):
                    request_id, uid = response.snapshot.request_id, response.snapshot.uid
                for message in response.events:
                    event = events.from_proto(message)
                    if isinstance(event, events.Terminal):
                        return events.completed(event, request_id, uid)
        finally:
            await stream.aclose()


async def _stream(
    calls: Calls, tokens: TokenSource, budget: RetryBudget, request_id: str, after_seq: int | None
) -> AsyncGenerator[progress_pb2.WatchResponse, None]:
    """Yields the responses of one stream. Returns after a delay if the stream is lost. Raises
    `ServiceError` if a retry cannot succeed."""
    request = progress_pb2.WatchRequest(request_id=request_id, after_seq=after_seq)
    metadata = await call_metadata(tokens)
    with raises_if_closed(calls):
        call = calls.watch(request, metadata=metadata)
    received = False
    try:
        while True:
            with raises_if_closed(calls):
                response = await call.read()
            if not isinstance(response, progress_pb2.WatchResponse):
                break
            received = True
            budget.reset()
            yield response
    except grpc.aio.AioRpcError as error:
        # The token of a long stream may expire while the stream is open.
        expired = error.code() is grpc.StatusCode.UNAUTHENTICATED and received and tokens.renewable
        if not ((is_retryable(error) or expired) and await budget.wait()):
            raise service_error(error) from error
    else:
        if not await budget.wait():
            message = "the server closed every watch before the terminal event"
            raise ServiceError(ErrorCode.UNAVAILABLE, message)
    finally:
        call.cancel()


def _has_ended(snapshot: common_pb2.Request, last_seq: int) -> bool:
    ended = snapshot.state in (
        common_pb2.REQUEST_STATE_SUCCEEDED,
        common_pb2.REQUEST_STATE_FAILED,
        common_pb2.REQUEST_STATE_CANCELLED,
    )
    return ended and snapshot.last_seq <= last_seq
