"""Exponential backoff with full jitter."""

from __future__ import annotations

import random


class Backoff:
    """Delays drawn uniformly between 0 and a bound that doubles with each failure."""

    def __init__(self, initial: float = 0.1, maximum: float = 10.0) -> None:
        """Takes the first and the largest bound, in seconds."""
        self._initial = initial
        self._maximum = maximum
        self._bound = initial

    def next(self) -> float:
        """Returns the next delay in seconds, and doubles the bound."""
        delay = random.uniform(0, self._bound)
        self._bound = min(self._bound * 2, self._maximum)
        return delay

    def reset(self) -> None:
        """Resets the bound after a success."""
        self._bound = self._initial
