"""A real server, a proxy that can be cut, and waiting for what comes about."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar, final

from streamer import Client, Worker

_Outcome = TypeVar("_Outcome")

# How long anything may take before a test fails; nothing is expected to take so long.
PATIENCE = 30.0


def binary() -> str:
    """The server's binary."""
    path = os.environ.get("STREAMER_TESTS_BINARY")
    assert path, "STREAMER_TESTS_BINARY must name the streamer binary: these tests need it"
    return path


def environment() -> dict[str, str]:
    """Without what would configure the server."""
    return {name: text for name, text in os.environ.items() if not name.startswith("STREAMER_")}


class Server:
    """A server process with a data folder of its own; it keeps its port over restarts."""

    def __init__(self, data: Path, **options: object) -> None:
        self._data = data
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def start(self) -> None:
        """Starts it, and waits until it is ready."""
        sets = [f"--set={name.replace('__', '.')}={value}" for name, value in self._options.items()]
        address = f"127.0.0.1:{self.port}"
        command = [binary(), "up", "--listen", address, "--data", str(self._data), *sets]
        with self._data.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            ready = re.match(r"Streamer is ready: http://127\.0\.0\.1:(\d+)", line)
            if ready:
                self.port = int(ready[1])
                return
        told = self._data.with_suffix(".log").read_text()
        raise AssertionError(f"the server ended before it was ready: {told}")

    def kill(self) -> None:
        """Ends it at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Asks it to end, and waits until it has."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.communicate()
            self._process = None

    def token(self, permissions: str = "*", user: str = "u", expires: str = "1h") -> str:
        """A token of tenant `dev`."""
        command = [binary(), "token", "--data", str(self._data), "--tenant", "dev"]
        command += ["--user", user, "--permissions", permissions, "--expires", expires]
        told = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment()
        )
        return told.stdout.strip()


@final
class Proxy:
    """Passes TCP connections on to a port, until they are cut. What the server says can be held."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener: asyncio.Server | None = None
        self._closed = False
        self._passing: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0
        self.connections = 0
        """How many there have been."""

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._closed = True
        self._listener.close()
        self.cut()
        while self._passing:
            await asyncio.wait(self._passing)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def hold(self) -> None:
        """What the server says is held back from now on."""
        self._flowing.clear()

    def release(self) -> None:
        """What was held back flows again."""
        self._flowing.set()

    def cut(self) -> None:
        """Breaks every connection; what was held back is lost with it."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.release()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        passing = asyncio.ensure_future(self._serve(reader, writer))
        self._passing.add(passing)
        passing.add_done_callback(self._passing.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        if self._closed:
            self.cut()
        await asyncio.gather(
            self._pass_on(reader, far_writer, held=False),
            self._pass_on(far_reader, writer, held=True),
        )

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, held: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if held:
                    await self._flowing.wait()
                if writer.transport.is_closing():
                    return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(worker: Worker, server: Server) -> AsyncIterator[Worker]:
    """Runs a worker, from when the server knows its actions."""
    running = asyncio.create_task(worker.serve())
    try:
        await soon(worker.connected.wait())
        async with Client(server.url, server.token()) as client:
            await until(lambda: _offered(client, worker))
        yield worker
    finally:
        await worker.stop(0)
        await soon(running)


async def _offered(client: Client, worker: Worker) -> bool:
    offered = {action.name for action in await client.actions() if action.workers}
    return offered >= set(worker._actions)


async def soon(what: Awaitable[_Outcome]) -> _Outcome:
    """Waits for it, but not for ever."""
    return await asyncio.wait_for(what, PATIENCE)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Waits until something holds that nobody tells of."""

    async def ask() -> None:
        while not await holds():
            await asyncio.sleep(0.02)

    await soon(ask())
