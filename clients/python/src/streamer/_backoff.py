"""Waits between tries, with full jitter."""

from __future__ import annotations

import random


class Backoff:
    """Evenly drawn between 0 and a bound that doubles with each failure up to a maximum."""

    def __init__(self, initial: float = 0.1, maximum: float = 10.0) -> None:
        """Both in seconds."""
        self._initial = initial
        self._maximum = maximum
        self._bound = initial

    def next(self) -> float:
        """How long to wait now, in seconds; the bound doubles."""
        wait = random.uniform(0, self._bound)
        self._bound = min(self._bound * 2, self._maximum)
        return wait

    def reset(self) -> None:
        """It worked: the bound begins anew."""
        self._bound = self._initial
