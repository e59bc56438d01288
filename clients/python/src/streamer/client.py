"""The gRPC client: submits, watches and manages requests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, final

from google.protobuf.duration_pb2 import Duration
from grpc.aio import UnaryUnaryMultiCallable

from streamer import _watch, events, model, payload
from streamer._callbacks import Callbacks, OnOutput, OnProgress, OnRetry
from streamer._channel import Calls, open_channel, parse_server
from streamer._proto import router_pb2
from streamer._retry import UNARY_TIMEOUT, RetryBudget, unary
from streamer._tokens import Token, TokenSource
from streamer.action import Action, Seconds, seconds
from streamer.errors import ServiceError, sync_failure
from streamer.events import Event
from streamer.model import Completed, Page, Request, RequestState, Submitted

Actions: TypeAlias = list[Action]

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")

# Timeout of a submission, in seconds. It is long because a sync action runs within the call.
_SUBMIT_TIMEOUT = 600.0


@final
class Client:
    """A client of one server, for any number of requests; use it as an async context manager.

    `server` is `http://host:port` or `https://host:port`; `token` is a JWT, or an async callable
    that returns a fresh one for every call. While the server cannot be reached, calls that are safe
    to repeat are retried with full jitter, for `retry_for` seconds (None means no limit). Every
    method raises `ServiceError` if the server rejects the call or cannot be reached.
    """

    def __init__(self, server: str, token: Token, *, retry_for: float | None = 60.0) -> None:
        self._channel = open_channel(parse_server(server))
        self._calls = Calls(self._channel)
        self._tokens = TokenSource(token)
        self._retry_for = retry_for

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the client. Pending calls raise `ServiceError`; submitted requests continue."""
        self._calls.closed = True
        await self._channel.close()

    async def submit(
        self,
        action: str,
        payload: Any = None,
        *,
        id: str | None = None,
        wait: Seconds | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        deadline: datetime | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Submitted:
        """Submits a request for an action. A request for a sync action has its result on return. A
        request for an async action is durable on return, and has its result if it ends within
        `wait` (at most 300 s).

        `payload` is a JSON-encodable value or `RawJson`; None means `{}`. `id` is the idempotency
        and correlation key: the same `id` returns the same request. A call with an `id` is safe to
        repeat, and is retried while the server cannot be reached.

        The following arguments apply to async actions only. `priority` is from 0 to 9; requests
        with a higher priority run first. The request starts after `delay` at the earliest, and
        fails without being run if it has not started by `deadline`. `metadata` is stored with the
        request.
        """
        request = router_pb2.SubmitRequest(id=id or "", action=action, priority=priority)
        _fill(request, payload, metadata, wait, delay)
        if deadline is not None:
            request.deadline.CopyFrom(model.timestamp(deadline))
        timeout = _SUBMIT_TIMEOUT + (0 if wait is None else seconds(wait))
        response = await self._unary(
            self._calls.submit, request, repeat=id is not None, timeout=timeout
        )
        return model.submitted(response)

    async def run(
        self,
        action: str,
        payload: Any = None,
        *,
        on_progress: OnProgress | None = None,
        on_output: OnOutput | None = None,
        on_retry: OnRetry | None = None,
        id: str | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        deadline: datetime | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Submits a request, watches it until it ends, and returns its result.

        Callbacks may be plain or async functions. `on_retry` is called when an attempt fails and
        another follows: chunks with a `seq` greater than `rewind_to_seq` are void, and are produced
        again. Cancelling this call does not cancel the request. Raises `RequestFailed`,
        `RequestCancelled`, and `BrokenLog` if events or output are missing.
        """
        request_id = id or uuid.uuid4().hex
        try:
            submitted = await self.submit(
                action,
                payload,
                id=request_id,
                priority=priority,
                delay=delay,
                deadline=deadline,
                metadata=metadata,
            )
        except ServiceError as error:
            raise sync_failure(error, request_id) from error
        if submitted.completed is not None and submitted.completed.output is None:
            return submitted.completed.unwrap()
        callbacks = Callbacks(on_progress, on_output, on_retry)
        async for event in self.watch(submitted.uid):
            await callbacks.notify(event)
            if isinstance(event, events.Terminal):
                ended = events.completed(event, submitted.request_id, submitted.uid)
                return ended.unwrap()
        raise AssertionError("a watch ends with a terminal event")

    def watch(self, request_id: str, after_seq: int = 0) -> AsyncGenerator[Event, None]:
        """Yields the events of a request after `after_seq`, past and future, up to the terminal
        event.

        A lost stream is reopened after the last event, with full jitter. Raises `BrokenLog` if an
        event is missing or, when all events are read (`after_seq` 0), if the output does not match
        the digest in the terminal event. Closing the iterator does not cancel the request.
        """
        budget = RetryBudget(self._retry_for)
        return _watch.watch(self._calls, self._tokens, budget, request_id, after_seq)

    async def wait(self, request_id: str) -> Completed:
        """Waits until a request ends, without a time limit, and returns its result or failure."""
        budget = RetryBudget(self._retry_for)
        return await _watch.wait(self._calls, self._tokens, budget, request_id)

    async def get(self, request_id: str) -> Request:
        """Returns a request, with its payload and result."""
        request = router_pb2.GetRequest(request_id=request_id)
        response = await self._unary(self._calls.get, request, repeat=True)
        return model.request(response.request)

    async def list(
        self,
        *,
        states: Iterable[RequestState | str] = (),
        action: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> Page:
        """Returns a page of the caller's requests (with permission `requests:read`, of all requests
        of the tenant), newest first, without payloads and results. `page_size` is 1 to 500;
        0 selects the default of 50."""
        request = router_pb2.ListRequest(
            states=[model.state_to_proto(RequestState(state)) for state in states],
            action=action,
            page_size=page_size,
            page_token=page_token,
        )
        response = await self._unary(self._calls.list, request, repeat=True)
        return Page([model.request(one) for one in response.requests], response.next_page_token)

    async def cancel(self, request_id: str, reason: str = "") -> Request:
        """Requests cancellation. A queued request is cancelled immediately, a running request when
        its handler stops: check the returned `state`. Cancelling a request that has ended has no
        effect."""
        request = router_pb2.CancelRequest(request_id=request_id, reason=reason)
        response = await self._unary(self._calls.cancel, request, repeat=True)
        return model.request(response.request)

    async def redrive(self, request_id: str, *, id: str | None = None) -> Request:
        """Submits a failed or cancelled request again, as a new request with the given `id`."""
        request = router_pb2.RedriveRequest(request_id=request_id, id=id or "")
        response = await self._unary(self._calls.redrive, request, repeat=id is not None)
        return model.request(response.request)

    async def actions(self) -> Actions:
        """Returns the actions that can be requested, ordered by name."""
        response = await self._unary(
            self._calls.list_actions, router_pb2.ListActionsRequest(), repeat=True
        )
        return [Action.from_proto(action) for action in response.actions]

    async def _unary(
        self,
        call: UnaryUnaryMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        *,
        repeat: bool,
        timeout: float = UNARY_TIMEOUT,
    ) -> _ResponseT:
        budget = RetryBudget(self._retry_for)
        return await unary(
            self._calls, call, request, self._tokens, budget, repeat=repeat, timeout=timeout
        )


def _fill(
    request: router_pb2.SubmitRequest,
    content: Any,
    metadata: dict[str, Any] | None,
    wait: Seconds | None,
    delay: Seconds | None,
) -> None:
    if content is not None:
        request.payload.CopyFrom(payload.to_proto(payload.encode_json(content)))
    if metadata is not None:
        request.metadata.CopyFrom(payload.to_proto(payload.encode_json(metadata)))
    if wait is not None:
        request.wait.CopyFrom(_duration(wait))
    if delay is not None:
        request.delay.CopyFrom(_duration(delay))


def _duration(length: Seconds) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds(length)))
    return duration
