"""Context of a handler: describes its attempt, and sends its reports."""

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
    """Receives the reports of a handler: a worker, or the recorder of a test."""

    limits: Limits

    async def progress(self, progress: common_pb2.Progress) -> None:
        """Reports progress."""

    async def output(self, chunk: common_pb2.Payload) -> None:
        """Reports the next chunk of output."""

    async def checkpoint(self, data: bytes) -> None:
        """Stores a checkpoint."""

    async def keep_alive(self) -> None:
        """Reports that the handler is alive."""


@dataclass(eq=False)
class Context:
    """Context of a handler: describes its attempt, and sends its reports.

    Reports are sent in order and survive a lost connection. The methods that report block only
    while too many reports are not durable, and raise `Cancelled` once the attempt has ended.
    Reports of a sync action are discarded.
    """

    uid: str
    """Server's ID of the request; the idempotency key for side effects in other systems."""
    request_id: str
    """Caller's ID of the request."""
    tenant_id: str
    user_id: str
    action: str
    attempt: int
    """Number of the attempt, from 1. Execution is at least once."""
    payload_bytes: bytes
    """Exact bytes of the payload."""
    content_type: str
    """Content type of the payload, usually `application/json`."""
    checkpoint_bytes: bytes | None
    """Checkpoint that an earlier attempt saved; None if no checkpoint was saved."""
    deadline: datetime | None
    """Time at which the attempt times out; None if it has no time limit."""
    trace_parent: str
    """W3C `traceparent` to send with calls that the handler makes; empty if the request is not part
    of a trace. With `opentelemetry-api` installed, it is also the current context."""
    reporter: Reporter = field(repr=False)
    trace_state: str = ""
    """W3C `tracestate` that belongs to `trace_parent`."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Event that is set when the request is cancelled. The handler should then raise `Cancelled`;
    after the server's grace period, it is interrupted with `asyncio.CancelledError`."""
    cancel_reason: str = ""
    """Reason given with the cancellation."""

    @property
    def checkpoint(self) -> Any:
        """Parsed checkpoint of an earlier attempt; None if no checkpoint was saved. Raises
        ValueError if the checkpoint is not JSON: use `checkpoint_bytes` instead."""
        if self.checkpoint_bytes is None:
            return None
        return payload.decode_json(self.checkpoint_bytes)

    async def progress(
        self, percentage: float | None = None, message: str = "", metadata: Any = None
    ) -> None:
        """Reports progress: a percentage from 0 to 100 or None, a human-readable message of at most
        4,096 bytes, and JSON-encodable metadata of at most 64 KiB."""
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
        """Sends the next chunk of output: str as `text/plain`, bytes as `application/octet-stream`,
        anything else as JSON. Raises `LimitExceeded` if the chunk exceeds the server's
        `limits.max_output_chunk_bytes`."""
        content_type, data = payload.encode_chunk(chunk)
        limit = self.reporter.limits.max_output_chunk_bytes
        check("output", len(data), limit, "limits.max_output_chunk_bytes")
        await self.reporter.output(payload.to_proto(data, content_type))

    async def save_checkpoint(self, value: Any) -> None:
        """Saves the state from which the next attempt starts, replacing the previous checkpoint.
        Bytes are saved unchanged, any other value as JSON. Raises `LimitExceeded` if the state
        exceeds 256 KiB."""
        data = bytes(value) if isinstance(value, (bytes, bytearray)) else payload.encode_json(value)
        check("checkpoint", len(data), _limits.MAX_CHECKPOINT_BYTES, "256 KiB")
        await self.reporter.checkpoint(data)

    async def heartbeat(self) -> None:
        """Reports that the handler is alive, for actions with a `heartbeat_timeout`. Every other
        report also counts as a heartbeat."""
        await self.reporter.keep_alive()

    async def sleep(self, seconds: float) -> None:
        """Sleeps for `seconds`. Raises `Cancelled` as soon as the request is cancelled."""
        try:
            await asyncio.wait_for(self.cancelled.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Cancelled(self.cancel_reason or "the request was cancelled")

    def raise_if_cancelled(self) -> None:
        """Raises `Cancelled` if the request is cancelled."""
        if self.cancelled.is_set():
            raise Cancelled(self.cancel_reason or "the request was cancelled")
