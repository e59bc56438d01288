"""Connections of workers and gRPC clients to misbehaving servers; no Streamer server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from harness import within_timeout

from streamer import Client, ErrorCode, ServiceError, Worker, WorkerRefused, _channel, _retry
from streamer._backoff import Backoff
from streamer._proto import router_pb2, worker_pb2
from streamer._worker import connection as worker_connection

Messages = AsyncIterator[worker_pb2.WorkRequest]
Serve = Callable[[Messages, Any], AsyncIterator[worker_pb2.WorkResponse]]


@asynccontextmanager
async def serving_streams(work: Serve) -> AsyncIterator[str]:
    """Runs a server that handles worker streams with `work`; yields its address."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        work, worker_pb2.WorkRequest.FromString, worker_pb2.WorkResponse.SerializeToString
    )
    name = "streamer.processor.v1.WorkerService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"Work": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)


def idle_worker(url: str, token: Any = "token") -> Worker:
    worker = Worker(url, token)

    @worker.action("idle")
    async def idle(context: object, payload: object) -> None:
        pass

    return worker


def welcome(secret: bytes = b"") -> worker_pb2.WorkResponse:
    message = worker_pb2.Welcome(heartbeat_ms=20, lease_ms=60_000, session_secret=secret)
    return worker_pb2.WorkResponse(welcome=message)


@pytest.mark.parametrize(
    ("answers", "status", "resets"),
    [
        (False, grpc.StatusCode.UNAVAILABLE, False),
        (True, grpc.StatusCode.UNAVAILABLE, True),
        (True, grpc.StatusCode.INVALID_ARGUMENT, False),
        (True, grpc.StatusCode.RESOURCE_EXHAUSTED, False),
    ],
)
async def test_the_backoff_is_reset_only_after_a_stream_that_worked(
    monkeypatch: pytest.MonkeyPatch, answers: bool, status: grpc.StatusCode, resets: bool
) -> None:
    streams, reset = 0, asyncio.Event()
    monkeypatch.setattr(Backoff, "next", lambda self: 0.0)
    monkeypatch.setattr(Backoff, "reset", lambda self: reset.set())
    third_stream = asyncio.Event()

    async def work(messages: Messages, context: Any) -> AsyncIterator[worker_pb2.WorkResponse]:
        nonlocal streams
        streams += 1
        if streams == 3:
            third_stream.set()
        await anext(messages)
        yield welcome()
        if answers:
            await anext(messages)
            yield worker_pb2.WorkResponse(heartbeat_reply=worker_pb2.HeartbeatReply())
        await context.abort(status, "no")

    async with serving_streams(work) as url:
        worker = idle_worker(url)
        running = asyncio.create_task(worker.serve())
        await within_timeout(third_stream.wait())
        assert reset.is_set() is resets
        await within_timeout(worker.stop(0))
        await within_timeout(running)


async def test_later_streams_repeat_the_secret_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.0)
    hellos: list[worker_pb2.Hello] = []
    third_stream = asyncio.Event()

    async def work(messages: Messages, context: Any) -> AsyncIterator[worker_pb2.WorkResponse]:
        hellos.append((await anext(messages)).hello)
        if len(hellos) == 3:
            third_stream.set()
        yield welcome(b"secret")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")

    async with serving_streams(work) as url:
        worker = idle_worker(url)
        running = asyncio.create_task(worker.serve())
        await within_timeout(third_stream.wait())
        await within_timeout(worker.stop(0))
        await within_timeout(running)
    assert [hello.session_secret for hello in hellos[:3]] == [b"", b"secret", b"secret"]
    assert {hello.worker_id for hello in hellos} == {worker.worker_id}
    assert hellos[0].display_name
    assert hellos[0].display_name != worker.worker_id


async def test_a_worker_stops_while_a_token_is_pending() -> None:
    requested = asyncio.Event()

    async def never() -> str:
        requested.set()
        await asyncio.Event().wait()
        return ""

    worker = idle_worker("http://127.0.0.1:1", never)
    running = asyncio.create_task(worker.serve())
    await within_timeout(requested.wait())
    await within_timeout(worker.stop(0))
    await within_timeout(running)


@pytest.mark.parametrize("token", ["", " \n", "sécret", "sec ret", "sec\x00ret"])
async def test_a_malformed_token_is_rejected_and_not_in_the_message(token: str) -> None:
    async def given() -> str:
        return token

    with pytest.raises(ValueError, match="token") as plain:
        Client("http://127.0.0.1:1", token)
    with pytest.raises(WorkerRefused, match="token") as rejected:
        await within_timeout(idle_worker("http://127.0.0.1:1", given).serve())
    async with Client("http://127.0.0.1:1", given) as client:
        with pytest.raises(ServiceError, match="token") as failed:
            await within_timeout(client.get("x"))
        assert failed.value.code is ErrorCode.UNAUTHORIZED
    for raised in (plain, rejected, failed):
        assert token.strip() == "" or token not in str(raised.value)


async def test_white_space_around_a_token_is_removed() -> None:
    seen: list[Any] = []

    async def work(messages: Messages, context: Any) -> AsyncIterator[worker_pb2.WorkResponse]:
        seen.append(dict(context.invocation_metadata())["authorization"])
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        yield worker_pb2.WorkResponse()

    async def given() -> str:
        return "given\n"

    async with serving_streams(work) as url:
        for token in (" plain\n", given):
            with pytest.raises(WorkerRefused):
                await within_timeout(idle_worker(url, token).serve())
    assert seen == ["Bearer plain", "Bearer given"]


async def test_a_stopping_worker_declares_no_slots_when_it_reconnects() -> None:
    worker = idle_worker("http://127.0.0.1:1")
    assert worker._hello().slots == 10
    worker._registry.stop_accepting()
    assert worker._hello().slots == 0


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Runs a server that accepts connections and sends nothing; yields its address."""

    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for writer in writers:
            writer.transport.abort()


async def first_event(client: Client) -> object:
    return await anext(client.watch("x"))


CALLS: list[Callable[[Client], Awaitable[object]]] = [
    lambda client: client.get("x"),
    lambda client: client.wait("x"),
    lambda client: client.run("echo"),
    first_event,
]


@pytest.mark.parametrize("call", CALLS)
async def test_calls_of_a_closed_client_raise_cancelled(
    call: Callable[[Client], Awaitable[object]],
) -> None:
    async with silent_server() as url:
        client = Client(url, "token")
        calling = asyncio.ensure_future(call(client))
        await asyncio.sleep(0.05)
        await client.close()
        for waiting in (calling, call(client)):
            with pytest.raises(ServiceError, match="the client is closed") as raised:
                await within_timeout(waiting)
            assert raised.value.code is ErrorCode.CANCELLED


async def test_cancelling_the_task_of_a_call_raises_cancelled_error() -> None:
    async with silent_server() as url, Client(url, "token") as client:
        calling = asyncio.create_task(client.get("x"))
        await asyncio.sleep(0.05)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling


async def test_a_call_that_times_out_is_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls_received = 0
    server = grpc.aio.server()

    async def get(request: object, context: Any) -> router_pb2.GetResponse:
        nonlocal calls_received
        calls_received += 1
        await asyncio.sleep(0 if calls_received == 2 else 60)
        return router_pb2.GetResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        get, router_pb2.GetRequest.FromString, router_pb2.GetResponse.SerializeToString
    )
    name = "streamer.router.v1.RouterService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Get": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = _channel.open_channel(_channel.parse_server(f"127.0.0.1:{port}"))
    calls = _channel.Calls(channel)
    tokens = idle_worker("http://127.0.0.1:1")._connection._tokens

    async def call(budget: _retry.RetryBudget) -> object:
        request = router_pb2.GetRequest()
        return await _retry.unary(
            calls, calls.get, request, tokens, budget, repeat=True, timeout=0.2
        )

    await within_timeout(call(_retry.RetryBudget(None)))
    assert calls_received == 2
    with pytest.raises(ServiceError) as raised:
        await within_timeout(call(_retry.RetryBudget(0)))
    assert raised.value.code is ErrorCode.UNAVAILABLE
    await channel.close()
    await server.stop(0)


def test_connection_timeout_and_keepalive_are_set() -> None:
    options = dict(_channel._OPTIONS)
    # Despite its name, this option is the minimum connection timeout.
    assert options["grpc.min_reconnect_backoff_ms"] >= 10_000
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert worker_connection._PROTOCOL_ERROR_CODES >= {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.OUT_OF_RANGE,
    }
