"""The sizes that bound what a handler reports, checked before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from streamer._proto import worker_pb2
from streamer.errors import LimitExceeded

MAX_PROGRESS_MESSAGE_BYTES = 4096
MAX_PROGRESS_METADATA_BYTES = 64 * 1024
MAX_CHECKPOINT_BYTES = 256 * 1024
MAX_CONTENT_TYPE_BYTES = 255
MAX_REASON_BYTES = 1024
MAX_ERROR_MESSAGE_BYTES = 4096
MAX_ERROR_DETAILS_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """The limits that the operator of a server sets; the defaults are the server's."""

    max_payload_bytes: int = 4 * 1024 * 1024
    max_output_chunk_bytes: int = 1024 * 1024
    max_unacknowledged: int = 1024
    max_unacknowledged_bytes: int = 1024 * 1024

    @classmethod
    def of(cls, welcome: worker_pb2.Welcome) -> Limits:
        """Those that a server tells."""
        standard = cls()
        return cls(
            welcome.max_payload_bytes or standard.max_payload_bytes,
            welcome.max_output_chunk_bytes or standard.max_output_chunk_bytes,
            welcome.max_unacknowledged or standard.max_unacknowledged,
            welcome.max_unacknowledged_bytes or standard.max_unacknowledged_bytes,
        )


def check(field: str, size: int, limit: int, limit_name: str) -> None:
    """Raises `LimitExceeded` when `size` is more than `limit`, both in bytes."""
    if size > limit:
        raise LimitExceeded(field, size, limit, limit_name)


def shorten(text: str, limit: int) -> str:
    """The beginning of `text` that fits `limit` bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:limit].decode("utf-8", "ignore")
