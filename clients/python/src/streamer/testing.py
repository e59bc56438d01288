"""Runs a handler without a server, and records its reports.

run = await run_handler(handler, {"rows": 3})
assert run.result == {"sum": 6}
assert run.progress[-1].percentage == 100
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from streamer import _handlers, model, payload
from streamer._handlers import Handler
from streamer._limits import Limits
from streamer._proto import common_pb2
from streamer.context import Context
from streamer.errors import ErrorCode, HandlerError
from streamer.model import ProgressInfo

__all__ = ["HandlerRun", "Limits", "run_handler"]


@dataclass
class HandlerRun:
    """Reports of a handler, in order, and its result or error."""

    progress: list[ProgressInfo] = field(default_factory=list)
    output: list[Any] = field(default_factory=list)
    """Output chunks: str, bytes, or parsed JSON."""
    checkpoints: list[Any] = field(default_factory=list)
    """Checkpoints: parsed JSON, or bytes if they are not JSON."""
    heartbeats: int = 0
    """Number of heartbeats."""
    result: Any = None
    error: HandlerError | None = None
    """Error of the handler; an exception of a different type is its `__cause__`."""

    @property
    def checkpoint(self) -> Any:
        """Last checkpoint; None if no checkpoint was saved."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def cancelled(self) -> bool:
        """Whether the handler ended because of a cancellation."""
        return self.error is not None and self.error.code is ErrorCode.CANCELLED


async def run_handler(
    handler: Handler,
    content: Any = None,
    *,
    checkpoint: Any = None,
    attempt: int = 1,
    cancel_when: Callable[[HandlerRun], bool] | None = None,
    cancel_grace: float = 5.0,
    action: str = "test",
    request_id: str = "test-request",
    tenant_id: str = "test-tenant",
    user_id: str = "test-user",
    deadline: datetime | None = None,
    limits: Limits | None = None,
) -> HandlerRun:
    """Runs one attempt of `handler` with the payload `content` (None means `{}`). `checkpoint` is
    the checkpoint of an earlier attempt (bytes, or a JSON-encodable value).

    `cancel_when` is called before the handler starts and after each report. When it returns True,
    the request is cancelled: `context.cancelled` is set, and the handler is interrupted if it has
    not ended `cancel_grace` seconds later. Exceptions of the handler are recorded in `error`, not
    raised.
    """
    reporter = _Recorder(limits or Limits(), cancel_when, cancel_grace)
    context = Context(
        uid="00000000000000000000000000",
        request_id=request_id,
        tenant_id=tenant_id,
        user_id=user_id,
        action=action,
        attempt=attempt,
        payload_bytes=payload.encode_json({} if content is None else content),
        content_type=payload.JSON,
        checkpoint_bytes=_checkpoint(checkpoint),
        deadline=deadline,
        trace_parent="",
        reporter=reporter,
    )
    return await reporter.observe(handler, context)


class _Recorder:
    """Implements `Reporter` by recording reports."""

    def __init__(
        self,
        limits: Limits,
        cancel_when: Callable[[HandlerRun], bool] | None,
        cancel_grace: float,
    ) -> None:
        self.limits = limits
        self._cancel_when = cancel_when
        self._cancel_grace = cancel_grace
        self._run = HandlerRun()
        self._context: Context | None = None
        self._running: asyncio.Task[_handlers.HandlerResult] | None = None

    async def observe(self, handler: Handler, context: Context) -> HandlerRun:
        """Runs the handler and returns the recorded run."""
        self._context = context
        self._running = asyncio.ensure_future(_handlers.run(handler, context))
        try:
            self._cancel_if_due()
            outcome = await asyncio.shield(self._running)
            self._run.error = outcome.error
            self._run.result = payload.decode_json(outcome.result) if outcome.result else None
        except asyncio.CancelledError:
            if not self._running.done():
                # The test was cancelled, not the handler.
                self._running.cancel()
                raise
            cancelled = context.cancelled.is_set()
            error = _handlers.cancelled_error() if cancelled else _handlers.interrupted_error()
            self._run.error = error
        return self._run

    async def progress(self, progress: common_pb2.Progress) -> None:
        """Records progress."""
        self._run.progress.append(model.progress(progress))
        await self._reported()

    async def output(self, chunk: common_pb2.Payload) -> None:
        """Records a chunk of output."""
        self._run.output.append(payload.value(chunk))
        await self._reported()

    async def checkpoint(self, data: bytes) -> None:
        """Records a checkpoint."""
        try:
            self._run.checkpoints.append(payload.decode_json(data))
        except ValueError:
            self._run.checkpoints.append(data)
        await self._reported()

    async def keep_alive(self) -> None:
        """Counts a heartbeat."""
        self._run.heartbeats += 1
        await self._reported()

    async def _reported(self) -> None:
        self._cancel_if_due()
        await asyncio.sleep(0)

    def _cancel_if_due(self) -> None:
        context, running = self._context, self._running
        if self._cancel_when is None or context is None or running is None:
            return
        if not context.cancelled.is_set() and self._cancel_when(self._run):
            context.cancel_reason = "cancelled by the test"
            context.cancelled.set()
            asyncio.get_running_loop().call_later(self._cancel_grace, running.cancel)


def _checkpoint(value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    return payload.encode_json(value)
