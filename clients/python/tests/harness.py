"""Real servers, a proxy that can break connections, and waits with a timeout."""

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

_Result = TypeVar("_Result")

# Timeout of every wait, in seconds; reached only if a test fails.
TIMEOUT = 30.0


def binary() -> str:
    """Returns the path of the server binary."""
    path = os.environ.get("STREAMER_TESTS_BINARY")
    assert path, "STREAMER_TESTS_BINARY must be the path of the streamer binary"
    return path


def environment() -> dict[str, str]:
    """Returns the environment without the variables that configure the server."""
    return {name: text for name, text in os.environ.items() if not name.startswith("STREAMER_")}


# Port that is bound on an address while it is claimed, as in tests/harness/loopback.rs.
CLAIM_PORT = 10_000
# Port of a server, below the ephemeral ports of the system.
SERVER_PORT = 10_001

# Command prefix: the kernel kills the process when the test process exits.
KILLED_WITH_TESTS = ("setpriv", "--pdeathsig", "KILL", "--")


def claim_loopback_address() -> tuple[str, socket.socket]:
    """Claims a loopback address, which no other test uses until the returned socket is closed."""
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
    """A server process with a separate data folder and loopback address."""

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
        """Starts the server, and waits until it is ready."""
        sets = [f"--set={name.replace('__', '.')}={value}" for name, value in self._options.items()]
        arguments = ["up", "--listen", self._address, "--data", str(self._data), *sets]
        command = [*KILLED_WITH_TESTS, binary(), *arguments]
        with self._data.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"Streamer is ready: {self.url} "):
                return
        log_text = self._data.with_suffix(".log").read_text()
        raise AssertionError(f"the server exited before it was ready: {log_text}")

    def kill(self) -> None:
        """Kills the server with SIGKILL."""
        self._signal_and_wait(signal.SIGKILL)

    def stop(self) -> None:
        """Stops the server with SIGTERM, and waits until it exits."""
        self._signal_and_wait(signal.SIGTERM)

    def close(self) -> None:
        """Stops the server and releases its address."""
        self.stop()
        self._claim.close()

    def _signal_and_wait(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.communicate()
            self._process = None

    def token(self, permissions: str = "*", user: str = "u", expires: str = "1h") -> str:
        """Returns a token for tenant `dev`."""
        command = [binary(), "token", "--data", str(self._data), "--tenant", "dev"]
        command += ["--user", user, "--permissions", permissions, "--expires", expires]
        result = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment()
        )
        return result.stdout.strip()


@final
class Proxy:
    """Forwards TCP connections to a server; can break them, and pause data from the server."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (target.hostname, target.port)
        self._listener: asyncio.Server | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._running = asyncio.Event()
        self._running.set()
        self.port = 0
        self.connections = 0
        """Number of connections accepted so far."""

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._closed = True
        self._listener.close()
        self.disconnect()
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def pause(self) -> None:
        """Stops forwarding data from the server."""
        self._running.clear()

    def resume(self) -> None:
        """Resumes forwarding data from the server."""
        self._running.set()

    def disconnect(self) -> None:
        """Breaks every connection; data that was not forwarded because of `pause` is lost."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.resume()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        if self._closed:
            self.disconnect()
        await asyncio.gather(
            self._forward(reader, server_writer, pausable=False),
            self._forward(server_reader, writer, pausable=True),
        )

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, pausable: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if pausable:
                    await self._running.wait()
                if writer.transport.is_closing():
                    return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(worker: Worker, server: Server) -> AsyncIterator[Worker]:
    """Runs a worker; the `with` block starts once the server lists the actions of the worker."""
    running = asyncio.create_task(worker.serve())
    try:
        await within_timeout(worker.connected.wait())
        async with Client(server.url, server.token()) as client:
            await poll_until(lambda: _is_offered(client, worker))
        yield worker
    finally:
        await worker.stop(0)
        await within_timeout(running)


async def _is_offered(client: Client, worker: Worker) -> bool:
    offered = {action.name for action in await client.actions() if action.workers}
    return offered >= set(worker._actions)


async def within_timeout(awaitable: Awaitable[_Result]) -> _Result:
    """Waits for `awaitable`; fails the test after `TIMEOUT` seconds."""
    return await asyncio.wait_for(awaitable, TIMEOUT)


async def poll_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Polls `condition` until it is true; fails the test after `TIMEOUT` seconds."""

    async def poll() -> None:
        while not await condition():
            await asyncio.sleep(0.02)

    await within_timeout(poll())
