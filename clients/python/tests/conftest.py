"""Fixtures: servers, clients and workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from harness import Server

from streamer import Client, Worker


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts the server that most tests share."""
    server = Server(tmp_path_factory.mktemp("server"), execution__cancellation_grace_period="300ms")
    server.start()
    yield server
    server.close()


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers for tests that stop them or require different options."""
    servers: list[Server] = []

    def start(**options: object) -> Server:
        server = Server(tmp_path / f"server-{len(servers)}", **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    """Opens a client of the shared server."""
    async with Client(server.url, server.token()) as client:
        yield client


@pytest.fixture
def new_worker(server: Server) -> Callable[[], Worker]:
    """Creates workers that connect to the shared server."""
    return lambda: Worker(server.url, server.token("worker:*"))
