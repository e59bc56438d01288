"""What the messages of a WebSocket mean, and connections that break rules; no Streamer server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from harness import soon
from websockets.asyncio.server import ServerConnection, serve

from streamer import BrokenLog, ErrorCode, RequestCancelled, ServiceError, events
from streamer._tokens import TokenSource
from streamer._websocket import link
from streamer._websocket.follow import Phase
from streamer._websocket.session import Session
from streamer.websocket import WebSocketClient

CONNECTED = {"type": "connected", "max_message_bytes": 1_000_000}
NAMES = {"request_id": "mine", "uid": "U"}
SUBMISSION = json.dumps({"type": "request", "id": "mine"})
NESTED = "[" * 5000 + "]" * 5000


def event(seq: int) -> dict[str, Any]:
    stamp = "2026-01-01T00:00:00.000Z"
    return {"type": "started", **NAMES, "seq": seq, "timestamp": stamp, "worker": "w"}


class Spoken:
    """A session on a connection, and what it has said."""

    def __init__(self) -> None:
        self.session = Session(TokenSource("token"), None)
        self.hear(CONNECTED)

    def hear(self, message: dict[str, Any]) -> None:
        self.session.hear(json.dumps(message))

    def said(self) -> list[str]:
        told = [json.loads(text)["type"] for text in self.session.outbox]
        self.session.outbox.clear()
        return told

    async def cancel(self) -> asyncio.Task[None]:
        cancelling = asyncio.create_task(self.session.cancel("mine", "enough"))
        await asyncio.sleep(0)
        return cancelling


REFUSAL = {
    "type": "error",
    "request_id": "mine",
    "error": {"code": "INVALID_ACTION", "message": "no"},
}


async def test_a_cancellation_ends_with_the_refusal_of_its_request() -> None:
    spoken = Spoken()
    follow = spoken.session.follow("mine", SUBMISSION, 0)
    cancelling = await spoken.cancel()
    assert spoken.said() == ["request"]
    spoken.hear(REFUSAL)
    for waiting in (cancelling, follow.next()):
        with pytest.raises(ServiceError) as raised:
            await soon(waiting)
        assert raised.value.code is ErrorCode.INVALID_ACTION


@pytest.mark.parametrize("kind", ["response", "cancelled"])
async def test_a_cancellation_ends_with_the_answer_of_a_sync_action(kind: str) -> None:
    spoken = Spoken()
    follow = spoken.session.follow("mine", SUBMISSION, 0)
    cancelling = await spoken.cancel()
    spoken.hear({"type": kind, **NAMES, "data": 1, "reason": "enough"})
    await soon(cancelling)
    if kind == "cancelled":
        with pytest.raises(RequestCancelled):
            await soon(follow.next())


async def test_a_cancellation_does_not_overtake_a_submission_that_nobody_follows() -> None:
    spoken = Spoken()
    spoken.session.unfollow(spoken.session.follow("mine", SUBMISSION, 0))
    cancelling = await spoken.cancel()
    assert spoken.said() == ["request"]
    # It may have been lost with the connection.
    spoken.session.lost()
    assert spoken.session.wants_connection
    spoken.hear(CONNECTED)
    assert spoken.said() == ["request"]
    spoken.hear({"type": "acknowledgment", **NAMES})
    assert spoken.said() == ["unsubscribe", "cancel"]
    spoken.hear({"type": "acknowledgment", **NAMES})
    await soon(cancelling)
    await asyncio.sleep(0)
    assert not spoken.session.wants_connection


async def test_a_request_is_watched_after_the_submission_that_nobody_follows() -> None:
    spoken = Spoken()
    spoken.session.unfollow(spoken.session.follow("mine", SUBMISSION, 0))
    follow = spoken.session.follow("mine", None, 0)
    assert spoken.said() == ["request"]
    spoken.hear({"type": "acknowledgment", **NAMES})
    assert spoken.said() == ["unsubscribe", "subscribe"]
    spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 1})
    assert follow.phase is Phase.LIVE


async def test_a_submission_that_was_never_sent_is_given_up_with_its_follower() -> None:
    spoken = Spoken()
    spoken.session.lost()
    spoken.session.unfollow(spoken.session.follow("mine", SUBMISSION, 0))
    assert not spoken.session.wants_connection


async def test_a_request_is_not_followed_under_both_of_its_names() -> None:
    for first, second in (("mine", "U"), ("U", "mine")):
        spoken = Spoken()
        earlier = spoken.session.follow(first, None, 0)
        spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 2})
        spoken.hear(event(1))
        later = spoken.session.follow(second, None, 2)
        spoken.hear(event(2))
        spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 3})
        with pytest.raises(ValueError, match="followed by this client already"):
            await soon(later.next())
        spoken.said()
        # The server has gone on from where the other one asked: what is missing is asked for.
        spoken.hear(event(4))
        assert spoken.said() == ["subscribe"]
        spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 4})
        for seq in (3, 4):
            spoken.hear(event(seq))
        told = [await soon(earlier.next()) for _ in range(4)]
        assert [getattr(one, "seq", None) for one in told] == [1, 2, 3, 4]
        # Events that are missing twice are missing.
        for _ in range(2):
            spoken.hear(event(6))
            spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 6})
        with pytest.raises(BrokenLog):
            await soon(earlier.next())


async def test_chunks_are_not_read_before_they_are_asked_for() -> None:
    spoken = Spoken()
    follow = spoken.session.follow("mine", None, 0)
    spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 1})
    chunk = json.dumps({**event(1), "type": "output", "data": 0})
    spoken.session.hear(chunk.replace('"data": 0', f'"data":{NESTED}'))
    output = await soon(follow.next())
    assert isinstance(output, events.Output)
    assert output.data == NESTED.encode()
    with pytest.raises(ValueError, match="nested too deeply"):
        _ = output.value


async def test_what_cannot_be_read_is_the_trouble_of_one_request() -> None:
    spoken = Spoken()
    broken, whole = (spoken.session.follow(name, None, 0) for name in ("mine", "other"))
    spoken.hear({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 2})
    progress = json.dumps({**event(1), "type": "progress", "metadata": 0})
    spoken.session.hear(progress.replace('"metadata": 0', f'"metadata": {NESTED}'))
    with pytest.raises(BrokenLog, match="nested too deeply"):
        await soon(broken.next())
    assert whole.phase is Phase.OPENING
    refusal = json.dumps({"type": "error", "request_id": "other", "error": 0})
    spoken.session.hear(refusal.replace('"error": 0', f'"error": {NESTED}'))
    with pytest.raises(ServiceError, match="nested too deeply"):
        await soon(whole.next())


@asynccontextmanager
async def served(
    handler: Callable[[ServerConnection], Awaitable[None]], **options: Any
) -> AsyncIterator[WebSocketClient]:
    """A client of a server that does as `handler` says."""
    async with serve(handler, "127.0.0.1", 0, subprotocols=[link._PROTOCOL]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with WebSocketClient(f"ws://127.0.0.1:{port}/ws", "token", **options) as client:
            yield client


async def test_a_server_that_has_too_many_is_given_time_and_given_up() -> None:
    came: list[float] = []

    async def busy(socket: ServerConnection) -> None:
        came.append(time.monotonic())
        await socket.close(4429, "too many")

    async with served(busy, retry_for=1.5) as client:
        with pytest.raises(ServiceError, match="cannot be reached") as raised:
            await soon(client.request("echo"))
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert len(came) > 1
    assert all(later - earlier >= 1 for earlier, later in pairwise(came))


async def test_what_nobody_expects_is_told_to_whoever_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(self: Session, text: str) -> None:
        raise LookupError("unheard of")

    async def greets(socket: ServerConnection) -> None:
        await socket.send(json.dumps(CONNECTED))
        await socket.wait_closed()

    monkeypatch.setattr(Session, "hear", fails)
    async with served(greets) as client:
        for _ in range(2):
            with pytest.raises(ServiceError, match="unheard of") as raised:
                await soon(client.request("echo"))
            assert raised.value.code is ErrorCode.INTERNAL_ERROR
