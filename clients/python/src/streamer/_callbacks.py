"""Functions that callers hand in to hear of events."""

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
    """What to call for which events; plain or async functions, called one after the other."""

    on_progress: OnProgress | None = None
    on_output: OnOutput | None = None
    on_retry: OnRetry | None = None

    async def tell(self, event: Event) -> None:
        """Calls the function for this event, if there is one."""
        if isinstance(event, Progress):
            await _call(self.on_progress, event)
        elif isinstance(event, Output):
            await _call(self.on_output, event)
        elif isinstance(event, Retrying):
            await _call(self.on_retry, event)


async def _call(function: Callable[[Any], Any] | None, event: Event) -> None:
    if function is not None:
        outcome = function(event)
        if inspect.isawaitable(outcome):
            await outcome
