"""Callbacks for the events of a request."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from streamer.events import Event, Output, Progress, Retrying

OnProgress: TypeAlias = "Callable[[Progress], Awaitable[None] | None]"
OnOutput: TypeAlias = "Callable[[Output], Awaitable[None] | None]"
OnRetry: TypeAlias = "Callable[[Retrying], Awaitable[None] | None]"


@dataclass(frozen=True)
class Callbacks:
    """Callbacks by type of event: plain or async functions, which are called one at a time."""

    on_progress: OnProgress | None = None
    on_output: OnOutput | None = None
    on_retry: OnRetry | None = None

    async def notify(self, event: Event) -> None:
        """Calls the callback for the type of `event`, if one is set."""
        if isinstance(event, Progress):
            await _call(self.on_progress, event)
        elif isinstance(event, Output):
            await _call(self.on_output, event)
        elif isinstance(event, Retrying):
            await _call(self.on_retry, event)


async def _call(function: Callable[[Any], Any] | None, event: Event) -> None:
    if function is not None:
        returned = function(event)
        if inspect.isawaitable(returned):
            await returned
