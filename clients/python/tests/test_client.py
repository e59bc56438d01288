"""The gRPC client against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from harness import Proxy, Server, poll_until, serving, within_timeout

from streamer import (
    Client,
    Context,
    ErrorCode,
    RequestCancelled,
    RequestState,
    ServiceError,
    Worker,
    _channel,
    events,
)


async def test_the_same_id_returns_the_same_request(client: Client) -> None:
    payload = {"steps": 1, "result": {"n": 2**63 - 1}}
    first = await client.submit("echo_async", payload, id="same")
    ended = await within_timeout(client.wait("same"))
    second = await client.submit("echo_async", payload, id="same")
    assert (first.duplicate, second.duplicate, second.uid) == (False, True, first.uid)
    assert first.request_id == "same"
    assert await client.run("echo_async", payload, id="same") == ended.result
    with pytest.raises(ServiceError) as raised:
        await client.submit("echo_async", {"steps": 2}, id="same")
    assert raised.value.code is ErrorCode.CONFLICT


async def test_a_submission_can_wait_for_the_result(client: Client) -> None:
    submitted = await client.submit("echo_async", {"steps": 1, "result": 7}, wait=30)
    assert submitted.completed is not None
    assert submitted.completed.unwrap() == 7
    assert submitted.completed.seq == submitted.last_seq
    assert submitted.state is RequestState.SUCCEEDED


async def test_a_watch_resumes_after_a_disconnect(server: Server) -> None:
    async with Proxy(server.url) as proxy, Client(proxy.url, server.token()) as client:
        task = {"steps": 30, "delay_ms": 5, "output_chunks": 30}
        submitted = await client.submit("echo_async", task)
        seqs = []
        async for event in client.watch(submitted.uid):
            seqs.append(event.seq)
            if len(seqs) in (3, 20, 40):
                proxy.disconnect()
        assert proxy.connections >= 2
    assert seqs == list(range(1, len(seqs) + 1))
    assert isinstance(event, events.Succeeded)
    assert event.output.chunks == 30


async def test_wait_survives_a_disconnect(server: Server) -> None:
    worker = Worker(server.url, server.token("worker:*"))
    proceed = asyncio.Event()

    @worker.action("waited-for")
    async def waited_for(context: Context, payload: Any) -> str:
        await proceed.wait()
        return "done"

    async with (
        Proxy(server.url) as proxy,
        serving(worker, server),
        Client(proxy.url, server.token()) as client,
    ):
        submitted = await client.submit("waited-for")
        waiting = asyncio.ensure_future(client.wait(submitted.uid))
        # The watch uses the connection of the submission.
        async for _ in client.watch(submitted.uid):
            break
        proxy.disconnect()
        proceed.set()
        ended = await within_timeout(waiting)
    assert (ended.result, ended.request_id) == ("done", submitted.uid)


async def test_keepalive_detects_a_silent_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms")
    assert {f"grpc.{name}" for name in names} <= set(dict(_channel._OPTIONS))
    options = {**dict(_channel._OPTIONS), **{f"grpc.{name}": 300 for name in names}}
    monkeypatch.setattr(_channel, "_OPTIONS", list(options.items()))
    async with Proxy(server.url) as proxy, Client(proxy.url, server.token()) as client:
        submitted = await client.submit("echo_async", {"steps": 1}, delay=1)
        waiting = asyncio.ensure_future(client.wait(submitted.uid))
        await asyncio.sleep(0.1)
        proxy.pause()

        async def reconnected() -> bool:
            return proxy.connections > 1

        await poll_until(reconnected)
        proxy.resume()
        assert (await within_timeout(waiting)).state is RequestState.SUCCEEDED


async def test_a_watch_starts_after_a_seq(client: Client) -> None:
    submitted = await client.submit("echo_async", {"steps": 3}, wait=30)
    seqs = [event.seq async for event in client.watch(submitted.uid, after_seq=3)]
    assert seqs == list(range(4, submitted.last_seq + 1))
    assert [event async for event in client.watch(submitted.uid, submitted.last_seq)] == []
    with pytest.raises(ServiceError) as raised:
        async for _ in client.watch("no-such-request"):
            pass
    assert raised.value.code is ErrorCode.NOT_FOUND


async def test_retries_are_reported(client: Client) -> None:
    retries: list[events.Retrying] = []
    task = {"steps": 2, "output_chunks": 2, "fail_attempts": 1}
    await client.run("echo_async", task, on_retry=retries.append)
    assert [retry.attempt for retry in retries] == [1]


async def test_requests_can_be_read_listed_cancelled_and_redriven(client: Client) -> None:
    metadata = {"why": "a test", "n": 2**63 - 1}
    submitted = await client.submit("echo_async", {"steps": 1}, delay=3600, metadata=metadata)
    request = await client.get(submitted.uid)
    assert (request.payload, request.metadata) == ({"steps": 1}, metadata)
    assert (request.state, request.action) == (RequestState.QUEUED, "echo_async")
    page = await client.list(states=["QUEUED"], action="echo_async", page_size=500)
    assert submitted.uid in [one.uid for one in page.requests]
    cancelled = await client.cancel(submitted.uid, "not needed")
    assert cancelled.state is RequestState.CANCELLED
    with pytest.raises(RequestCancelled, match="not needed"):
        (await client.wait(submitted.uid)).unwrap()
    redriven = await client.redrive(submitted.uid, id="redriven")
    assert (redriven.redrive_of, redriven.request_id) == (submitted.uid, "redriven")
    assert (await within_timeout(client.wait("redriven"))).state is RequestState.SUCCEEDED


async def test_the_queue_position_is_reported(server: Server, client: Client) -> None:
    worker = Worker(server.url, server.token("worker:*"), slots=1)
    proceed = asyncio.Event()

    @worker.action("queued")
    async def queued(context: Context, payload: Any) -> None:
        await proceed.wait()

    async with serving(worker, server):
        uids = [(await client.submit("queued")).uid for _ in range(3)]
        position = (await client.get(uids[2])).queue_position
        assert position is not None
        assert position.latest >= position.earliest >= 1
        proceed.set()
        for uid in uids:
            assert (await within_timeout(client.wait(uid))).state is RequestState.SUCCEEDED


async def test_actions_are_listed(client: Client) -> None:
    actions = {action.name: action for action in await client.actions()}
    assert actions["echo"].sync
    assert not actions["echo_async"].sync


async def test_every_violation_is_reported(client: Client) -> None:
    with pytest.raises(ServiceError) as raised:
        await client.submit("echo_async", priority=77, id="not an id")
    assert {violation.field for violation in raised.value.violations} == {"id", "priority"}


async def test_an_unreachable_server_raises_unavailable() -> None:
    async with (
        Proxy("http://127.0.0.1:1") as unreachable,
        Client(unreachable.url, "token", retry_for=0.2) as client,
    ):
        with pytest.raises(ServiceError) as raised:
            await within_timeout(client.actions())
    assert raised.value.code is ErrorCode.UNAVAILABLE
