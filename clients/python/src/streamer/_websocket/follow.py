"""One request that is followed, over as many connections as it takes. No I/O.

OPENING ── acknowledgment, subscribed ──▶ LIVE ── its queue is full ──▶ PAUSED
   ▲                                       │                             │
   └───────── the connection is lost ──────┴──── its queue is empty ─────┘
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from streamer._retry import Patience
from streamer._websocket import frames
from streamer._websocket.frames import Frame
from streamer.events import Event, Terminal
from streamer.model import RequestState
from streamer.output import LogVerifier, contiguous

# Events that wait for their reader at most; beyond that they are left to the server's log.
_MAX_WAITING = 1000


class Phase(Enum):
    """Where it is."""

    OPENING = auto()
    """Its opening message is to be sent, or not answered yet."""
    LIVE = auto()
    """Events come."""
    PAUSED = auto()
    """Its reader is slow: events are not wanted until it has caught up."""
    ENDED = auto()
    """Nothing more will come."""


@dataclass(frozen=True)
class Response:
    """The result of a sync action."""

    content_type: str
    data: bytes


class Follow:
    """What is known of one request, and what waits for its reader."""

    def __init__(
        self, request_id: str, submission: str | None, after_seq: int, patience: Patience
    ) -> None:
        """`submission` is the message that submits it; None for a request that is there already.
        `patience` is that with a server that refuses for the moment."""
        self.request_id = request_id
        self.phase = Phase.OPENING
        self.patience = patience
        self.was_sent = False
        """Whether its opening message was sent on any connection."""
        self._submission = submission
        # After which seq missing events were asked for again.
        self._asked_after: int | None = None
        self._last_seq = after_seq
        self._verifier = LogVerifier() if after_seq == 0 else None
        self._waiting: deque[Event | Response | Exception] = deque()
        self._arrived = asyncio.Event()

    @property
    def is_submitting(self) -> bool:
        """Whether its submission is not acknowledged yet."""
        return self._submission is not None

    def opening(self) -> str:
        """What to say on a new connection: until the request is acknowledged it is submitted
        (again, under the same id), then its events are asked for from where they broke off."""
        if self._submission is not None:
            return self._submission
        subscribe = {
            "type": "subscribe",
            "request_id": self.request_id,
            "after_seq": self._last_seq,
        }
        return json.dumps(subscribe)

    def reopen(self) -> None:
        """Its events do not come any more, and are to be asked for again."""
        if self.phase is Phase.LIVE:
            self.phase = Phase.OPENING

    def on_acknowledgment(self) -> None:
        """The submission is durable: this stands for the first event. The others follow."""
        self._submission = None
        if self._last_seq == 0:
            self._last_seq = 1
            if self._verifier is not None:
                self._verifier.skip_first()
        self._go_live()

    def on_subscribed(self, frame: Frame) -> None:
        """The subscription begins."""
        self._go_live()
        state = str(frame.get("state"))
        ended = state in RequestState.__members__ and RequestState(state).is_terminal
        if ended and int(frame.get("last_seq", 0)) <= self._last_seq:
            # Its end was seen before: nothing will follow.
            self.fail(EOFError())

    def on_response(self, frame: Frame) -> None:
        """The answer of a sync action."""
        self._put(Response(*frames.content(frame, "data")))
        self.phase = Phase.ENDED

    def on_event(self, frame: Frame) -> bool:
        """An event of its log. Whether more are wanted. Raises `BrokenLog`, and what `frames.event`
        raises.

        Missing events are asked for again once (it is OPENING then): who asked for the same request
        under its other name has moved the server on.
        """
        if self.phase is not Phase.LIVE:
            return True  # if it is of any interest, it will be sent again
        event = frames.event(frame)
        if event.seq <= self._last_seq:
            return True
        if event.seq > self._last_seq + 1 and self._asked_after != self._last_seq:
            self._asked_after = self._last_seq
            self.phase = Phase.OPENING
            return True
        contiguous(self._last_seq, event.seq)
        if self._verifier is not None:
            self._verifier.apply(event)
        self._last_seq = event.seq
        self._put(event)
        if isinstance(event, Terminal):
            self.phase = Phase.ENDED
        elif len(self._waiting) >= _MAX_WAITING:
            self.phase = Phase.PAUSED
        return self.phase is not Phase.PAUSED

    def fail(self, error: Exception) -> None:
        """It cannot go on: its reader is told why."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.ENDED
            self._put(error)

    async def next(self) -> Event | Response:
        """What comes next. Raises what it failed with, and `EOFError` when nothing will follow."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        arrived = self._waiting.popleft()
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    @property
    def has_caught_up(self) -> bool:
        """Whether its reader was slow, and has now taken everything."""
        return self.phase is Phase.PAUSED and not self._waiting

    def _go_live(self) -> None:
        self.patience.worked()
        if self.phase is Phase.OPENING:
            self.phase = Phase.LIVE

    def _put(self, arrived: Event | Response | Exception) -> None:
        self._waiting.append(arrived)
        self._arrived.set()
