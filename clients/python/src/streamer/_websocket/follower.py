"""Follows one request to its end, across reconnects. No I/O.

OPENING ── acknowledgment, subscribed ──▶ LIVE ──── queue full ────▶ PAUSED
   ▲                                       │                           │
   └──────────── connection lost ──────────┴────── queue empty ────────┘
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from streamer._retry import RetryBudget
from streamer._websocket import frames
from streamer._websocket.frames import Frame
from streamer.events import Event, Terminal
from streamer.model import RequestState
from streamer.output import LogVerifier, contiguous

# Maximum number of events queued for a slow reader; later events remain in the server's log.
_MAX_QUEUED_EVENTS = 1000


class Phase(Enum):
    """State of a follower."""

    OPENING = auto()
    """The opening message has not been sent, or has not been acknowledged."""
    LIVE = auto()
    """The server sends events."""
    PAUSED = auto()
    """The reader is slow; the follower is unsubscribed until the queue is empty."""
    ENDED = auto()
    """No more events follow."""


@dataclass(frozen=True)
class Response:
    """Result of a sync action."""

    content_type: str
    data: bytes


class Follower:
    """Follows one request, and queues its events for the reader."""

    def __init__(
        self, request_id: str, submission: str | None, after_seq: int, retry_budget: RetryBudget
    ) -> None:
        """`submission` is the message that submits the request; None if it already exists.
        `retry_budget` limits retries after transient errors of the server."""
        self.request_id = request_id
        self.phase = Phase.OPENING
        self.retry_budget = retry_budget
        self.was_sent = False
        """Whether the opening message was sent on any connection."""
        self._submission = submission
        # `seq` after which missing events were last requested again.
        self._gap_requested_after: int | None = None
        self._last_seq = after_seq
        self._verifier = LogVerifier() if after_seq == 0 else None
        self._queue: deque[Event | Response | Exception] = deque()
        self._not_empty = asyncio.Event()

    @property
    def is_submitting(self) -> bool:
        """Whether the submission has not been acknowledged yet."""
        return self._submission is not None

    def opening_message(self) -> str:
        """Returns the message to send on a new connection: the submission (with the same ID)
        until it is acknowledged, then a subscription to the events after the last one received."""
        if self._submission is not None:
            return self._submission
        subscribe = {
            "type": "subscribe",
            "request_id": self.request_id,
            "after_seq": self._last_seq,
        }
        return json.dumps(subscribe)

    def reopen(self) -> None:
        """Marks the subscription as lost, so that it is opened again."""
        if self.phase is Phase.LIVE:
            self.phase = Phase.OPENING

    def on_acknowledgment(self) -> None:
        """Handles the acknowledgment of the submission, which replaces the first event."""
        self._submission = None
        if self._last_seq == 0:
            self._last_seq = 1
            if self._verifier is not None:
                self._verifier.skip_first()
        self._go_live()

    def on_subscribed(self, frame: Frame) -> None:
        """Handles the confirmation of the subscription."""
        self._go_live()
        state = str(frame.get("state"))
        ended = state in RequestState.__members__ and RequestState(state).is_terminal
        if ended and int(frame.get("last_seq", 0)) <= self._last_seq:
            # The terminal event was received earlier: no events follow.
            self.fail(EOFError())

    def on_response(self, frame: Frame) -> None:
        """Handles the result of a sync action."""
        self._put(Response(*frames.content(frame, "data")))
        self.phase = Phase.ENDED

    def on_event(self, frame: Frame) -> bool:
        """Handles an event of the log. Returns False if the reader is too slow to receive more
        events. Raises `BrokenLog`, and the exceptions of `frames.event`.

        Missing events are requested again once (the phase is then OPENING), because a subscription
        to the same request with its other ID moves the server's position in the log.
        """
        if self.phase is not Phase.LIVE:
            return True  # the server sends it again after the next subscription
        event = frames.event(frame)
        if event.seq <= self._last_seq:
            return True
        if event.seq > self._last_seq + 1 and self._gap_requested_after != self._last_seq:
            self._gap_requested_after = self._last_seq
            self.phase = Phase.OPENING
            return True
        contiguous(self._last_seq, event.seq)
        if self._verifier is not None:
            self._verifier.apply(event)
        self._last_seq = event.seq
        self._put(event)
        if isinstance(event, Terminal):
            self.phase = Phase.ENDED
        elif len(self._queue) >= _MAX_QUEUED_EVENTS:
            self.phase = Phase.PAUSED
        return self.phase is not Phase.PAUSED

    def fail(self, error: Exception) -> None:
        """Ends the follower; the reader receives `error` after the queued events."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.ENDED
            self._put(error)

    async def next(self) -> Event | Response:
        """Returns the next event or the response. Raises the error passed to `fail`, which is
        `EOFError` if no events follow."""
        while not self._queue:
            self._not_empty.clear()
            await self._not_empty.wait()
        item = self._queue.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    @property
    def has_caught_up(self) -> bool:
        """Whether the follower is paused and the reader has emptied the queue."""
        return self.phase is Phase.PAUSED and not self._queue

    def _go_live(self) -> None:
        self.retry_budget.reset()
        if self.phase is Phase.OPENING:
            self.phase = Phase.LIVE

    def _put(self, item: Event | Response | Exception) -> None:
        self._queue.append(item)
        self._not_empty.set()
