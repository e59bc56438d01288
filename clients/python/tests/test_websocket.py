"""The WebSocket client against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from harness import Proxy, Server, serving, within_timeout

from streamer import (
    Client,
    Context,
    ErrorCode,
    FatalError,
    RawJson,
    RequestCancelled,
    RequestFailed,
    ServiceError,
    Worker,
    events,
)
from streamer.websocket import WebSocketClient


@pytest.fixture
async def websocket(server: Server) -> Any:
    async with WebSocketClient(server.websocket_url, server.token()) as client:
        yield client


async def test_progress_output_and_result_are_received(
    server: Server, websocket: WebSocketClient
) -> None:
    worker = Worker(server.url, server.token("worker:*"))

    @worker.action("ws-report")
    async def report(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
        await context.progress(50, "half", {"a": 1})
        await context.output("line é\n")
        await context.output(b"\x00\xff")
        await context.output(RawJson(b'{ "a" : 1.50, "n": 9223372036854775807,"e":"\\u00e9" }'))
        await context.output(RawJson(b' {"a": 1}\n'))
        return payload

    progress: list[events.Progress] = []
    output: list[events.Output] = []
    async with serving(worker, server):
        # The client verifies the digest, which is computed over the exact bytes from the handler.
        result = await websocket.request(
            "ws-report", {"n": 2**63 - 1}, on_progress=progress.append, on_output=output.append
        )
    assert result == {"n": 2**63 - 1}
    assert [(one.percentage, one.metadata) for one in progress] == [(50, {"a": 1})]
    assert [one.value for one in output[:2]] == ["line é\n", b"\x00\xff"]
    assert output[2].data == b'{ "a" : 1.50, "n": 9223372036854775807,"e":"\\u00e9" }'


async def test_a_request_without_a_waiting_caller_can_be_cancelled(
    client: Client, websocket: WebSocketClient
) -> None:
    await websocket.request("echo", {})
    task = {"steps": 1000, "delay_ms": 1000}
    request = asyncio.create_task(websocket.request("echo_async", task, id="left"))
    await asyncio.sleep(0)
    request.cancel()
    await within_timeout(websocket.cancel("left", "enough"))
    assert (await within_timeout(client.wait("left"))).state == "CANCELLED"


async def test_a_request_is_watched_under_one_of_its_ids(
    client: Client, websocket: WebSocketClient
) -> None:
    submitted = await client.submit("echo_async", {"steps": 20, "delay_ms": 20}, id="two-names")

    async def watch(request_id: str, after_seq: int) -> list[int]:
        return [event.seq async for event in websocket.watch(request_id, after_seq)]

    first = asyncio.create_task(watch("two-names", 0))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="followed"):
        await within_timeout(watch(submitted.uid, 3))
    seqs = await within_timeout(first)
    assert seqs == list(range(1, len(seqs) + 1))


async def test_sync_actions_return_results_or_raise(websocket: WebSocketClient) -> None:
    assert (await websocket.request("echo", {"a": 1}))["echo"] == {"a": 1}
    with pytest.raises(ServiceError) as raised:
        await websocket.request("no-such-action")
    assert raised.value.code is ErrorCode.INVALID_ACTION
    with pytest.raises(ServiceError) as raised:
        await websocket.request("echo", id="not an id")
    assert [violation.field for violation in raised.value.violations] == ["id"]


async def test_many_requests_share_a_connection(server: Server) -> None:
    async with (
        Proxy(server.url) as proxy,
        WebSocketClient(proxy.websocket_url, server.token()) as client,
    ):
        tasks = [{"steps": 5, "output_chunks": 5, "result": number} for number in range(50)]
        requests = [client.request("echo_async", task) for task in tasks]
        assert await within_timeout(asyncio.gather(*requests)) == list(range(50))
        assert proxy.connections == 1


async def test_events_resume_after_a_disconnect(server: Server) -> None:
    async with (
        Proxy(server.url) as proxy,
        WebSocketClient(proxy.websocket_url, server.token()) as client,
    ):
        output: list[int] = []

        def on_output(one: events.Output) -> None:
            output.append(one.chunk_index)
            if one.chunk_index in (2, 10):
                proxy.disconnect()

        task = {"steps": 30, "delay_ms": 5, "output_chunks": 30, "result": "done"}
        assert (
            await within_timeout(client.request("echo_async", task, on_output=on_output)) == "done"
        )
        assert proxy.connections >= 2
    assert output == list(range(30))


async def test_an_unacknowledged_submission_is_sent_again(server: Server, client: Client) -> None:
    async with (
        Proxy(server.url) as proxy,
        WebSocketClient(proxy.websocket_url, server.token()) as websocket,
    ):
        await websocket.request("echo", {})
        proxy.pause()
        task = {"steps": 2, "output_chunks": 2, "result": "once"}
        request = websocket.request("echo_async", task, id="sent-twice")
        running = asyncio.ensure_future(request)
        # The request has ended on the server, and the client has received no acknowledgment.
        await within_timeout(_ended(client, "sent-twice"))
        proxy.disconnect()
        assert await within_timeout(running) == "once"
    page = await client.list(action="echo_async", page_size=500)
    assert [one.request_id for one in page.requests].count("sent-twice") == 1


async def _ended(client: Client, request_id: str) -> None:
    while True:
        try:
            await client.wait(request_id)
            return
        except ServiceError as error:
            assert error.code is ErrorCode.NOT_FOUND
            await asyncio.sleep(0.02)


async def test_output_of_a_failed_attempt_is_void(websocket: WebSocketClient) -> None:
    output: list[events.Output] = []

    def on_retry(retry: events.Retrying) -> None:
        output[:] = [one for one in output if one.seq <= retry.rewind_to_seq]

    task = {"steps": 3, "output_chunks": 3, "fail_attempts": 1}
    await websocket.request("echo_async", task, on_output=output.append, on_retry=on_retry)
    assert [one.attempt for one in output] == [2, 2, 2]


async def test_requests_are_cancelled(server: Server, websocket: WebSocketClient) -> None:
    worker = Worker(server.url, server.token("worker:*"))
    began = asyncio.Event()

    @worker.action("ws-sleeps")
    async def sleeps(context: Context, payload: Any) -> None:
        began.set()
        await context.sleep(3600)

    async with serving(worker, server):
        running = asyncio.ensure_future(websocket.request("ws-sleeps", id="ws-c"))
        await within_timeout(began.wait())
        await within_timeout(websocket.cancel("ws-c", "enough"))
        with pytest.raises(RequestCancelled, match="enough"):
            await within_timeout(running)
    # Cancelling a request that has ended and has no follower has no effect.
    await within_timeout(websocket.cancel("ws-c"))
    with pytest.raises(ServiceError):
        await within_timeout(websocket.cancel("no-such-request"))


async def test_failures_are_raised(server: Server, websocket: WebSocketClient) -> None:
    worker = Worker(server.url, server.token("worker:*"))

    @worker.action("ws-fails")
    async def fails(context: Context, payload: Any) -> None:
        raise FatalError("never", details={"a": 1})

    @worker.action("ws-fails-at-once", sync=True)
    async def fails_at_once(context: Context, payload: Any) -> None:
        raise FatalError("never")

    async with serving(worker, server):
        with pytest.raises(RequestFailed) as raised:
            await websocket.request("ws-fails")
        failure = raised.value.failure
        assert (failure.message, failure.details, failure.retryable) == ("never", {"a": 1}, False)
        with pytest.raises(RequestFailed, match="never"):
            await websocket.request("ws-fails-at-once")


async def test_a_watch_starts_after_a_seq(client: Client, websocket: WebSocketClient) -> None:
    submitted = await client.submit("echo_async", {"steps": 3}, wait=30)
    last = submitted.last_seq
    assert [event.seq async for event in websocket.watch(submitted.uid)] == list(range(1, last + 1))
    seqs = [event.seq async for event in websocket.watch(submitted.uid, 3)]
    assert seqs == list(range(4, last + 1))
    assert [event async for event in websocket.watch(submitted.uid, last)] == []


async def test_a_slow_reader_gets_every_event_and_delays_no_other_request(
    server: Server, websocket: WebSocketClient
) -> None:
    worker = Worker(server.url, server.token("worker:*"))

    @worker.action("ws-floods")
    async def floods(context: Context, payload: Any) -> None:
        for number in range(3000):
            await context.output(number)

    async with serving(worker, server):
        await within_timeout(websocket.request("ws-floods", id="flood"))
    watch = websocket.watch("flood")
    seqs = [(await watch.__anext__()).seq]
    # The server responds to a request while the watch is not read.
    assert (await within_timeout(websocket.request("echo", {"a": 1})))["echo"] == {"a": 1}
    seqs += [event.seq async for event in watch]
    assert seqs == list(range(1, 3004))


async def test_a_fresh_token_keeps_the_connection(server: Server) -> None:
    tokens = 0
    renewed = asyncio.Event()

    async def token() -> str:
        nonlocal tokens
        tokens += 1
        if tokens == 2:
            renewed.set()
        return server.token(expires="30s")

    async with (
        Proxy(server.url) as proxy,
        WebSocketClient(proxy.websocket_url, token) as client,
    ):
        await client.request("echo", {})
        # The server sends `auth_expiring` early for a token with a short lifetime.
        await within_timeout(renewed.wait())
        await client.request("echo", {})
        assert proxy.connections == 1


async def test_an_invalid_token_raises_unauthorized(server: Server) -> None:
    async with WebSocketClient(server.websocket_url, "nonsense") as client:
        for _ in range(2):
            with pytest.raises(ServiceError) as raised:
                await within_timeout(client.request("echo", {}))
            assert raised.value.code is ErrorCode.UNAUTHORIZED
