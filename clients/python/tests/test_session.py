"""WebSocket sessions, and connections to misbehaving servers; no Streamer server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from harness import within_timeout
from websockets.asyncio.server import ServerConnection, serve

from streamer import BrokenLog, ErrorCode, RequestCancelled, ServiceError, events
from streamer._tokens import TokenSource
from streamer._websocket import connection
from streamer._websocket.follower import Phase
from streamer._websocket.session import Session
from streamer.websocket import WebSocketClient

CONNECTED = {"type": "connected", "max_message_bytes": 1_000_000}
NAMES = {"request_id": "mine", "uid": "U"}
SUBMISSION = json.dumps({"type": "request", "id": "mine"})
NESTED = "[" * 5000 + "]" * 5000


def event(seq: int) -> dict[str, Any]:
    stamp = "2026-01-01T00:00:00.000Z"
    return {"type": "started", **NAMES, "seq": seq, "timestamp": stamp, "worker": "w"}


class SessionDriver:
    """Drives a connected session without I/O."""

    def __init__(self) -> None:
        self.session = Session(TokenSource("token"), None)
        self.receive(CONNECTED)

    def receive(self, message: dict[str, Any]) -> None:
        self.session.handle_message(json.dumps(message))

    def sent(self) -> list[str]:
        types = [json.loads(text)["type"] for text in self.session.outbox]
        self.session.outbox.clear()
        return types

    async def cancel(self) -> asyncio.Task[None]:
        cancelling = asyncio.create_task(self.session.cancel("mine", "enough"))
        await asyncio.sleep(0)
        return cancelling


REJECTION = {
    "type": "error",
    "request_id": "mine",
    "error": {"code": "INVALID_ACTION", "message": "no"},
}


async def test_a_cancellation_fails_with_the_rejection_of_its_request() -> None:
    driver = SessionDriver()
    follower = driver.session.follow("mine", SUBMISSION, 0)
    cancelling = await driver.cancel()
    assert driver.sent() == ["request"]
    driver.receive(REJECTION)
    for waiting in (cancelling, follower.next()):
        with pytest.raises(ServiceError) as raised:
            await within_timeout(waiting)
        assert raised.value.code is ErrorCode.INVALID_ACTION


@pytest.mark.parametrize("kind", ["response", "cancelled"])
async def test_a_cancellation_ends_with_the_response_of_a_sync_action(kind: str) -> None:
    driver = SessionDriver()
    follower = driver.session.follow("mine", SUBMISSION, 0)
    cancelling = await driver.cancel()
    driver.receive({"type": kind, **NAMES, "data": 1, "reason": "enough"})
    await within_timeout(cancelling)
    if kind == "cancelled":
        with pytest.raises(RequestCancelled):
            await within_timeout(follower.next())


async def test_a_cancellation_does_not_overtake_a_detached_submission() -> None:
    driver = SessionDriver()
    driver.session.unfollow(driver.session.follow("mine", SUBMISSION, 0))
    cancelling = await driver.cancel()
    assert driver.sent() == ["request"]
    # The submission may have been lost with the connection.
    driver.session.on_disconnect()
    assert driver.session.needs_connection
    driver.receive(CONNECTED)
    assert driver.sent() == ["request"]
    driver.receive({"type": "acknowledgment", **NAMES})
    assert driver.sent() == ["unsubscribe", "cancel"]
    driver.receive({"type": "acknowledgment", **NAMES})
    await within_timeout(cancelling)
    await asyncio.sleep(0)
    assert not driver.session.needs_connection


async def test_a_watch_opens_after_a_detached_submission() -> None:
    driver = SessionDriver()
    driver.session.unfollow(driver.session.follow("mine", SUBMISSION, 0))
    follower = driver.session.follow("mine", None, 0)
    assert driver.sent() == ["request"]
    driver.receive({"type": "acknowledgment", **NAMES})
    assert driver.sent() == ["unsubscribe", "subscribe"]
    driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 1})
    assert follower.phase is Phase.LIVE


async def test_an_unsent_submission_is_dropped_with_its_follower() -> None:
    driver = SessionDriver()
    driver.session.on_disconnect()
    driver.session.unfollow(driver.session.follow("mine", SUBMISSION, 0))
    assert not driver.session.needs_connection


async def test_a_request_is_not_followed_under_both_of_its_ids() -> None:
    for first, second in (("mine", "U"), ("U", "mine")):
        driver = SessionDriver()
        earlier = driver.session.follow(first, None, 0)
        driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 2})
        driver.receive(event(1))
        later = driver.session.follow(second, None, 2)
        driver.receive(event(2))
        driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 3})
        with pytest.raises(ValueError, match="already followed by this client"):
            await within_timeout(later.next())
        driver.sent()
        # The second subscription moved the server's position, so the missing event is requested.
        driver.receive(event(4))
        assert driver.sent() == ["subscribe"]
        driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 4})
        for seq in (3, 4):
            driver.receive(event(seq))
        received = [await within_timeout(earlier.next()) for _ in range(4)]
        assert [getattr(one, "seq", None) for one in received] == [1, 2, 3, 4]
        # An event that is still missing after the second request counts as lost.
        for _ in range(2):
            driver.receive(event(6))
            driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 6})
        with pytest.raises(BrokenLog):
            await within_timeout(earlier.next())


async def test_chunks_are_parsed_lazily() -> None:
    driver = SessionDriver()
    follower = driver.session.follow("mine", None, 0)
    driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 1})
    chunk = json.dumps({**event(1), "type": "output", "data": 0})
    driver.session.handle_message(chunk.replace('"data": 0', f'"data":{NESTED}'))
    output = await within_timeout(follower.next())
    assert isinstance(output, events.Output)
    assert output.data == NESTED.encode()
    with pytest.raises(ValueError, match="nested too deeply"):
        _ = output.value


async def test_a_malformed_message_fails_one_request_only() -> None:
    driver = SessionDriver()
    broken, whole = (driver.session.follow(name, None, 0) for name in ("mine", "other"))
    driver.receive({"type": "subscribed", **NAMES, "state": "RUNNING", "last_seq": 2})
    progress = json.dumps({**event(1), "type": "progress", "metadata": 0})
    driver.session.handle_message(progress.replace('"metadata": 0', f'"metadata": {NESTED}'))
    with pytest.raises(BrokenLog, match="nested too deeply"):
        await within_timeout(broken.next())
    assert whole.phase is Phase.OPENING
    rejection = json.dumps({"type": "error", "request_id": "other", "error": 0})
    driver.session.handle_message(rejection.replace('"error": 0', f'"error": {NESTED}'))
    with pytest.raises(ServiceError, match="nested too deeply"):
        await within_timeout(whole.next())


@asynccontextmanager
async def served(
    handler: Callable[[ServerConnection], Awaitable[None]], **options: Any
) -> AsyncIterator[WebSocketClient]:
    """Runs a server with `handler`; yields a client of the server."""
    async with serve(handler, "127.0.0.1", 0, subprotocols=[connection._PROTOCOL]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with WebSocketClient(f"ws://127.0.0.1:{port}/ws", "token", **options) as client:
            yield client


async def test_a_rate_limited_client_waits_before_it_reconnects() -> None:
    connected_at: list[float] = []

    async def busy(socket: ServerConnection) -> None:
        connected_at.append(time.monotonic())
        await socket.close(4429, "too many")

    async with served(busy, retry_for=1.5) as client:
        with pytest.raises(ServiceError, match="cannot be reached") as raised:
            await within_timeout(client.request("echo"))
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert len(connected_at) > 1
    assert all(later - earlier >= 1 for earlier, later in pairwise(connected_at))


async def test_an_unexpected_error_fails_pending_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(self: Session, text: str) -> None:
        raise LookupError("unexpected")

    async def connects(socket: ServerConnection) -> None:
        await socket.send(json.dumps(CONNECTED))
        await socket.wait_closed()

    monkeypatch.setattr(Session, "handle_message", fails)
    async with served(connects) as client:
        for _ in range(2):
            with pytest.raises(ServiceError, match="unexpected") as raised:
                await within_timeout(client.request("echo"))
            assert raised.value.code is ErrorCode.INTERNAL_ERROR
