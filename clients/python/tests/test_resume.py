"""Attempts when streams break, servers are killed, tokens expire, and workers stop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import KILLED_WITH_TESTS, TIMEOUT, Proxy, Server, poll_until, serving, within_timeout

from streamer import Client, Context, Worker, events

NewServer = Callable[..., Server]
SCRIPT = Path(__file__).with_name("waiting_worker.py")


def numbers(output: list[events.Output]) -> list[int]:
    return [one.value for one in output]


async def test_a_broken_stream_is_resumed_without_duplicates(
    server: Server, client: Client
) -> None:
    proceed = asyncio.Event()
    attempts: list[int] = []
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("broken")
        async def broken(context: Context, payload: Any) -> str:
            attempts.append(context.attempt)
            for number in range(100):
                await context.output(number)
                await context.progress(number, "on the way")
            await context.save_checkpoint({"at": 100})
            await proceed.wait()
            for number in range(100, 200):
                await context.output(number)
            return "done"

        seen = asyncio.Event()
        output: list[events.Output] = []

        def on_output(one: events.Output) -> None:
            output.append(one)
            if len(output) == 1:
                # Acknowledgments no longer reach the worker.
                proxy.pause()
            if len(output) == 100:
                seen.set()

        async with serving(worker, server):
            running = asyncio.ensure_future(client.run("broken", on_output=on_output))
            # The server has stored all output, and the worker has received no acknowledgment.
            await within_timeout(seen.wait())
            proxy.disconnect()
            proceed.set()
            assert await within_timeout(running) == "done"
        assert proxy.connections >= 2
    assert numbers(output) == list(range(200))
    assert attempts == [1]


async def test_an_attempt_survives_repeated_disconnects(server: Server, client: Client) -> None:
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("again")
        async def again(context: Context, payload: Any) -> int:
            for number in range(50):
                await context.output(number)
                if number % 10 == 5:
                    before = proxy.connections
                    proxy.disconnect()
                    # The worker has not detected the disconnect yet.
                    while proxy.connections == before:
                        await asyncio.sleep(0.01)
                    await worker.connected.wait()
            proxy.disconnect()
            return context.attempt

        output: list[events.Output] = []
        async with serving(worker, server):
            assert await within_timeout(client.run("again", on_output=output.append)) == 1
        assert proxy.connections >= 7
    assert numbers(output) == list(range(50))


async def test_an_unacknowledged_result_is_sent_again(server: Server, client: Client) -> None:
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))
        returned = asyncio.Event()

        @worker.action("ends-alone")
        async def ends_alone(context: Context, payload: Any) -> str:
            # The connection breaks before the result is sent.
            proxy.disconnect()
            returned.set()
            return "returned"

        async with serving(worker, server):
            running = asyncio.ensure_future(client.run("ends-alone"))
            await within_timeout(returned.wait())
            assert await within_timeout(running) == "returned"


async def test_a_handler_blocks_at_the_limit_of_unacknowledged_reports(
    server: Server, client: Client
) -> None:
    made = 0
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("floods")
        async def floods(context: Context, payload: Any) -> int:
            nonlocal made
            proxy.pause()
            for number in range(3000):
                await context.output(number)
                made += 1
            return made

        seen = asyncio.Event()
        output: list[events.Output] = []

        def on_output(one: events.Output) -> None:
            output.append(one)
            if len(output) == 1024:
                seen.set()

        async with serving(worker, server):
            running = asyncio.ensure_future(client.run("floods", on_output=on_output))
            await within_timeout(seen.wait())
            assert made == 1024
            proxy.resume()
            assert await within_timeout(running) == 3000
    assert numbers(output) == list(range(3000))


async def test_an_attempt_survives_a_killed_server(new_server: NewServer) -> None:
    server = new_server()
    proceed = asyncio.Event()
    attempts: list[int] = []
    worker = Worker(server.url, server.token("worker:*"))

    @worker.action("outlives")
    async def outlives(context: Context, payload: Any) -> str:
        attempts.append(context.attempt)
        for number in range(10):
            await context.output(number)
        await proceed.wait()
        for number in range(10, 20):
            await context.output(number)
        return "done"

    output: list[events.Output] = []
    seen = asyncio.Event()

    def on_output(one: events.Output) -> None:
        output.append(one)
        if len(output) == 10:
            seen.set()

    async with (
        Client(server.url, server.token()) as client,
        serving(worker, server),
    ):
        running = asyncio.ensure_future(client.run("outlives", on_output=on_output))
        await within_timeout(seen.wait())
        server.kill()
        proceed.set()
        server.start()
        assert await within_timeout(running) == "done"
    assert numbers(output) == list(range(20))
    assert attempts == [1]


async def test_a_stream_without_heartbeat_replies_is_abandoned(new_server: NewServer) -> None:
    server = new_server(execution__lease_duration="900ms")
    began, proceed = asyncio.Event(), asyncio.Event()
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("in-silence")
        async def in_silence(context: Context, payload: Any) -> int:
            began.set()
            await proceed.wait()
            return context.attempt

        async with Client(server.url, server.token()) as client, serving(worker, server):
            running = asyncio.ensure_future(client.run("in-silence"))
            await within_timeout(began.wait())
            before = proxy.connections
            proxy.pause()

            async def reconnected() -> bool:
                return proxy.connections > before

            await poll_until(reconnected)
            proxy.resume()
            proceed.set()
            assert await within_timeout(running) == 1


async def test_a_fresh_token_is_sent_on_the_same_stream(server: Server, client: Client) -> None:
    tokens = 0
    twice_renewed = asyncio.Event()

    async def token() -> str:
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            twice_renewed.set()
        return server.token("worker:*", expires="2s")

    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, token)

        @worker.action("outlasts")
        async def outlasts(context: Context, payload: Any) -> str:
            await twice_renewed.wait()
            return "done"

        async with serving(worker, server):
            assert await within_timeout(client.run("outlasts")) == "done"
        assert proxy.connections == 1


async def test_a_stopped_worker_releases_its_attempts(server: Server, client: Client) -> None:
    token = server.token("worker:*")
    process = await asyncio.create_subprocess_exec(
        *KILLED_WITH_TESTS,
        sys.executable,
        str(SCRIPT),
        server.url,
        token,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await within_timeout(process.stdout.readline()) == b"connected\n"
    output: list[events.Output] = []
    running = asyncio.ensure_future(
        client.run("waits", on_output=output.append, on_retry=lambda _: output.clear())
    )
    assert await within_timeout(process.stdout.readline()) == b"running\n"

    worker = Worker(server.url, token)

    @worker.action("waits", max_attempts=1)
    async def waits(context: Context, payload: Any) -> Any:
        await context.output("second")
        return [context.attempt, context.checkpoint]

    async with serving(worker, server):
        process.terminate()
        # A released attempt is retried from its checkpoint, although `max_attempts` is 1.
        assert await within_timeout(running) == [2, {"saved": "on interruption"}]
    assert [one.value for one in output] == ["second"]
    assert await asyncio.wait_for(process.wait(), TIMEOUT) == 0


async def test_a_stopped_worker_waits_for_handlers_during_the_grace_period(
    server: Server, client: Client
) -> None:
    worker = Worker(server.url, server.token("worker:*"))
    began, proceed = asyncio.Event(), asyncio.Event()

    @worker.action("ends-in-time")
    async def ends_in_time(context: Context, payload: Any) -> int:
        began.set()
        await proceed.wait()
        return context.attempt

    async with serving(worker, server):
        running = asyncio.ensure_future(client.run("ends-in-time"))
        await within_timeout(began.wait())
        stopping = asyncio.ensure_future(worker.stop(TIMEOUT))
        await asyncio.sleep(0)
        proceed.set()
        assert await within_timeout(running) == 1
        await within_timeout(stopping)
