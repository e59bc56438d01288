"""A real server, a proxy that can be cut, and waiting for what comes about."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar, final
from urllib.parse import urlsplit

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


# Held on an address for as long as it is claimed, as in tests/harness/loopback.rs.
CLAIM_PORT = 10_000
# Of a server: below the ports that the system hands out to connections.
SERVER_PORT = 10_001

# Before a command: the kernel ends the process when the test process ends, however that ends.
ENDS_WITH_TESTS = ("setpriv", "--pdeathsig", "KILL", "--")


def claim_loopback_address() -> tuple[str, socket.socket]:
    """Returns a loopback address that no other test uses until the socket is closed."""
    for attempt in range(100):
        number = (os.getpid() * 64 + attempt) % (254 << 16)
        host = f"127.{(number >> 16) + 1}.{number >> 8 & 255}.{number & 255}"
        try:
            return host, socket.create_server((host, CLAIM_PORT))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError(f"port {CLAIM_PORT} is in use on every address")


class Server:
    """A server process with a data folder and a loopback address of its own."""

    def __init__(self, data: Path, **options: object) -> None:
        self._data = data
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        host, self._claim = claim_loopback_address()
        self._address = f"{host}:{SERVER_PORT}"

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    @property
    def websocket_url(self) -> str:
        return f"ws://{self._address}/ws"

    def start(self) -> None:
        """Starts it, and waits until it is ready."""
        sets = [f"--set={name.replace('__', '.')}={value}" for name, value in self._options.items()]
        arguments = ["up", "--listen", self._address, "--data", str(self._data), *sets]
        command = [*ENDS_WITH_TESTS, binary(), *arguments]
        with self._data.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"Streamer is ready: {self.url} "):
                return
        logged = self._data.with_suffix(".log").read_text()
        raise AssertionError(f"the server ended before it was ready: {logged}")

    def kill(self) -> None:
        """Ends it at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Asks it to end, and waits until it has."""
        self._end(signal.SIGTERM)

    def close(self) -> None:
        """Stops it for good, and releases its address."""
        self.stop()
        self._claim.close()

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
    """Forwards TCP connections to a server until they are cut. What it sends can be held back."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (target.hostname, target.port)
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
            far_reader, far_writer = await asyncio.open_connection(*self._target)
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
