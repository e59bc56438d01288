"""All requests that are followed over one connection, and what its messages mean for them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any

from streamer._retry import Patience
from streamer._tokens import TokenSource
from streamer._websocket import frames
from streamer._websocket.follow import Follow, Phase
from streamer._websocket.frames import Frame
from streamer.errors import (
    BrokenLog,
    ErrorCode,
    LimitExceeded,
    RequestCancelled,
    ServiceError,
    StreamerError,
)

# Messages about requests that are no events.
_ABOUT_REQUESTS = ("acknowledgment", "subscribed", "response", "cancelled")

_logger = logging.getLogger("streamer.websocket")


class Session:
    """What the client wants of the server, and what is to be said for it."""

    def __init__(self, tokens: TokenSource, retry_for: float | None) -> None:
        self.outbox: deque[str] = deque()
        """What waits to be written to the connection."""
        self.changed = asyncio.Event()
        """Something waits to be written, or a connection is wanted."""
        self.reconnect_after = 0.0
        """The server stops: come back within so many seconds."""
        self._tokens = tokens
        self._retry_for = retry_for
        # In the order in which they began.
        self._follows: dict[str, Follow] = {}
        # Submissions that were sent, and are followed by nobody any more, until they are answered:
        # what is said of their requests must not overtake them.
        self._left: dict[str, Follow] = {}
        # Cancellations that are not answered yet.
        self._cancels: dict[str, tuple[str, asyncio.Future[None]]] = {}
        self._connected = False
        self._max_message_bytes: int | None = None
        self._over: Exception | None = None
        self._helpers: set[asyncio.Task[None]] = set()

    @property
    def wants_connection(self) -> bool:
        """Whether there is anything to be had from the server."""
        return bool(self._follows or self._left or self._cancels)

    @property
    def connected(self) -> bool:
        """Whether the server has said hello on the connection of now."""
        return self._connected

    # What the client asks for.

    def follow(self, request_id: str, submission: str | None, after_seq: int) -> Follow:
        """Begins to follow a request. Raises when the connection has ended for good, and ValueError
        when the request is followed already."""
        if self._over is not None:
            raise self._over
        if request_id in self._follows:
            raise ValueError(f"request {request_id} is followed by this client already")
        follow = Follow(request_id, submission, after_seq, Patience(self._retry_for))
        self._follows[request_id] = follow
        self._open(follow)
        return follow

    def unfollow(self, follow: Follow) -> None:
        """Ends to follow a request, which goes on."""
        name = follow.request_id
        if self._follows.get(name) is not follow:
            return
        del self._follows[name]
        if follow.phase is Phase.ENDED:
            return
        if follow.is_submitting and follow.was_sent:
            self._left[name] = follow
            return
        self._unsubscribe(follow)
        if follow.phase is Phase.OPENING:
            self._say_cancel(name)

    def caught_up(self, follow: Follow) -> None:
        """The reader of a paused request has taken everything: events are wanted again."""
        follow.phase = Phase.OPENING
        self._open(follow)

    async def cancel(self, request_id: str, reason: str) -> None:
        """Asks that a request end, and waits until the server has heard it."""
        if self._over is not None:
            raise self._over
        if request_id not in self._cancels:
            message = {"type": "cancel", "request_id": request_id, "reason": reason}
            answered = asyncio.get_running_loop().create_future()
            answered.add_done_callback(lambda _: self._cancels.pop(request_id))
            self._cancels[request_id] = (json.dumps(message), answered)
            self._say_cancel(request_id)
        await asyncio.shield(self._cancels[request_id][1])

    # What becomes of the connection.

    def lost(self) -> None:
        """The connection is lost: what was said may not have arrived."""
        self._connected = False
        self.outbox.clear()
        for follow in self._follows.values():
            follow.reopen()

    def give_up(self, error: Exception) -> None:
        """The server stays away: whoever waits for it is told."""
        for follow in list(self._follows.values()):
            follow.fail(error)
        self._follows.clear()
        self._left.clear()
        for _, answered in list(self._cancels.values()):
            if not answered.done():
                answered.set_exception(error)

    def end(self, error: Exception) -> None:
        """The server does not want us, or the client was closed: nothing is possible any more."""
        self._over = error
        self.give_up(error)
        for helper in self._helpers:
            helper.cancel()

    # What the server says.

    def hear(self, text: str) -> None:
        """Takes in one message. Raises ValueError when it is none. What cannot be read of a request
        is that request's trouble alone."""
        frame = frames.parse(text)
        kind = frame.type
        if kind == "connected":
            self._on_connected(frame)
        elif kind == "auth_expiring":
            self._help(self._refresh_token())
        elif kind == "draining":
            self.reconnect_after = int(frame.get("reconnect_after_ms", 0)) / 1000
        elif kind == "error" and "seq" not in frame.members:
            self._on_refusal(frame)
        elif kind in _ABOUT_REQUESTS or "seq" in frame.members:
            follow = self._followed(frame)
            if follow is not None:
                self._try_to_tell(follow, frame)
            elif kind == "acknowledgment":
                self._on_cancelling(*_names(frame))

    def _on_connected(self, frame: Frame) -> None:
        self._connected = True
        self._max_message_bytes = frame.get("max_message_bytes")
        for follow in [*self._left.values(), *self._follows.values()]:
            if follow.phase is Phase.OPENING:
                self._open(follow)
        for request_id in self._cancels:
            self._say_cancel(request_id)

    def _followed(self, frame: Frame) -> Follow | None:
        """Whose message this is. A request that is followed under both of its names is the
        first one's: the other is told so once the server has answered it."""
        request_id, uid = _names(frame)
        if request_id in self._left:
            return self._left[request_id]
        by_name, by_uid = self._follows.get(request_id), self._follows.get(uid)
        if by_name is None or by_uid is None or by_name is by_uid:
            return by_name or by_uid
        first, second = sorted((by_name, by_uid), key=list(self._follows.values()).index)
        if frame.type == "subscribed":
            told = f"request {second.request_id} is followed by this client already"
            self._fail(second, ValueError(f"{told}, as {first.request_id}"), heard=True)
            del self._follows[second.request_id]
            if first.phase is Phase.PAUSED:
                self._unsubscribe(first)
        return first

    def _try_to_tell(self, follow: Follow, frame: Frame) -> None:
        try:
            self._tell(follow, frame)
        except StreamerError as error:
            self._fail(follow, error)
            self._unsubscribe(follow)
        except Exception as error:
            _logger.warning("what came of %s cannot be read", follow.request_id, exc_info=True)
            self._fail(follow, BrokenLog(f"what came cannot be read: {error}"))
            self._unsubscribe(follow)

    def _tell(self, follow: Follow, frame: Frame) -> None:
        kind = frame.type
        if "seq" in frame.members:
            was_live = follow.phase is Phase.LIVE
            if not follow.on_event(frame):
                self._unsubscribe(follow)
            elif was_live and follow.phase is Phase.OPENING:
                self._open(follow)
        elif kind == "acknowledgment" and not follow.is_submitting:
            self._on_cancelling(follow.request_id, *_names(frame))
        elif kind == "acknowledgment":
            follow.on_acknowledgment()
            self._forget(follow)
            self._say_cancel(follow.request_id)
        elif kind == "subscribed":
            follow.on_subscribed(frame)
            self._say_cancel(follow.request_id)
        else:
            # A sync action has ended: there is nothing left to be cancelled.
            self._on_cancelling(follow.request_id)
            if kind == "cancelled":
                reason = str(frame.get("reason", ""))
                follow.fail(RequestCancelled(follow.request_id, reason))
            else:
                follow.on_response(frame)
            self._forget(follow)

    def _fail(self, follow: Follow, error: Exception, *, heard: bool = False) -> None:
        """It cannot go on. Unless the server has `heard` of the request, its cancellation, which
        waited for that, cannot either."""
        waits = follow.phase is Phase.OPENING
        follow.fail(error)
        self._forget(follow)
        if waits and heard:
            self._say_cancel(follow.request_id)
        elif waits:
            _, answered = self._cancels.get(follow.request_id, (None, None))
            if answered is not None and not answered.done():
                answered.set_exception(error)

    def _forget(self, follow: Follow) -> None:
        """The submission is answered: if nobody follows it any more, that was all, and whoever asks
        for the same request has his turn."""
        name = follow.request_id
        if self._left.get(name) is follow:
            del self._left[name]
            if follow.phase is not Phase.ENDED:
                self._unsubscribe(follow)
            if name in self._follows:
                self._open(self._follows[name])

    def _on_cancelling(self, *names: str) -> None:
        for name in names:
            answered = self._cancels[name][1] if name in self._cancels else None
            if answered is not None and not answered.done():
                answered.set_result(None)

    def _on_refusal(self, frame: Frame) -> None:
        refusal = _refusal(frame)
        follow = self._followed(frame)
        _, answered = self._cancels.get(str(frame.get("request_id")), (None, None))
        # While a request is being opened, its cancellation has not been sent.
        opening = follow is not None and follow.phase is Phase.OPENING
        if answered is not None and not opening:
            if not answered.done():
                answered.set_exception(refusal)
        elif follow is None:
            _logger.warning("a message was refused: %s", refusal)
        elif _is_passing(refusal):
            follow.reopen()
            self._help(self._open_later(follow, refusal))
        else:
            self._fail(follow, refusal)

    async def _open_later(self, follow: Follow, refusal: ServiceError) -> None:
        if not await follow.patience.wait(refusal.retry_after or 0.0):
            self._fail(follow, refusal)
        elif follow.phase is Phase.OPENING and self._is_wanted(follow):
            self._open(follow)

    def _is_wanted(self, follow: Follow) -> bool:
        name = follow.request_id
        return follow in (self._left.get(name), self._follows.get(name))

    async def _refresh_token(self) -> None:
        if self._tokens.renewable:
            self._say(json.dumps({"type": "auth", "token": await self._tokens.get()}))

    # What is said to the server: nothing before it has said hello.

    def _open(self, follow: Follow) -> None:
        if self._left.get(follow.request_id, follow) is not follow:
            return  # another submission of the same request is to be answered first
        text = follow.opening()
        limit, size = self._max_message_bytes, len(text.encode())
        if self._connected and limit is not None and size > limit:
            error = LimitExceeded("message", size, limit, "connected.max_message_bytes")
            self._fail(follow, error)
            return
        self._say(text)
        follow.was_sent = follow.was_sent or self._connected

    def _say_cancel(self, request_id: str) -> None:
        follow = self._left.get(request_id) or self._follows.get(request_id)
        if request_id in self._cancels and (follow is None or follow.phase is not Phase.OPENING):
            self._say(self._cancels[request_id][0])

    def _unsubscribe(self, follow: Follow) -> None:
        self._say(json.dumps({"type": "unsubscribe", "request_id": follow.request_id}))

    def _say(self, text: str) -> None:
        if self._connected:
            self.outbox.append(text)
        self.changed.set()

    def _help(self, work: Coroutine[Any, Any, None]) -> None:
        helper = asyncio.ensure_future(work)
        self._helpers.add(helper)
        helper.add_done_callback(self._helped)

    def _helped(self, helper: asyncio.Task[None]) -> None:
        self._helpers.discard(helper)
        if not helper.cancelled() and helper.exception() is not None:
            _logger.warning("getting a fresh token failed", exc_info=helper.exception())


def _names(frame: Frame) -> tuple[str, str]:
    """How the request of a message is named: by its caller, and by the server."""
    return str(frame.get("request_id")), str(frame.get("uid"))


def _is_passing(refusal: ServiceError) -> bool:
    """Whether the same message may be taken later: of limits, the server says when."""
    if refusal.code is ErrorCode.RATE_LIMITED:
        return refusal.retry_after is not None
    return refusal.code is ErrorCode.UNAVAILABLE


def _refusal(frame: Frame) -> ServiceError:
    try:
        return frames.refusal(frame)
    except (AttributeError, TypeError, ValueError) as error:
        return ServiceError(ErrorCode.INTERNAL_ERROR, f"a refusal cannot be read: {error}")
