"""Every attempt of this worker, and what the server's messages mean for them. No I/O."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping

from streamer._handlers import Handler
from streamer._limits import Limits
from streamer._proto import worker_pb2
from streamer._worker.attempt import Attempt, Key, refuse_action

STOPPING = "the worker stops"
_HEED_SECONDS = 5.0

_logger = logging.getLogger("streamer.worker")


class Core:
    """The attempts, and who of them has something to send."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.changed = asyncio.Event()
        """There is something to send, or the worker begins or ends to stop."""
        self.connected = asyncio.Event()
        """The server has let us in, and the stream is open."""
        self.session_secret = b""
        """Proves on later streams that they are this worker's; empty before the first `welcome`."""
        self.stopping = False
        """No more tasks are wanted."""
        self.closed = asyncio.Event()
        """All is said: the stream may end."""
        self._handlers = handlers
        self._limits = Limits()
        self._attempts: dict[Key, Attempt] = {}
        self._ready: OrderedDict[Key, None] = OrderedDict()
        self._running: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    # What goes to the server.

    def resumable(self) -> list[worker_pb2.Attempt]:
        """The attempts that a new stream is to go on with."""
        lasting = [attempt.key for attempt in self._attempts.values() if not attempt.sync]
        return [worker_pb2.Attempt(uid=uid, attempt=number) for uid, number in lasting]

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """A sign of life: it names every attempt that runs, or whose end is not acknowledged."""
        named = [worker_pb2.Attempt(uid=uid, attempt=number) for uid, number in self._attempts]
        return worker_pb2.Heartbeat(attempts=named)

    def next_report(self) -> worker_pb2.Report | None:
        """The next report to send; attempts that have any take turns."""
        while self._ready:
            key, _ = self._ready.popitem(last=False)
            attempt = self._attempts.get(key)
            report = attempt.next_report() if attempt is not None else None
            if report is not None:
                self._ready[key] = None
                return report
        return None

    # What comes from the server.

    def welcome(self, welcome: worker_pb2.Welcome, named: list[worker_pb2.Attempt]) -> None:
        """A stream begins: of the attempts that `hello` named, some go on here, the others are not
        ours any more."""
        self.connected.set()
        # An older server sends none.
        self.session_secret = welcome.session_secret or self.session_secret
        self._limits = Limits.of(welcome)
        resumed = {(one.uid, one.attempt): one.number for one in welcome.resumed}
        for key in [(one.uid, one.attempt) for one in named]:
            attempt = self._attempts.get(key)
            if attempt is None:
                continue
            if key in resumed:
                attempt.resume(resumed[key], self._limits)
            else:
                self._drop(key, "the server did not resume it")

    def lost(self) -> None:
        """A stream has ended: sync tasks are lost with it."""
        self.connected.clear()
        sync = [key for key, attempt in self._attempts.items() if attempt.sync]
        for key in sync:
            self._drop(key, "its stream has ended")

    def begin(self, task: worker_pb2.Task) -> None:
        """An attempt to run. It is handed back at once when the worker stops."""
        key = (task.uid, task.attempt)
        if key in self._attempts:
            return
        handler = self._handlers.get(task.action, refuse_action)
        attempt = Attempt(task, handler, self._limits, self._mark)
        self._attempts[key] = attempt
        self._empty.clear()
        if self.stopping:
            attempt.hand_back(STOPPING)
            return
        running = attempt.start()
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    def acknowledge(self, one: worker_pb2.Acknowledgment) -> None:
        """Reports are durable, or the attempt has ended."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.acknowledge(one.number, one.max_unacknowledged_bytes)
            if one.ended:
                self._drop(attempt.key, "it has ended")

    def resend(self, one: worker_pb2.Resend) -> None:
        """The server has dropped reports."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.resend(one.number, one.resends)

    def cancel(self, one: worker_pb2.Cancel) -> None:
        """Somebody cancelled the request."""
        attempt = self._attempts.get((one.uid, one.attempt))
        if attempt is not None:
            attempt.cancel(one.reason, one.grace_ms / 1000)

    def revoke(self, one: worker_pb2.Revoke) -> None:
        """The attempt is not ours any more."""
        if (one.uid, one.attempt) in self._attempts:
            _logger.info("attempt %s/%s was revoked: %s", one.uid, one.attempt, one.reason)
            self._drop((one.uid, one.attempt), one.reason)

    # The end of the worker.

    def stop_taking(self) -> None:
        """No more tasks are wanted."""
        self.stopping = True
        self.changed.set()

    async def handlers_done(self, timeout: float) -> None:
        """Waits until no handler runs, for so many seconds at most."""
        if self._running and timeout > 0:
            await asyncio.wait(self._running, timeout=timeout)

    async def hand_back(self) -> None:
        """Interrupts the handlers that still run, and releases their attempts."""
        for attempt in list(self._attempts.values()):
            attempt.hand_back(STOPPING)
        await self.handlers_done(_HEED_SECONDS)
        for attempt in list(self._attempts.values()):
            attempt.give_up_waiting()

    async def all_ended(self, timeout: float) -> bool:
        """Waits until the end of every attempt is acknowledged, for so many seconds at most."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """All is said. What is left of attempts is dropped."""
        for key in list(self._attempts):
            self._drop(key, STOPPING)
        self.closed.set()
        self.changed.set()

    def _mark(self, attempt: Attempt) -> None:
        self._ready[attempt.key] = None
        self.changed.set()

    def _drop(self, key: Key, why: str) -> None:
        attempt = self._attempts.pop(key)
        attempt.drop(why)
        if not self._attempts:
            self._empty.set()
