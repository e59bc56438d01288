"""Size limits of reports, which are checked before a report is sent."""

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
    """Limits that the operator of a server can set; the defaults are those of the server."""

    max_payload_bytes: int = 4 * 1024 * 1024
    max_output_chunk_bytes: int = 1024 * 1024
    max_unacknowledged: int = 1024
    max_unacknowledged_bytes: int = 1024 * 1024

    @classmethod
    def of(cls, welcome: worker_pb2.Welcome) -> Limits:
        """Returns the limits in `welcome`, with defaults for those that it does not contain."""
        defaults = cls()
        return cls(
            welcome.max_payload_bytes or defaults.max_payload_bytes,
            welcome.max_output_chunk_bytes or defaults.max_output_chunk_bytes,
            welcome.max_unacknowledged or defaults.max_unacknowledged,
            welcome.max_unacknowledged_bytes or defaults.max_unacknowledged_bytes,
        )


def check(field: str, size: int, limit: int, limit_name: str) -> None:
    """Raises `LimitExceeded` if `size` exceeds `limit`, both in bytes."""
    if size > limit:
        raise LimitExceeded(field, size, limit, limit_name)


def truncate(text: str, limit: int) -> str:
    """Returns the longest prefix of `text` that fits in `limit` bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:limit].decode("utf-8", "ignore")
