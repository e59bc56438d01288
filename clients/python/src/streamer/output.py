"""A request's output: which chunks are valid, and the proof that they are all there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from streamer.errors import BrokenLog
from streamer.events import Cancelled, Event, Failed, Output, Retrying, Succeeded


class OutputCollector:
    """Keeps the valid chunks of a log: feed it every event, in order."""

    def __init__(self) -> None:
        self.chunks: list[Output] = []
        """The valid chunks so far."""

    def apply(self, event: Event) -> None:
        """Takes in the next event: a chunk is added, a rewind drops what it voids."""
        if isinstance(event, Output):
            self.chunks.append(event)
        elif isinstance(event, (Retrying, Failed)):
            while self.chunks and self.chunks[-1].seq > event.rewind_to_seq:
                self.chunks.pop()

    @property
    def values(self) -> list[Any]:
        """The values of the valid chunks."""
        return [chunk.value for chunk in self.chunks]

    @property
    def data(self) -> bytes:
        """The bytes of the valid chunks, one after the other."""
        return b"".join(chunk.data for chunk in self.chunks)


@dataclass
class _Mark:
    """How it stood before an attempt's first chunk."""

    first_seq: int
    attempt: int
    chunks: int
    hash: Any = field(repr=False)


class LogVerifier:
    """Checks a log that is read from its beginning: no event may be missing, and the output must be
    the one that the terminal event proves. It keeps no chunks, one hash an attempt."""

    def __init__(self) -> None:
        self._last_seq = 0
        self._chunks = 0
        self._hash = hashlib.sha256()
        self._marks: list[_Mark] = []

    def apply(self, event: Event) -> None:
        """Takes in the next event. Raises `BrokenLog`."""
        contiguous(self._last_seq, event.seq)
        self._last_seq = event.seq
        if isinstance(event, Output):
            self._add(event)
        elif isinstance(event, (Retrying, Failed)):
            self._rewind(event.rewind_to_seq)
        if isinstance(event, (Succeeded, Failed, Cancelled)):
            self._prove(event.output.chunks, event.output.sha256)

    def skip_first(self) -> None:
        """The first event, which tells nothing of the output, is known without having been read."""
        self._last_seq = 1

    def _add(self, chunk: Output) -> None:
        if not self._marks or self._marks[-1].attempt != chunk.attempt:
            mark = _Mark(chunk.seq, chunk.attempt, self._chunks, self._hash.copy())
            self._marks.append(mark)
        self._chunks += 1
        self._hash.update(chunk.data)

    def _rewind(self, seq: int) -> None:
        """An attempt's output is void as a whole, so that marks at their beginnings are enough."""
        while self._marks and self._marks[-1].first_seq > seq:
            mark = self._marks.pop()
            self._chunks, self._hash = mark.chunks, mark.hash

    def _prove(self, chunks: int, sha256: bytes) -> None:
        if (chunks, sha256) != (self._chunks, self._hash.digest()):
            raise BrokenLog(
                f"the output received is not the request's: {self._chunks} chunks with SHA-256 "
                f"{self._hash.hexdigest()}, where the terminal event proves {chunks} with "
                f"{sha256.hex()}"
            )


def contiguous(last_seq: int, seq: int) -> None:
    """Raises `BrokenLog` when an event is missing between the two."""
    if seq != last_seq + 1:
        raise BrokenLog(f"event {seq} came after event {last_seq}: the log must have no gaps")
