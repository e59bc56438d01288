"""What a handler sees of its attempt, and how it reports."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from streamer import _limits, payload
from streamer._limits import Limits, check
from streamer._proto import common_pb2
from streamer.errors import Cancelled


class Reporter(Protocol):
    """Where reports go: to a server, or to a test."""

    limits: Limits

    async def progress(self, progress: common_pb2.Progress) -> None:
        """Takes in how far it is."""

    async def output(self, chunk: common_pb2.Payload) -> None:
        """Takes in the next chunk."""

    async def checkpoint(self, data: bytes) -> None:
        """Takes in a checkpoint."""

    async def keep_alive(self) -> None:
        """Takes in a sign of life."""


@dataclass(eq=False)
class Context:
    """One attempt, as its handler sees it.

    Reports are sent in order, survive a lost connection, and wait only while too many of them are
    not yet durable. After the attempt has ended, they raise `Cancelled`. Those of a sync action are
    not kept: nobody sees them.
    """

    uid: str
    """The server's id of the request: the idempotency key for effects elsewhere."""
    request_id: str
    """The caller's own id of it."""
    tenant_id: str
    user_id: str
    action: str
    attempt: int
    """From 1. Execution is at least once."""
    payload_bytes: bytes
    """The payload as it was sent."""
    content_type: str
    """Of the payload; `application/json` as a rule."""
    checkpoint_bytes: bytes | None
    """What an earlier attempt left; None when nothing."""
    deadline: datetime | None
    """The attempt is cut off then; None when it may take for ever."""
    trace_parent: str
    """W3C `traceparent` to send with calls that the handler makes; empty when the request is not part
    of a trace. With `opentelemetry-api` installed, this place is the current context, too."""
    reporter: Reporter = field(repr=False)
    trace_state: str = ""
    """W3C `tracestate` that goes with `trace_parent`."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set once somebody has cancelled the request: end soon, by raising `Cancelled`. A handler that
    does not is interrupted by `asyncio.CancelledError` after the server's grace."""
    cancel_reason: str = ""
    """Why, as the canceller said."""

    @property
    def checkpoint(self) -> Any:
        """What an earlier attempt left, parsed; None when nothing. Raises ValueError when it is not
        JSON: see `checkpoint_bytes` then."""
        if self.checkpoint_bytes is None:
            return None
        return payload.decode_json(self.checkpoint_bytes)

    async def progress(
        self, percentage: float | None = None, message: str = "", metadata: Any = None
    ) -> None:
        """Says how far it is: 0 to 100 or None, a message for people of up to 4,096 bytes, and up
        to 64 KiB of anything JSON can write."""
        if percentage is not None and not 0 <= percentage <= 100:
            raise ValueError(f"percentage: must be 0 to 100, is {percentage}")
        size = len(message.encode())
        check("progress.message", size, _limits.MAX_PROGRESS_MESSAGE_BYTES, "4 KiB")
        progress = common_pb2.Progress(percentage=percentage, message=message)
        if metadata is not None:
            data = payload.encode_json(metadata)
            limit = _limits.MAX_PROGRESS_METADATA_BYTES
            check("progress.metadata", len(data), limit, "64 KiB")
            progress.metadata.CopyFrom(payload.to_proto(data))
        await self.reporter.progress(progress)

    async def output(self, chunk: Any) -> None:
        """Puts out the next chunk: str as `text/plain`, bytes as `application/octet-stream`,
        anything else as JSON. Raises `LimitExceeded` beyond the server's
        `max_output_chunk_bytes`."""
        content_type, data = payload.encode_chunk(chunk)
        limit = self.reporter.limits.max_output_chunk_bytes
        check("output", len(data), limit, "limits.max_output_chunk_bytes")
        await self.reporter.output(payload.to_proto(data, content_type))

    async def save_checkpoint(self, value: Any) -> None:
        """Leaves what the next attempt begins from, in place of the one before: bytes as they are,
        anything else as JSON. Raises `LimitExceeded` beyond 256 KiB."""
        data = bytes(value) if isinstance(value, (bytes, bytearray)) else payload.encode_json(value)
        check("checkpoint", len(data), _limits.MAX_CHECKPOINT_BYTES, "256 KiB")
        await self.reporter.checkpoint(data)

    async def heartbeat(self) -> None:
        """Says that the handler lives, when it has nothing else to report: for actions with a
        `heartbeat_timeout`. Every other report says so as well."""
        await self.reporter.keep_alive()

    async def sleep(self, seconds: float) -> None:
        """Sleeps. Raises `Cancelled` as soon as the request is cancelled."""
        try:
            await asyncio.wait_for(self.cancelled.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Cancelled(self.cancel_reason or "the request was cancelled")

    def raise_if_cancelled(self) -> None:
        """Raises `Cancelled` when the request is cancelled."""
        if self.cancelled.is_set():
            raise Cancelled(self.cancel_reason or "the request was cancelled")
