"""One stream: hello, welcome, then reading, writing, heartbeats and fresh tokens side by side,
until it ends. The numbers in brackets are rules of docs/worker-protocol.md."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from streamer._channel import WorkCall
from streamer._proto import worker_pb2
from streamer._tokens import TokenSource
from streamer._worker.core import Core

_WELCOME_SECONDS = 15.0
_CLOSE_SECONDS = 5.0
# Running attempts are released this long before a token expires that cannot be renewed, or when half of the time
# is left, if that is later. Their handlers have this long to end.
_HAND_BACK_SECONDS = 5.0
# A fresh token is asked for when this part of the time of the old one has passed.
_TOKEN_AGE = 0.8
_MIN_TOKEN_SECONDS = 1.0

_logger = logging.getLogger("streamer.worker")


class StreamLost(Exception):
    """The stream is given up from this side."""


class Conversation:
    """Speaks over one stream for the core."""

    def __init__(self, call: WorkCall, core: Core, tokens: TokenSource) -> None:
        self.welcomed = False
        """Whether the server has let us in."""
        self.answered = False
        """Whether the server has answered a heartbeat: the stream has lasted."""
        self._call = call
        self._core = core
        self._tokens = tokens
        self._beat_due: float | None = None
        # When the heartbeats that are not answered yet were due.
        self._unanswered: deque[float] = deque()
        self._fresh_token: str | None = None
        self.token_ended = False
        self._token_ends = 0.0
        self._token_status = asyncio.Event()
        self._capacity_told = False

    async def run(self, hello: worker_pb2.Hello) -> None:
        """Speaks until the stream ends well, by us. Raises `grpc.aio.AioRpcError` or `StreamLost`
        when it ends otherwise."""
        named = list(hello.attempts)
        await self._call.write(worker_pb2.WorkRequest(hello=hello))
        welcome = await self._first()
        self.welcomed = True
        self._core.welcome(welcome, named)
        heartbeat, lease = welcome.heartbeat_ms / 1000, welcome.lease_ms / 1000
        # The first to end ends the others.
        await _race(
            self._read(),
            self._write(),
            self._beat(heartbeat / 2, lease),
            self._keep_token_fresh(),
        )

    async def _first(self) -> worker_pb2.Welcome:
        try:
            response = await asyncio.wait_for(self._call.read(), _WELCOME_SECONDS)
        except asyncio.TimeoutError:
            raise StreamLost("welcome did not come in time") from None
        if not isinstance(response, worker_pb2.WorkResponse) or not response.HasField("welcome"):
            raise StreamLost("the server's first message was not welcome")
        return response.welcome

    async def _read(self) -> None:
        while True:
            response = await self._call.read()
            if not isinstance(response, worker_pb2.WorkResponse):
                # The end. A status other than OK raises.
                if not self._core.closed.is_set():
                    raise StreamLost("the server ended the stream")
                return
            self._hear(response)

    def _hear(self, response: worker_pb2.WorkResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "task":
            self._core.begin(response.task)
        elif kind == "acknowledgment":
            self._core.acknowledge(response.acknowledgment)
        elif kind == "resend":
            self._core.resend(response.resend)
        elif kind == "cancel":
            self._core.cancel(response.cancel)
        elif kind == "revoke":
            self._core.revoke(response.revoke)
        elif kind == "heartbeat_reply":
            self._on_reply(response.heartbeat_reply)
        elif kind == "token_status":
            status = response.token_status
            # By the server's clock, where it says so.
            left = status.time_left_ms / 1000
            left = left or status.expire_time.ToNanoseconds() / 1e9 - time.time()
            self._token_ends = time.monotonic() + left
            self._token_status.set()
        elif kind == "drain":
            # The handlers run on: the stream ends soon, and another one is opened [24].
            _logger.info("the server stops")

    def _on_reply(self, reply: worker_pb2.HeartbeatReply) -> None:
        self.answered = True
        if self._unanswered:
            self._unanswered.popleft()
        for cancel in reply.cancelled:
            self._core.cancel(cancel)
        for revoke in reply.revoked:
            self._core.revoke(revoke)

    async def _write(self) -> None:
        while True:
            request = self._next()
            if request is not None:
                await self._call.write(request)
            elif self._core.closed.is_set():
                await self._call.done_writing()
                await asyncio.sleep(_CLOSE_SECONDS)
                return
            else:
                self._core.changed.clear()
                await self._core.changed.wait()

    def _next(self) -> worker_pb2.WorkRequest | None:
        """What to send next: what keeps the stream first, then the attempts in turn."""
        if self._fresh_token is not None:
            refresh = worker_pb2.RefreshToken(token=self._fresh_token)
            self._fresh_token = None
            return worker_pb2.WorkRequest(refresh_token=refresh)
        if self._core.stopping and not self._capacity_told:
            self._capacity_told = True
            return worker_pb2.WorkRequest(capacity=worker_pb2.Capacity(slots=0))
        if self._beat_due is not None:
            self._unanswered.append(self._beat_due)
            self._beat_due = None
            return worker_pb2.WorkRequest(heartbeat=self._core.heartbeat())
        report = self._core.next_report()
        return None if report is None else worker_pb2.WorkRequest(report=report)

    async def _beat(self, interval: float, lease: float) -> None:
        """Twice as often as the server asks [6]; without an answer the stream is given up [7]."""
        now = time.monotonic()
        while True:
            before = now
            await asyncio.sleep(interval)
            now = time.monotonic()
            oldest = self._unanswered[0] if self._unanswered else self._beat_due
            # After a pause of this program, answers may be there that it had no time to read.
            paused = now - before > 2 * interval
            if paused:
                blocked = now - before - interval
                _logger.warning("no heartbeat for %.1f s: a handler blocked the loop", blocked)
            elif oldest is not None and now - oldest > lease:
                raise StreamLost(f"no heartbeat was answered for {lease} s")
            if self._beat_due is None:
                self._beat_due = now
                self._core.changed.set()

    async def _keep_token_fresh(self) -> None:
        """Sends a fresh token before the one of the stream expires [3]."""
        while True:
            await self._token_status.wait()
            self._token_status.clear()
            left = self._token_ends - time.monotonic()
            if not self._tokens.renewable:
                await self._hand_back_before(left)
                continue
            await asyncio.sleep(max(left * _TOKEN_AGE, _MIN_TOKEN_SECONDS))
            try:
                self._fresh_token = await self._tokens.get()
            except Exception:
                _logger.warning("getting a fresh token failed", exc_info=True)
                self._token_status.set()
            self._core.changed.set()

    async def _hand_back_before(self, left: float) -> None:
        """Hands back what runs before a token expires that cannot be renewed, and ends the stream."""
        _logger.warning(
            "the token expires in %d s and cannot be renewed: before that, the worker releases"
            " its running attempts and exits; give a function that returns fresh tokens, such as token_file",
            left,
        )
        await asyncio.sleep(max(left - _HAND_BACK_SECONDS, left / 2))
        self.token_ended = True
        self._core.stop_taking()
        await self._core.hand_back()
        await self._core.all_ended(_HAND_BACK_SECONDS)
        self._core.close()
        # The writer ends the stream in order.
        await asyncio.Event().wait()


async def _race(*sides: Coroutine[Any, Any, None]) -> None:
    """Runs them until the first ends; then the others are cancelled. Raises what it raised."""
    tasks = [asyncio.ensure_future(side) for side in sides]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
