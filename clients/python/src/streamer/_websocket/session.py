"""Follows the requests of a client over one connection, and dispatches its messages. No I/O."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any

from streamer._retry import RetryBudget
from streamer._tokens import TokenSource
from streamer._websocket import frames
from streamer._websocket.follower import Follower, Phase
from streamer._websocket.frames import Frame
from streamer.errors import (
    BrokenLog,
    ErrorCode,
    LimitExceeded,
    RequestCancelled,
    ServiceError,
    StreamerError,
)

# Messages about a request that are not events of its log.
_REQUEST_MESSAGES = ("acknowledgment", "subscribed", "response", "cancelled")

_logger = logging.getLogger("streamer.websocket")


class Session:
    """Manages the followed requests and pending cancellations of a client, across reconnects."""

    def __init__(self, tokens: TokenSource, retry_for: float | None) -> None:
        self.outbox: deque[str] = deque()
        """Messages to write to the connection."""
        self.changed = asyncio.Event()
        """Set when `outbox` is not empty or a connection is needed."""
        self.reconnect_after = 0.0
        """Maximum delay before the next reconnect, in seconds, if the server drains; else 0."""
        self._tokens = tokens
        self._retry_for = retry_for
        # Followers by request ID, in the order in which they were created.
        self._followers: dict[str, Follower] = {}
        # Followers without a reader whose submissions were sent, by request ID, until the server
        # responds: later messages about the same request must not overtake a submission.
        self._detached: dict[str, Follower] = {}
        # Cancellations without a response, by request ID: the message, and the future result.
        self._cancels: dict[str, tuple[str, asyncio.Future[None]]] = {}
        self._connected = False
        self._max_message_bytes: int | None = None
        self._close_error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def needs_connection(self) -> bool:
        """Whether a request or a cancellation waits for the server."""
        return bool(self._followers or self._detached or self._cancels)

    @property
    def connected(self) -> bool:
        """Whether the server has sent `connected` on the current connection."""
        return self._connected

    # Methods that the client calls.

    def follow(self, request_id: str, submission: str | None, after_seq: int) -> Follower:
        """Starts following a request. Raises the error with which the session was closed, and
        ValueError if the client already follows the request."""
        if self._close_error is not None:
            raise self._close_error
        if request_id in self._followers:
            raise ValueError(f"request {request_id} is already followed by this client")
        follower = Follower(request_id, submission, after_seq, RetryBudget(self._retry_for))
        self._followers[request_id] = follower
        self._open(follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        """Stops following a request; the request itself continues."""
        request_id = follower.request_id
        if self._followers.get(request_id) is not follower:
            return
        del self._followers[request_id]
        if follower.phase is Phase.ENDED:
            return
        if follower.is_submitting and follower.was_sent:
            self._detached[request_id] = follower
            return
        self._send_unsubscribe(follower)
        if follower.phase is Phase.OPENING:
            self._send_cancel(request_id)

    def resume(self, follower: Follower) -> None:
        """Renews the subscription of a paused follower whose reader has caught up."""
        follower.phase = Phase.OPENING
        self._open(follower)

    async def cancel(self, request_id: str, reason: str) -> None:
        """Requests cancellation, and waits until the server acknowledges it."""
        if self._close_error is not None:
            raise self._close_error
        if request_id not in self._cancels:
            message = {"type": "cancel", "request_id": request_id, "reason": reason}
            answered = asyncio.get_running_loop().create_future()
            answered.add_done_callback(lambda _: self._cancels.pop(request_id))
            self._cancels[request_id] = (json.dumps(message), answered)
            self._send_cancel(request_id)
        await asyncio.shield(self._cancels[request_id][1])

    # Changes in the state of the connection.

    def on_disconnect(self) -> None:
        """Handles the loss of the connection: messages that were sent may not have arrived."""
        self._connected = False
        self.outbox.clear()
        for follower in self._followers.values():
            follower.reopen()

    def fail_all(self, error: Exception) -> None:
        """Fails every request and cancellation, because the server cannot be reached."""
        for follower in list(self._followers.values()):
            follower.fail(error)
        self._followers.clear()
        self._detached.clear()
        for _, answered in list(self._cancels.values()):
            if not answered.done():
                answered.set_exception(error)

    def close(self, error: Exception) -> None:
        """Closes the session after a fatal error or with the client. Later calls raise `error`."""
        self._close_error = error
        self.fail_all(error)
        for task in self._tasks:
            task.cancel()

    # Messages from the server.

    def handle_message(self, text: str) -> None:
        """Dispatches one message. Raises ValueError if it is not a JSON object. A malformed message
        about one request fails only that request."""
        frame = frames.parse(text)
        kind = frame.type
        if kind == "connected":
            self._on_connected(frame)
        elif kind == "auth_expiring":
            self._spawn(self._refresh_token())
        elif kind == "draining":
            self.reconnect_after = int(frame.get("reconnect_after_ms", 0)) / 1000
        elif kind == "error" and "seq" not in frame.members:
            self._on_error(frame)
        elif kind in _REQUEST_MESSAGES or "seq" in frame.members:
            follower = self._follower_of(frame)
            if follower is not None:
                self._deliver(follower, frame)
            elif kind == "acknowledgment":
                self._on_cancel_acknowledged(*_request_ids(frame))

    def _on_connected(self, frame: Frame) -> None:
        self._connected = True
        self._max_message_bytes = frame.get("max_message_bytes")
        for follower in [*self._detached.values(), *self._followers.values()]:
            if follower.phase is Phase.OPENING:
                self._open(follower)
        for request_id in self._cancels:
            self._send_cancel(request_id)

    def _follower_of(self, frame: Frame) -> Follower | None:
        """Returns the follower of the request that a message is about. If a request has two
        followers, by `id` and by `uid`, the first receives the messages; the second fails once the
        server has responded."""
        request_id, uid = _request_ids(frame)
        if request_id in self._detached:
            return self._detached[request_id]
        by_id, by_uid = self._followers.get(request_id), self._followers.get(uid)
        if by_id is None or by_uid is None or by_id is by_uid:
            return by_id or by_uid
        first, second = sorted((by_id, by_uid), key=list(self._followers.values()).index)
        if frame.type == "subscribed":
            message = f"request {second.request_id} is already followed by this client"
            error = ValueError(f"{message}, as {first.request_id}")
            self._fail(second, error, acknowledged=True)
            del self._followers[second.request_id]
            if first.phase is Phase.PAUSED:
                self._send_unsubscribe(first)
        return first

    def _deliver(self, follower: Follower, frame: Frame) -> None:
        try:
            self._dispatch(follower, frame)
        except StreamerError as error:
            self._fail(follower, error)
            self._send_unsubscribe(follower)
        except Exception as error:
            _logger.warning("malformed message for %s", follower.request_id, exc_info=True)
            self._fail(follower, BrokenLog(f"malformed message: {error}"))
            self._send_unsubscribe(follower)

    def _dispatch(self, follower: Follower, frame: Frame) -> None:
        kind = frame.type
        if "seq" in frame.members:
            was_live = follower.phase is Phase.LIVE
            if not follower.on_event(frame):
                self._send_unsubscribe(follower)
            elif was_live and follower.phase is Phase.OPENING:
                self._open(follower)
        elif kind == "acknowledgment" and not follower.is_submitting:
            self._on_cancel_acknowledged(follower.request_id, *_request_ids(frame))
        elif kind == "acknowledgment":
            follower.on_acknowledgment()
            self._release_detached(follower)
            self._send_cancel(follower.request_id)
        elif kind == "subscribed":
            follower.on_subscribed(frame)
            self._send_cancel(follower.request_id)
        else:
            # A sync action has ended: its cancellation has no further effect.
            self._on_cancel_acknowledged(follower.request_id)
            if kind == "cancelled":
                reason = str(frame.get("reason", ""))
                follower.fail(RequestCancelled(follower.request_id, reason))
            else:
                follower.on_response(frame)
            self._release_detached(follower)

    def _fail(self, follower: Follower, error: Exception, *, acknowledged: bool = False) -> None:
        """Fails a follower. A cancellation that waits for the opening message of the follower is
        sent if the server has `acknowledged` that message, and fails otherwise."""
        opening = follower.phase is Phase.OPENING
        follower.fail(error)
        self._release_detached(follower)
        if opening and acknowledged:
            self._send_cancel(follower.request_id)
        elif opening:
            _, answered = self._cancels.get(follower.request_id, (None, None))
            if answered is not None and not answered.done():
                answered.set_exception(error)

    def _release_detached(self, follower: Follower) -> None:
        """Drops a detached submission once the server has responded to it, and opens the follower
        that waits for the same request."""
        request_id = follower.request_id
        if self._detached.get(request_id) is follower:
            del self._detached[request_id]
            if follower.phase is not Phase.ENDED:
                self._send_unsubscribe(follower)
            if request_id in self._followers:
                self._open(self._followers[request_id])

    def _on_cancel_acknowledged(self, *ids: str) -> None:
        for request_id in ids:
            answered = self._cancels[request_id][1] if request_id in self._cancels else None
            if answered is not None and not answered.done():
                answered.set_result(None)

    def _on_error(self, frame: Frame) -> None:
        error = _parse_error(frame)
        follower = self._follower_of(frame)
        _, answered = self._cancels.get(str(frame.get("request_id")), (None, None))
        # The cancellation of a request is not sent while its follower is OPENING.
        opening = follower is not None and follower.phase is Phase.OPENING
        if answered is not None and not opening:
            if not answered.done():
                answered.set_exception(error)
        elif follower is None:
            _logger.warning("the server rejected a message: %s", error)
        elif _is_transient(error):
            follower.reopen()
            self._spawn(self._retry_open(follower, error))
        else:
            self._fail(follower, error)

    async def _retry_open(self, follower: Follower, error: ServiceError) -> None:
        if not await follower.retry_budget.wait(error.retry_after or 0.0):
            self._fail(follower, error)
        elif follower.phase is Phase.OPENING and self._is_current(follower):
            self._open(follower)

    def _is_current(self, follower: Follower) -> bool:
        request_id = follower.request_id
        return follower in (self._detached.get(request_id), self._followers.get(request_id))

    async def _refresh_token(self) -> None:
        if self._tokens.renewable:
            self._send(json.dumps({"type": "auth", "token": await self._tokens.get()}))

    # Messages to the server. None is sent before the server has sent `connected`.

    def _open(self, follower: Follower) -> None:
        if self._detached.get(follower.request_id, follower) is not follower:
            return  # waits for the response to a detached submission of the same request
        text = follower.opening_message()
        limit, size = self._max_message_bytes, len(text.encode())
        if self._connected and limit is not None and size > limit:
            error = LimitExceeded("message", size, limit, "connected.max_message_bytes")
            self._fail(follower, error)
            return
        self._send(text)
        follower.was_sent = follower.was_sent or self._connected

    def _send_cancel(self, request_id: str) -> None:
        follower = self._detached.get(request_id) or self._followers.get(request_id)
        opening = follower is not None and follower.phase is Phase.OPENING
        if request_id in self._cancels and not opening:
            self._send(self._cancels[request_id][0])

    def _send_unsubscribe(self, follower: Follower) -> None:
        self._send(json.dumps({"type": "unsubscribe", "request_id": follower.request_id}))

    def _send(self, text: str) -> None:
        if self._connected:
            self.outbox.append(text)
        self.changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _logger.warning("failed to get a fresh token", exc_info=task.exception())


def _request_ids(frame: Frame) -> tuple[str, str]:
    """Returns the IDs of the request that a message is about: the caller's `id` and the `uid`."""
    return str(frame.get("request_id")), str(frame.get("uid"))


def _is_transient(error: ServiceError) -> bool:
    """Returns whether the same message may succeed later. A RATE_LIMITED error is transient only if
    it specifies a delay."""
    if error.code is ErrorCode.RATE_LIMITED:
        return error.retry_after is not None
    return error.code is ErrorCode.UNAVAILABLE


def _parse_error(frame: Frame) -> ServiceError:
    try:
        return frames.service_error(frame)
    except (AttributeError, TypeError, ValueError) as error:
        return ServiceError(ErrorCode.INTERNAL_ERROR, f"malformed error message: {error}")
