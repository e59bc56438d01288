"""Manages the attempts of a worker, and dispatches messages from the server to them. No I/O."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping

from streamer._handlers import Handler
from streamer._limits import Limits
from streamer._proto import worker_pb2
from streamer._worker.attempt import Attempt, Key, handle_unknown_action

STOPPING = "the worker is shutting down"
_INTERRUPT_TIMEOUT = 5.0

_logger = logging.getLogger("streamer.worker")


class AttemptRegistry:
    """Manages the attempts of a worker, the queue of attempts with reports to send, and the
    shutdown of the worker."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.changed = asyncio.Event()
        """Set when a message can be sent or the shutdown state has changed."""
        self.connected = asyncio.Event()
        """Set while a stream is open and the server has sent `welcome`."""
        self.session_secret = b""
        """Secret that identifies later streams as this worker's; empty before `welcome`."""
        self.stopping = False
        """Whether the worker accepts no more tasks."""
        self.closed = asyncio.Event()
        """Set when nothing remains to be sent, so that the stream can be closed."""
        self._handlers = handlers
        self._limits = Limits()
        self._attempts: dict[Key, Attempt] = {}
        self._ready: OrderedDict[Key, None] = OrderedDict()
        self._running: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    # Messages to the server.

    def resumable(self) -> list[worker_pb2.Attempt]:
        """Returns the attempts that a new stream can resume: all except sync tasks."""
        keys = [attempt.key for attempt in self._attempts.values() if not attempt.sync]
        return [worker_pb2.Attempt(uid=uid, attempt=number) for uid, number in keys]

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """Returns a heartbeat that lists all attempts that run or whose end is not acknowledged."""
        attempts = [worker_pb2.Attempt(uid=uid, attempt=number) for uid, number in self._attempts]
        return worker_pb2.Heartbeat(attempts=attempts)

    def next_report(self) -> worker_pb2.Report | None:
        """Returns the next report to send, in round-robin order of the attempts with reports."""
        while self._ready:
            key, _ = self._ready.popitem(last=False)
            attempt = self._attempts.get(key)
            report = attempt.next_report() if attempt is not None else None
            if report is not None:
                self._ready[key] = None
                return report
        return None

    # Messages from the server.

    def on_welcome(self, welcome: worker_pb2.Welcome, declared: list[worker_pb2.Attempt]) -> None:
        """Handles the start of a stream: of the attempts that `hello` declared, resumes those that
        the server still assigns to this worker, and drops the others."""
        self.connected.set()
        # Older servers send no secret.
        self.session_secret = welcome.session_secret or self.session_secret
        self._limits = Limits.of(welcome)
        resumed = {(one.uid, one.attempt): one.number for one in welcome.resumed}
        for key in [(one.uid, one.attempt) for one in declared]:
            attempt = self._attempts.get(key)
            if attempt is None:
                continue
            if key in resumed:
                attempt.resume(resumed[key], self._limits)
            else:
                self._drop(key, "the server did not resume it")

    def on_stream_end(self) -> None:
        """Handles the end of a stream: drops sync tasks, which end with it."""
        self.connected.clear()
        sync = [key for key, attempt in self._attempts.items() if attempt.sync]
        for key in sync:
            self._drop(key, "its stream has ended")

    def on_task(self, task: worker_pb2.Task) -> None:
        """Starts an attempt, or releases it immediately if the worker is shutting down."""
        key = (task.uid, task.attempt)
        if key in self._attempts:
            return
        handler = self._handlers.get(task.action, handle_unknown_action)
        attempt = Attempt(task, handler, self._limits, self._mark_ready)
        self._attempts[key] = attempt
        self._empty.clear()
        if self.stopping:
            attempt.release(STOPPING)
            return
        running = attempt.start()
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    def on_acknowledgment(self, one: worker_pb2.Acknowledgment) -> None:
        """Marks reports as durable, or removes an attempt that has ended."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.acknowledge(one.number, one.max_unacknowledged_bytes)
            if one.ended:
                self._drop(attempt.key, "it has ended")

    def on_resend(self, one: worker_pb2.Resend) -> None:
        """Resends reports that the server dropped."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.resend(one.number, one.resends)

    def on_cancel(self, one: worker_pb2.Cancel) -> None:
        """Cancels an attempt."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.cancel(one.reason, one.grace_ms / 1000)

    def on_revoke(self, one: worker_pb2.Revoke) -> None:
        """Drops an attempt that this worker no longer owns."""
        if (one.uid, one.attempt) in self._attempts:
            _logger.info("attempt %s/%s was revoked: %s", one.uid, one.attempt, one.reason)
            self._drop((one.uid, one.attempt), one.reason)

    # Shutdown.

    def stop_accepting(self) -> None:
        """Stops accepting tasks."""
        self.stopping = True
        self.changed.set()

    async def wait_for_handlers(self, timeout: float) -> None:
        """Waits until no handler is running, for at most `timeout` seconds."""
        if self._running and timeout > 0:
            await asyncio.wait(self._running, timeout=timeout)

    async def release_all(self) -> None:
        """Interrupts the running handlers and releases their attempts."""
        for attempt in list(self._attempts.values()):
            attempt.release(STOPPING)
        await self.wait_for_handlers(_INTERRUPT_TIMEOUT)
        for attempt in list(self._attempts.values()):
            attempt.force_release()

    async def wait_until_empty(self, timeout: float) -> bool:
        """Waits until the end of every attempt is acknowledged, for at most `timeout` seconds.
        Returns False on timeout."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Drops the remaining attempts, and allows the stream to close."""
        for key in list(self._attempts):
            self._drop(key, STOPPING)
        self.closed.set()
        self.changed.set()

    def _mark_ready(self, attempt: Attempt) -> None:
        self._ready[attempt.key] = None
        self.changed.set()

    def _drop(self, key: Key, reason: str) -> None:
        attempt = self._attempts.pop(key)
        attempt.drop(reason)
        if not self._attempts:
            self._empty.set()
