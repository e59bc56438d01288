"""What happens to attempts when streams break, servers die, tokens expire, and workers stop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ENDS_WITH_TESTS, PATIENCE, Proxy, Server, serving, soon, until

from streamer import Client, Context, Worker, events

NewServer = Callable[..., Server]
SCRIPT = Path(__file__).with_name("waiting_worker.py")


def numbers(output: list[events.Output]) -> list[int]:
    return [one.value for one in output]


async def test_a_broken_stream_is_resumed_without_duplicates(
    server: Server, client: Client
) -> None:
    go_on = asyncio.Event()
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
            await go_on.wait()
            for number in range(100, 200):
                await context.output(number)
            return "done"

        seen = asyncio.Event()
        output: list[events.Output] = []

        def on_output(one: events.Output) -> None:
            output.append(one)
            if len(output) == 1:
                # From here on no acknowledgment gets through.
                proxy.hold()
            if len(output) == 100:
                seen.set()

        async with serving(worker, server):
            running = asyncio.ensure_future(client.run("broken", on_output=on_output))
            # The server has them all, and the worker does not know.
            await soon(seen.wait())
            proxy.cut()
            go_on.set()
            assert await soon(running) == "done"
        assert proxy.connections >= 2
    assert numbers(output) == list(range(200))
    assert attempts == [1]


async def test_a_stream_may_break_again_and_again(server: Server, client: Client) -> None:
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("again")
        async def again(context: Context, payload: Any) -> int:
            for number in range(50):
                await context.output(number)
                if number % 10 == 5:
                    before = proxy.connections
                    proxy.cut()
                    # The worker has not noticed yet.
                    while proxy.connections == before:
                        await asyncio.sleep(0.01)
                    await worker.connected.wait()
            proxy.cut()
            return context.attempt

        output: list[events.Output] = []
        async with serving(worker, server):
            assert await soon(client.run("again", on_output=output.append)) == 1
        assert proxy.connections >= 7
    assert numbers(output) == list(range(50))


async def test_a_result_that_nobody_acknowledged_is_sent_again(
    server: Server, client: Client
) -> None:
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))
        returned = asyncio.Event()

        @worker.action("ends-alone")
        async def ends_alone(context: Context, payload: Any) -> str:
            # The connection is gone before the result is on its way.
            proxy.cut()
            returned.set()
            return "all the same"

        async with serving(worker, server):
            running = asyncio.ensure_future(client.run("ends-alone"))
            await soon(returned.wait())
            assert await soon(running) == "all the same"


async def test_a_handler_waits_while_too_much_is_not_acknowledged(
    server: Server, client: Client
) -> None:
    made = 0
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("floods")
        async def floods(context: Context, payload: Any) -> int:
            nonlocal made
            proxy.hold()
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
            await soon(seen.wait())
            assert made == 1024
            proxy.release()
            assert await soon(running) == 3000
    assert numbers(output) == list(range(3000))


async def test_an_attempt_outlives_a_server_that_is_killed(new_server: NewServer) -> None:
    server = new_server()
    go_on = asyncio.Event()
    attempts: list[int] = []
    worker = Worker(server.url, server.token("worker:*"))

    @worker.action("outlives")
    async def outlives(context: Context, payload: Any) -> str:
        attempts.append(context.attempt)
        for number in range(10):
            await context.output(number)
        await go_on.wait()
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
        await soon(seen.wait())
        server.kill()
        go_on.set()
        server.start()
        assert await soon(running) == "done"
    assert numbers(output) == list(range(20))
    assert attempts == [1]


async def test_a_stream_on_which_nothing_comes_back_is_given_up(new_server: NewServer) -> None:
    server = new_server(execution__lease_ms=900)
    began, go_on = asyncio.Event(), asyncio.Event()
    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, server.token("worker:*"))

        @worker.action("in-silence")
        async def in_silence(context: Context, payload: Any) -> int:
            began.set()
            await go_on.wait()
            return context.attempt

        async with Client(server.url, server.token()) as client, serving(worker, server):
            running = asyncio.ensure_future(client.run("in-silence"))
            await soon(began.wait())
            before = proxy.connections
            proxy.hold()

            async def came_again() -> bool:
                return proxy.connections > before

            await until(came_again)
            proxy.release()
            go_on.set()
            assert await soon(running) == 1


async def test_a_fresh_token_is_sent_on_the_same_stream(server: Server, client: Client) -> None:
    asked = 0
    twice_renewed = asyncio.Event()

    async def token() -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            twice_renewed.set()
        return server.token("worker:*", expires="2s")

    async with Proxy(server.url) as proxy:
        worker = Worker(proxy.url, token)

        @worker.action("outlasts")
        async def outlasts(context: Context, payload: Any) -> str:
            await twice_renewed.wait()
            return "done"

        async with serving(worker, server):
            assert await soon(client.run("outlasts")) == "done"
        assert proxy.connections == 1


async def test_a_worker_that_is_stopped_hands_its_attempts_back(
    server: Server, client: Client
) -> None:
    token = server.token("worker:*")
    process = await asyncio.create_subprocess_exec(
        *ENDS_WITH_TESTS,
        sys.executable,
        str(SCRIPT),
        server.url,
        token,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await soon(process.stdout.readline()) == b"connected\n"
    output: list[events.Output] = []
    running = asyncio.ensure_future(
        client.run("waits", on_output=output.append, on_retry=lambda _: output.clear())
    )
    assert await soon(process.stdout.readline()) == b"running\n"

    worker = Worker(server.url, token)

    @worker.action("waits", max_attempts=1)
    async def waits(context: Context, payload: Any) -> Any:
        await context.output("second")
        return [context.attempt, context.checkpoint]

    async with serving(worker, server):
        process.terminate()
        # Another attempt follows, though only one is allowed, from the checkpoint.
        assert await soon(running) == [2, {"said": "goodbye"}]
    assert [one.value for one in output] == ["second"]
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0


async def test_a_worker_that_is_stopped_lets_handlers_end_in_their_grace(
    server: Server, client: Client
) -> None:
    worker = Worker(server.url, server.token("worker:*"))
    began, go_on = asyncio.Event(), asyncio.Event()

    @worker.action("ends-in-time")
    async def ends_in_time(context: Context, payload: Any) -> int:
        began.set()
        await go_on.wait()
        return context.attempt

    async with serving(worker, server):
        running = asyncio.ensure_future(client.run("ends-in-time"))
        await soon(began.wait())
        stopping = asyncio.ensure_future(worker.stop(PATIENCE))
        await asyncio.sleep(0)
        go_on.set()
        assert await soon(running) == 1
        await soon(stopping)
