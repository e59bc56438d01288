"""Workers, which declare actions and run them for a server.

A worker implements docs/worker-protocol.md. Attempts survive a lost connection: handlers keep
running while the worker opens a new stream, and reports that are not durable are sent again,
without duplicates.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import socket
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import iscoroutinefunction
from typing import Any, TypeVar

from streamer._handlers import Handler
from streamer._proto import worker_pb2
from streamer._tokens import Token, TokenSource
from streamer._worker.connection import Connection
from streamer._worker.registry import AttemptRegistry
from streamer.action import Action, Seconds, codes, schema_text
from streamer.errors import ErrorCode

DEFAULT_GRACE = 20.0
"""Default time for which handlers may keep running when a worker stops, in seconds."""
_ACKNOWLEDGMENT_TIMEOUT = 10.0
_MAX_SLOTS = 10_000

_Function = TypeVar("_Function", bound=Handler)


class Worker:
    """Runs actions for a server until it is stopped. A worker runs once and cannot be restarted.

    `server` is `http://host:port` or `https://host:port`. `token` is a JWT with permission
    `worker:<action>` for every action, or an async callable that returns a fresh one: it is called
    for each stream, and before the stream's token expires. Before a plain token expires, running
    attempts are released and `serve` raises `WorkerRefused`. `slots` is the maximum number of
    concurrent tasks, 1 to 10,000. `worker_id` identifies this run in the logs of the server; by
    default, it consists of the host name and 80 random bits. `display_name` is shown to the owners
    of the requests that this worker runs, who may belong to other tenants; by default, it is the
    host name. `version` is the human-readable version of the program.
    """

    def __init__(
        self,
        server: str,
        token: Token,
        *,
        slots: int = 10,
        worker_id: str | None = None,
        display_name: str | None = None,
        version: str = "",
    ) -> None:
        if not 1 <= slots <= _MAX_SLOTS:
            raise ValueError(f"slots: must be 1 to {_MAX_SLOTS}, is {slots}")
        self.worker_id = worker_id or _random_id()
        self._display_name = _host() if display_name is None else display_name
        self._slots = slots
        self._version = version
        self._actions: dict[str, Action] = {}
        self._handlers: dict[str, Handler] = {}
        self._registry = AttemptRegistry(self._handlers)
        self._connection = Connection(server, TokenSource(token), self._registry, self._hello)
        self._serving = False

    @property
    def connected(self) -> asyncio.Event:
        """Set while the worker is connected. Do not modify it."""
        return self._registry.connected

    def action(
        self,
        name: str,
        *,
        description: str = "",
        sync: bool = False,
        estimated_duration: Seconds | None = None,
        max_attempts: int | None = None,
        start_to_close: Seconds | None = None,
        heartbeat_timeout: Seconds | None = None,
        schedule_to_start: Seconds | None = None,
        schedule_to_close: Seconds | None = None,
        initial_backoff: Seconds | None = None,
        max_backoff: Seconds | None = None,
        final_errors: Iterable[ErrorCode | str] = (),
        permission: str = "",
        max_concurrency: int | None = None,
        payload_schema: Any = None,
    ) -> Callable[[_Function], _Function]:
        """Declares an action; decorates the `async def handler(context, payload)` that runs it.

        `payload` is the parsed JSON; the return value is encoded as JSON, or is `RawJson`. To fail,
        a handler raises `HandlerError`, `FatalError` or `InvalidPayload`; any other exception is a
        retryable failure. `Action` describes the arguments; `payload_schema` is a JSON Schema, as
        text or as a dict.
        """
        declared = Action(
            name=name,
            description=description,
            sync=sync,
            estimated_duration=estimated_duration,
            max_attempts=max_attempts,
            start_to_close=start_to_close,
            heartbeat_timeout=heartbeat_timeout,
            schedule_to_start=schedule_to_start,
            schedule_to_close=schedule_to_close,
            initial_backoff=initial_backoff,
            max_backoff=max_backoff,
            final_errors=codes(final_errors),
            permission=permission,
            max_concurrency=max_concurrency,
            payload_schema=schema_text(payload_schema),
        )
        return partial(self._declare, declared)

    def _declare(self, action: Action, handler: _Function) -> _Function:
        if re.fullmatch(r"[a-z][a-z0-9_.-]{0,63}", action.name) is None:
            raise ValueError(f"name: must match [a-z][a-z0-9_.-]{{0,63}}, is {action.name!r}")
        # In the protocol, 0 stands for the default.
        if action.max_attempts is not None and action.max_attempts < 1:
            raise ValueError(f"max_attempts: must be at least 1, is {action.max_attempts}")
        if action.name in self._actions:
            raise ValueError(f"name: {action.name!r} is already declared")
        is_async: bool = iscoroutinefunction(handler)
        if not is_async:
            raise TypeError(f"the handler of {action.name!r} must be an async function")
        action.to_proto()  # raises if a value is invalid
        self._actions[action.name] = action
        self._handlers[action.name] = handler
        return handler

    def run(self, grace: float = DEFAULT_GRACE) -> None:
        """Serves until SIGTERM or SIGINT, then calls `stop(grace)`; a second signal ends the grace
        period. Use it in programs that do nothing else. Raises `WorkerRefused`."""
        asyncio.run(self._run(grace))

    async def serve(self) -> None:
        """Serves until `stop` is called, and reconnects when necessary. Raises `WorkerRefused` if
        the server rejects this worker and a retry cannot succeed."""
        if self._serving:
            raise RuntimeError("a worker can serve only once")
        if not self._actions:
            raise RuntimeError("a worker needs at least one action")
        self._serving = True
        try:
            await self._connection.run()
        finally:
            self._registry.close()

    async def stop(self, grace: float = DEFAULT_GRACE) -> None:
        """Stops gracefully: stops accepting tasks, waits up to `grace` seconds for handlers,
        releases the remaining attempts (each is retried immediately from its last checkpoint),
        waits for the acknowledgments, and closes the stream."""
        self._registry.stop_accepting()
        await self._registry.wait_for_handlers(grace)
        await self._registry.release_all()
        await self._registry.wait_until_empty(_ACKNOWLEDGMENT_TIMEOUT)
        self._registry.close()

    async def _run(self, grace: float) -> None:
        serving = asyncio.ensure_future(self.serve())
        stops: list[asyncio.Task[None]] = []

        def on_signal() -> None:
            stops.append(asyncio.ensure_future(self.stop(0 if stops else grace)))

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await serving
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await asyncio.gather(*stops)

    def _hello(self) -> worker_pb2.Hello:
        return worker_pb2.Hello(
            worker_id=self.worker_id,
            version=self._version,
            sdk=_sdk(),
            slots=0 if self._registry.stopping else self._slots,
            actions=[action.to_proto() for action in self._actions.values()],
            attempts=self._registry.resumable(),
            session_secret=self._registry.session_secret,
            display_name=self._display_name,
        )


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]


def _random_id() -> str:
    return f"{_host()}-{secrets.token_hex(10)}"


def _sdk() -> str:
    try:
        return f"streamer-client (Python) {version('streamer-client')}"
    except PackageNotFoundError:
        return "streamer-client (Python)"
