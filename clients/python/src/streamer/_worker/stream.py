"""Runs one stream: exchanges `hello` and `welcome`, then concurrently reads and writes messages,
sends heartbeats and renews the token until the stream ends. Numbers in brackets are rules of
docs/worker-protocol.md."""

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
from streamer._worker.registry import AttemptRegistry

_WELCOME_TIMEOUT = 15.0
_CLOSE_TIMEOUT = 5.0
# Time between the release of the running attempts and the expiry of a token that cannot be
# refreshed (at most half of its remaining lifetime), and timeout of the acknowledgments of the
# releases.
_RELEASE_LEAD_SECONDS = 5.0
# Fraction of the remaining lifetime of a token after which the token is renewed.
_RENEWAL_FRACTION = 0.8
_MIN_RENEWAL_DELAY = 1.0

_logger = logging.getLogger("streamer.worker")


class StreamLost(Exception):
    """The worker abandoned the stream."""


class WorkStream:
    """Exchanges messages between the registry and the server over one stream."""

    def __init__(self, call: WorkCall, registry: AttemptRegistry, tokens: TokenSource) -> None:
        self.welcomed = False
        """Whether the server has sent `welcome`."""
        self.heartbeat_answered = False
        """Whether the server has answered a heartbeat."""
        self.token_expired = False
        """Whether the stream ended because its token expires and cannot be refreshed."""
        self._call = call
        self._registry = registry
        self._tokens = tokens
        self._heartbeat_due: float | None = None
        # Times at which the unanswered heartbeats were due.
        self._unanswered: deque[float] = deque()
        self._fresh_token: str | None = None
        self._token_expires_at = 0.0
        self._token_status = asyncio.Event()
        self._capacity_sent = False

    async def run(self, hello: worker_pb2.Hello) -> None:
        """Runs until the worker closes the stream. Raises `grpc.aio.AioRpcError` or `StreamLost` if
        the stream ends for a different reason."""
        declared = list(hello.attempts)
        await self._call.write(worker_pb2.WorkRequest(hello=hello))
        welcome = await self._receive_welcome()
        self.welcomed = True
        self._registry.on_welcome(welcome, declared)
        heartbeat, lease = welcome.heartbeat_ms / 1000, welcome.lease_ms / 1000
        await _race(
            self._read(),
            self._write(),
            self._send_heartbeats(heartbeat / 2, lease),
            self._renew_token(),
        )

    async def _receive_welcome(self) -> worker_pb2.Welcome:
        try:
            response = await asyncio.wait_for(self._call.read(), _WELCOME_TIMEOUT)
        except asyncio.TimeoutError:
            raise StreamLost(f"no welcome within {_WELCOME_TIMEOUT} s") from None
        if not isinstance(response, worker_pb2.WorkResponse) or not response.HasField("welcome"):
            raise StreamLost("the server's first message is not welcome")
        return response.welcome

    async def _read(self) -> None:
        while True:
            response = await self._call.read()
            if not isinstance(response, worker_pb2.WorkResponse):
                # End of the stream with status OK; `read` raises for any other status.
                if not self._registry.closed.is_set():
                    raise StreamLost("the server closed the stream")
                return
            self._handle_message(response)

    def _handle_message(self, response: worker_pb2.WorkResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "task":
            self._registry.on_task(response.task)
        elif kind == "acknowledgment":
            self._registry.on_acknowledgment(response.acknowledgment)
        elif kind == "resend":
            self._registry.on_resend(response.resend)
        elif kind == "cancel":
            self._registry.on_cancel(response.cancel)
        elif kind == "revoke":
            self._registry.on_revoke(response.revoke)
        elif kind == "heartbeat_reply":
            self._on_heartbeat_reply(response.heartbeat_reply)
        elif kind == "token_status":
            status = response.token_status
            # `time_left_ms` does not depend on the local clock; older servers do not send it.
            remaining = status.time_left_ms / 1000
            remaining = remaining or status.expire_time.ToNanoseconds() / 1e9 - time.time()
            self._token_expires_at = time.monotonic() + remaining
            self._token_status.set()
        elif kind == "drain":
            # Handlers keep running: the stream ends soon, and the worker opens a new one [24].
            _logger.info("the server is draining")

    def _on_heartbeat_reply(self, reply: worker_pb2.HeartbeatReply) -> None:
        self.heartbeat_answered = True
        if self._unanswered:
            self._unanswered.popleft()
        for cancel in reply.cancelled:
            self._registry.on_cancel(cancel)
        for revoke in reply.revoked:
            self._registry.on_revoke(revoke)

    async def _write(self) -> None:
        while True:
            request = self._next_request()
            if request is not None:
                await self._call.write(request)
            elif self._registry.closed.is_set():
                await self._call.done_writing()
                await asyncio.sleep(_CLOSE_TIMEOUT)
                return
            else:
                self._registry.changed.clear()
                await self._registry.changed.wait()

    def _next_request(self) -> worker_pb2.WorkRequest | None:
        """Returns the next message to send: control messages first, then reports."""
        if self._fresh_token is not None:
            refresh = worker_pb2.RefreshToken(token=self._fresh_token)
            self._fresh_token = None
            return worker_pb2.WorkRequest(refresh_token=refresh)
        if self._registry.stopping and not self._capacity_sent:
            self._capacity_sent = True
            return worker_pb2.WorkRequest(capacity=worker_pb2.Capacity(slots=0))
        if self._heartbeat_due is not None:
            self._unanswered.append(self._heartbeat_due)
            self._heartbeat_due = None
            return worker_pb2.WorkRequest(heartbeat=self._registry.heartbeat())
        report = self._registry.next_report()
        return None if report is None else worker_pb2.WorkRequest(report=report)

    async def _send_heartbeats(self, interval: float, lease: float) -> None:
        """Sends heartbeats twice as often as the server requires [6]. Raises `StreamLost` if none
        is answered for the duration of a lease [7]."""
        now = time.monotonic()
        while True:
            before = now
            await asyncio.sleep(interval)
            now = time.monotonic()
            oldest = self._unanswered[0] if self._unanswered else self._heartbeat_due
            # If the event loop was blocked, replies may have arrived but not been read yet.
            paused = now - before > 2 * interval
            if paused:
                blocked = now - before - interval
                message = "no heartbeat for %.1f s: a handler blocked the event loop"
                _logger.warning(message, blocked)
            elif oldest is not None and now - oldest > lease:
                raise StreamLost(f"no heartbeat answered for {lease} s")
            if self._heartbeat_due is None:
                self._heartbeat_due = now
                self._registry.changed.set()

    async def _renew_token(self) -> None:
        """Sends a fresh token before the token of the stream expires [3]."""
        while True:
            await self._token_status.wait()
            self._token_status.clear()
            remaining = self._token_expires_at - time.monotonic()
            if not self._tokens.renewable:
                await self._release_before_expiry(remaining)
                continue
            await asyncio.sleep(max(remaining * _RENEWAL_FRACTION, _MIN_RENEWAL_DELAY))
            try:
                self._fresh_token = await self._tokens.get()
            except Exception:
                _logger.warning("failed to get a fresh token", exc_info=True)
                self._token_status.set()
            self._registry.changed.set()

    async def _release_before_expiry(self, remaining: float) -> None:
        """Releases the running attempts before a token that cannot be refreshed expires, and closes
        the stream."""
        _logger.warning(
            "the token expires in %d s and cannot be refreshed: before that, the worker releases"
            " its running attempts and exits; pass a function that returns fresh tokens, such as"
            " token_file",
            remaining,
        )
        await asyncio.sleep(max(remaining - _RELEASE_LEAD_SECONDS, remaining / 2))
        self.token_expired = True
        self._registry.stop_accepting()
        await self._registry.release_all()
        await self._registry.wait_until_empty(_RELEASE_LEAD_SECONDS)
        self._registry.close()
        # `_write` closes the stream.
        await asyncio.Event().wait()


async def _race(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Runs coroutines until one of them ends, cancels the others, and raises the first error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
