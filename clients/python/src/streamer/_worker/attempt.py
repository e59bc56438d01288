"""Runs one attempt: its handler, context and reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from streamer import _handlers, _tracing, model, payload
from streamer._handlers import Handler
from streamer._limits import (
    MAX_ERROR_DETAILS_BYTES,
    MAX_ERROR_MESSAGE_BYTES,
    MAX_REASON_BYTES,
    Limits,
    truncate,
)
from streamer._proto import common_pb2, worker_pb2
from streamer._worker.report_queue import ReportQueue
from streamer.action import code_to_proto
from streamer.context import Context
from streamer.errors import Cancelled, ErrorCode, FatalError, HandlerError

Key = tuple[str, int]
"""Key of an attempt: `uid` and attempt number."""

_logger = logging.getLogger("streamer.worker")


class Attempt:
    """Runs the handler of an attempt, and receives its reports as `Reporter` of the context."""

    def __init__(
        self,
        task: worker_pb2.Task,
        handler: Handler,
        limits: Limits,
        on_change: Callable[[Attempt], None],
    ) -> None:
        self.key: Key = (task.uid, task.attempt)
        self.sync = task.sync
        self.reports = ReportQueue(task.uid, task.attempt)
        self.limits = limits
        self.context = _context(task, self)
        self._handler = handler
        self._on_change = on_change
        self._room_available = asyncio.Event()
        # Reason why the attempt was dropped, if it was. A dropped attempt sends no reports.
        self._drop_reason: str | None = None
        # Reason why the attempt is released, if it is.
        self._release_reason: str | None = None
        self._interruption: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    # Methods that the registry calls.

    def start(self) -> asyncio.Task[None]:
        """Starts the handler."""
        uid, number = self.key
        name = f"{self.context.action} {uid}/{number}"
        self._task = asyncio.create_task(self._run(), name=name)
        return self._task

    def acknowledge(self, number: int, max_unacknowledged_bytes: int = 0) -> None:
        """Removes the reports up to `number`, which are durable. `max_unacknowledged_bytes`
        replaces the current limit; 0 keeps it."""
        if max_unacknowledged_bytes > 0:
            self.limits = replace(self.limits, max_unacknowledged_bytes=max_unacknowledged_bytes)
        self.reports.acknowledge(number)
        self._room_available.set()
        # Reports may be waiting for capacity in the send window.
        self._on_change(self)

    def resume(self, number: int, limits: Limits) -> None:
        """Continues on a new stream, on which the reports after report `number` are sent."""
        self.limits = limits
        self.reports.resume(number)
        self._room_available.set()
        self._on_change(self)

    def resend(self, number: int, resends: int) -> None:
        """Resends the reports after report `number`, which the server dropped. `resends` is the
        number of `resend` messages on the current stream."""
        self.reports.resend(number, resends)
        self._on_change(self)

    def next_report(self) -> worker_pb2.Report | None:
        """Returns the next report to send; None if no report can be sent."""
        return self.reports.next_unsent(self.limits)

    def cancel(self, reason: str, grace: float) -> None:
        """Notifies the handler of the cancellation, and interrupts it after `grace` seconds. A
        repeated call has no effect."""
        if self.context.cancelled.is_set() or self._task is None:
            return
        self.context.cancel_reason = reason
        self.context.cancelled.set()
        loop = asyncio.get_running_loop()
        self._interruption = loop.call_later(grace, self._task.cancel)

    def drop(self, reason: str) -> None:
        """Interrupts the handler and sends no further reports, because this worker no longer owns
        the attempt."""
        self._drop_reason = reason
        self._interrupt()

    def release(self, reason: str) -> None:
        """Interrupts the handler and releases the attempt, unless it has ended."""
        self._release_reason = reason
        if self._task is None:
            self._finish(None)
        else:
            self._interrupt()

    def force_release(self) -> None:
        """Releases the attempt of a handler that ignored the interruption."""
        self._finish(None)

    # Implementation of `Reporter`.

    async def progress(self, progress: common_pb2.Progress) -> None:
        """Queues a progress report once the queue has capacity."""
        await self._wait_for_room()
        if not self.sync:
            self.reports.add_progress(progress)
            self._on_change(self)

    async def output(self, chunk: common_pb2.Payload) -> None:
        """Queues an output report once the queue has capacity."""
        await self._wait_for_room()
        if not self.sync:
            self.reports.add_output(chunk)
            self._on_change(self)

    async def checkpoint(self, data: bytes) -> None:
        """Queues a checkpoint."""
        self._check_running()
        if not self.sync:
            self.reports.add_checkpoint(data)
            self._on_change(self)
        await asyncio.sleep(0)

    async def keep_alive(self) -> None:
        """Queues a keep-alive."""
        self._check_running()
        if not self.sync:
            self.reports.add_keep_alive()
            self._on_change(self)
        await asyncio.sleep(0)

    async def _wait_for_room(self) -> None:
        # Yield to the event loop, so that the worker can send while a busy handler reports.
        await asyncio.sleep(0)
        self._check_running()
        while not self.reports.has_room(self.limits):
            self._room_available.clear()
            await self._room_available.wait()
            self._check_running()

    def _check_running(self) -> None:
        if self._drop_reason is not None:
            raise Cancelled(f"this worker no longer owns the attempt: {self._drop_reason}")
        if self.reports.finished:
            raise Cancelled("the attempt has ended and accepts no more reports")

    async def _run(self) -> None:
        try:
            with _tracing.handler_span(self.context) as failed:
                outcome = await _handlers.run(self._handler, self.context)
                if outcome.error is not None:
                    failed()
        except asyncio.CancelledError:
            cancelled = self.context.cancelled.is_set()
            error = _handlers.cancelled_error() if cancelled else _handlers.interrupted_error()
            outcome = _handlers.HandlerResult(error=error)
        try:
            self._finish(outcome)
        except Exception:
            # Without a final report the attempt would never end.
            _logger.exception(
                "failed to report the end of %s on %s/%s", self.context.action, *self.key
            )
            fallback = HandlerError("the error could not be reported")
            self._finish(_handlers.HandlerResult(error=fallback))

    def _finish(self, outcome: _handlers.HandlerResult | None) -> None:
        if self._interruption is not None:
            self._interruption.cancel()
        if self._drop_reason is not None or self.reports.finished:
            return
        if outcome is not None and outcome.error is None:
            self.reports.finish(result=outcome.result)
        elif self._release_reason is None:
            assert outcome is not None and outcome.error is not None
            self.reports.finish(error=_error(outcome.error))
        elif self.sync:
            # A sync action cannot be released: its caller receives an error and may retry.
            error = HandlerError(self._release_reason, code=ErrorCode.UNAVAILABLE)
            self.reports.finish(error=_error(error))
        else:
            reason = truncate(self._release_reason, MAX_REASON_BYTES)
            self.reports.finish(release=worker_pb2.Release(reason=reason))
        self._on_change(self)

    def _interrupt(self) -> None:
        if self._interruption is not None:
            self._interruption.cancel()
        self._room_available.set()
        if self._task is not None:
            self._task.cancel()


async def handle_unknown_action(context: Context, payload: object) -> None:
    """Handler for actions that this worker does not declare; fails the attempt."""
    message = f"this worker does not declare action {context.action!r}"
    raise FatalError(message, code=ErrorCode.INVALID_ACTION)


def _context(task: worker_pb2.Task, attempt: Attempt) -> Context:
    return Context(
        uid=task.uid,
        request_id=task.request_id,
        tenant_id=task.tenant_id,
        user_id=task.user_id,
        action=task.action,
        attempt=task.attempt,
        payload_bytes=payload.body(task.payload),
        content_type=task.payload.content_type or payload.JSON,
        checkpoint_bytes=task.checkpoint if task.HasField("checkpoint") else None,
        deadline=model.moment(task.deadline) if task.HasField("deadline") else None,
        trace_parent=task.trace_parent,
        trace_state=task.trace_state,
        reporter=attempt,
    )


def _error(error: HandlerError) -> common_pb2.Error:
    failure = error.failure
    message = common_pb2.Error(
        code=code_to_proto(failure.code),
        message=truncate(failure.message, MAX_ERROR_MESSAGE_BYTES),
        retryable=failure.retryable,
    )
    details = _details(failure.details)
    if details is not None:
        message.details.CopyFrom(payload.to_proto(details))
    return message


def _details(details: object) -> bytes | None:
    """Returns the details of an error as JSON; None if they are not valid JSON or too large."""
    if details is None:
        return None
    try:
        data = payload.encode_json(details)
    except Exception:
        _logger.warning("error details omitted: not encodable as JSON", exc_info=True)
        return None
    if len(data) > MAX_ERROR_DETAILS_BYTES:
        limit = MAX_ERROR_DETAILS_BYTES
        _logger.warning("error details omitted: %d bytes, the limit is %d", len(data), limit)
        return None
    return data
