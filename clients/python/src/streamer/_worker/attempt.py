"""One attempt in this worker: its handler, its context, and its reports."""

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
    shorten,
)
from streamer._proto import common_pb2, worker_pb2
from streamer._worker.reports import ReportLog
from streamer.action import code_to_proto
from streamer.context import Context
from streamer.errors import Cancelled, ErrorCode, FatalError, HandlerError

Key = tuple[str, int]
"""What names an attempt: `uid` and number."""

_logger = logging.getLogger("streamer.worker")


class Attempt:
    """Runs one handler; takes in its reports as the `Reporter` of its context."""

    def __init__(
        self,
        task: worker_pb2.Task,
        handler: Handler,
        limits: Limits,
        changed: Callable[[Attempt], None],
    ) -> None:
        self.key: Key = (task.uid, task.attempt)
        self.sync = task.sync
        self.log = ReportLog(task.uid, task.attempt)
        self.limits = limits
        self.context = _context(task, self)
        self._handler = handler
        self._changed = changed
        self._room = asyncio.Event()
        # Why it is not ours any more; nothing is reported then.
        self._dropped: str | None = None
        # Why it is to be handed back.
        self._release: str | None = None
        self._interruption: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None

    # What the server and the worker have to say to it.

    def start(self) -> asyncio.Task[None]:
        """Starts the handler."""
        uid, number = self.key
        name = f"{self.context.action} {uid}/{number}"
        self._running = asyncio.create_task(self._run(), name=name)
        return self._running

    def acknowledge(self, number: int, max_unacknowledged_bytes: int = 0) -> None:
        """Reports up to this one are durable; the second number is how many bytes may be
        unacknowledged from now on, 0 for no change."""
        if max_unacknowledged_bytes > 0:
            self.limits = replace(self.limits, max_unacknowledged_bytes=max_unacknowledged_bytes)
        self.log.acknowledge(number)
        self._room.set()
        # There may be more than a server that came back with smaller limits takes at once.
        self._changed(self)

    def resume(self, number: int, limits: Limits) -> None:
        """A new stream goes on after this report."""
        self.limits = limits
        self.log.resume(number)
        self._room.set()
        self._changed(self)

    def resend(self, number: int, resends: int) -> None:
        """The server has dropped the reports after this one."""
        self.log.resend(number, resends)
        self._changed(self)

    def next_report(self) -> worker_pb2.Report | None:
        """The next report to send."""
        return self.log.next_unsent(self.limits)

    def cancel(self, reason: str, grace: float) -> None:
        """Somebody cancelled the request: the handler is told, and interrupted after the grace, in
        seconds. A repeat changes nothing."""
        if self.context.cancelled.is_set() or self._running is None:
            return
        self.context.cancel_reason = reason
        self.context.cancelled.set()
        loop = asyncio.get_running_loop()
        self._interruption = loop.call_later(grace, self._running.cancel)

    def drop(self, why: str) -> None:
        """It is not ours any more: the handler is interrupted, and nothing is reported."""
        self._dropped = why
        self._stop()

    def hand_back(self, why: str) -> None:
        """The handler is interrupted, and the attempt released, unless it has ended by itself."""
        self._release = why
        if self._running is None:
            self._finish_with(None)
        else:
            self._stop()

    def give_up_waiting(self) -> None:
        """The handler does not heed its interruption: the attempt is released all the same."""
        self._finish_with(None)

    # What its context has to say: see `Reporter`.

    async def progress(self, progress: common_pb2.Progress) -> None:
        """Makes a progress report, once there is room."""
        await self._wait_for_room()
        if not self.sync:
            self.log.add_progress(progress)
            self._changed(self)

    async def output(self, chunk: common_pb2.Payload) -> None:
        """Makes an output report, once there is room."""
        await self._wait_for_room()
        if not self.sync:
            self.log.add_output(chunk)
            self._changed(self)

    async def checkpoint(self, data: bytes) -> None:
        """Leaves a checkpoint."""
        self._check_running()
        if not self.sync:
            self.log.add_checkpoint(data)
            self._changed(self)
        await asyncio.sleep(0)

    async def keep_alive(self) -> None:
        """Says that the handler lives."""
        self._check_running()
        if not self.sync:
            self.log.add_keep_alive()
            self._changed(self)
        await asyncio.sleep(0)

    async def _wait_for_room(self) -> None:
        # A handler that never waits for anything lets the worker send all the same.
        await asyncio.sleep(0)
        self._check_running()
        while not self.log.has_room(self.limits):
            self._room.clear()
            await self._room.wait()
            self._check_running()

    def _check_running(self) -> None:
        if self._dropped is not None:
            raise Cancelled(f"the attempt is not this worker's any more: {self._dropped}")
        if self.log.finished:
            raise Cancelled("the attempt has ended: nothing can be reported any more")

    async def _run(self) -> None:
        try:
            with _tracing.handler_span(self.context) as failed:
                ending = await _handlers.run(self._handler, self.context)
                if ending.error is not None:
                    failed()
        except asyncio.CancelledError:
            told = self.context.cancelled.is_set()
            error = _handlers.cut_short() if told else _handlers.interrupted()
            ending = _handlers.Ending(error=error)
        try:
            self._finish_with(ending)
        except Exception:
            # An attempt without an end would hang for ever.
            _logger.exception("the end of %s on %s/%s", self.context.action, *self.key)
            unknown = HandlerError("the error could not be reported")
            self._finish_with(_handlers.Ending(error=unknown))

    def _finish_with(self, ending: _handlers.Ending | None) -> None:
        if self._interruption is not None:
            self._interruption.cancel()
        if self._dropped is not None or self.log.finished:
            return
        if ending is not None and ending.error is None:
            self.log.finish(result=ending.result)
        elif self._release is None:
            assert ending is not None and ending.error is not None
            self.log.finish(error=_error(ending.error))
        elif self.sync:
            # Its caller waits for an answer, and may ask again.
            error = HandlerError(self._release, code=ErrorCode.UNAVAILABLE)
            self.log.finish(error=_error(error))
        else:
            reason = shorten(self._release, MAX_REASON_BYTES)
            self.log.finish(release=worker_pb2.Release(reason=reason))
        self._changed(self)

    def _stop(self) -> None:
        if self._interruption is not None:
            self._interruption.cancel()
        self._room.set()
        if self._running is not None:
            self._running.cancel()


async def refuse_action(context: Context, payload: object) -> None:
    """The handler of an action that was not declared."""
    raise FatalError(f"this worker has no action {context.action!r}", code=ErrorCode.INVALID_ACTION)


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
    told = common_pb2.Error(
        code=code_to_proto(failure.code),
        message=shorten(failure.message, MAX_ERROR_MESSAGE_BYTES),
        retryable=failure.retryable,
    )
    details = _details(failure.details)
    if details is not None:
        told.details.CopyFrom(payload.to_proto(details))
    return told


def _details(details: object) -> bytes | None:
    """Details of an error as JSON; those that cannot be told are left out [26]."""
    if details is None:
        return None
    try:
        data = payload.encode_json(details)
    except Exception:
        _logger.warning("details of an error cannot be written as JSON", exc_info=True)
        return None
    if len(data) > MAX_ERROR_DETAILS_BYTES:
        _logger.warning("details of an error are left out: %d bytes are too many", len(data))
        return None
    return data
