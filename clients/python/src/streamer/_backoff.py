"""Exponential backoff with full jitter."""

from __future__ import annotations

import random


class Backoff:
    """Generates delays, drawn uniformly between 0 and a bound that doubles with each failure."""

    def __init__(self, initial: float = 0.1, maximum: float = 10.0) -> None:
        """`initial` and `maximum` are the initial and the maximum bound, in seconds."""
        self._initial = initial
        self._maximum = maximum
        self._bound = initial

    def next(self) -> float:
        """Returns the next delay in seconds, and doubles the bound up to the maximum."""
        delay = random.uniform(0, self._bound)
        self._bound = min(self._bound * 2, self._maximum)
        return delay

    def reset(self) -> None:
        """Resets the bound to its initial value after a success."""
        self._bound = self._initial
