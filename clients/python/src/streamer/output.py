"""Collects the output of a request, and verifies that no chunk is missing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from streamer.errors import BrokenLog
from streamer.events import Cancelled, Event, Failed, Output, Retrying, Succeeded


class OutputCollector:
    """Collects the valid chunks of a log; pass every event to `apply`, in order."""

    def __init__(self) -> None:
        self.chunks: list[Output] = []
        """Valid chunks so far."""

    def apply(self, event: Event) -> None:
        """Applies the next event: adds a chunk, or drops the chunks that a rewind makes void."""
        if isinstance(event, Output):
            self.chunks.append(event)
        elif isinstance(event, (Retrying, Failed)):
            while self.chunks and self.chunks[-1].seq > event.rewind_to_seq:
                self.chunks.pop()

    @property
    def values(self) -> list[Any]:
        """Values of the valid chunks."""
        return [chunk.value for chunk in self.chunks]

    @property
    def data(self) -> bytes:
        """Concatenated bytes of the valid chunks."""
        return b"".join(chunk.data for chunk in self.chunks)


@dataclass
class _Mark:
    """State before the first chunk of an attempt."""

    first_seq: int
    attempt: int
    chunks: int
    hash: Any = field(repr=False)


class LogVerifier:
    """Verifies a log that is read from the beginning: no event may be missing, and the output must
    match the digest in the terminal event. Stores one hash per attempt, and no chunks."""

    def __init__(self) -> None:
        self._last_seq = 0
        self._chunks = 0
        self._hash = hashlib.sha256()
        self._marks: list[_Mark] = []

    def apply(self, event: Event) -> None:
        """Verifies the next event. Raises `BrokenLog` if the log is incomplete."""
        contiguous(self._last_seq, event.seq)
        self._last_seq = event.seq
        if isinstance(event, Output):
            self._add(event)
        elif isinstance(event, (Retrying, Failed)):
            self._rewind(event.rewind_to_seq)
        if isinstance(event, (Succeeded, Failed, Cancelled)):
            self._verify(event.output.chunks, event.output.sha256)

    def skip_first(self) -> None:
        """Skips the first event, which contains no output and was replaced by an acknowledgment."""
        self._last_seq = 1

    def _add(self, chunk: Output) -> None:
        if not self._marks or self._marks[-1].attempt != chunk.attempt:
            mark = _Mark(chunk.seq, chunk.attempt, self._chunks, self._hash.copy())
            self._marks.append(mark)
        self._chunks += 1
        self._hash.update(chunk.data)

    def _rewind(self, seq: int) -> None:
        """Restores the state before the void output. A rewind always covers whole attempts."""
        while self._marks and self._marks[-1].first_seq > seq:
            mark = self._marks.pop()
            self._chunks, self._hash = mark.chunks, mark.hash

    def _verify(self, chunks: int, sha256: bytes) -> None:
        if (chunks, sha256) != (self._chunks, self._hash.digest()):
            raise BrokenLog(
                f"output mismatch: received {self._chunks} chunks with SHA-256 "
                f"{self._hash.hexdigest()}, the terminal event has {chunks} with {sha256.hex()}"
            )


def contiguous(last_seq: int, seq: int) -> None:
    """Raises `BrokenLog` if an event is missing between `last_seq` and `seq`."""
    if seq != last_seq + 1:
        raise BrokenLog(f"received event {seq} after event {last_seq}: the log must have no gaps")
