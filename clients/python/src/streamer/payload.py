"""Payloads: JSON and other bytes, which the server passes through unchanged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from streamer._proto import common_pb2

JSON = "application/json"
TEXT = "text/plain"
BYTES = "application/octet-stream"


@dataclass(frozen=True)
class RawJson:
    """JSON text that is sent unchanged. Raises ValueError if `data` is not JSON."""

    data: bytes

    def __post_init__(self) -> None:
        decode_json(self.data)


def encode_json(value: Any) -> bytes:
    """Encodes a value as JSON. Raises TypeError or ValueError if the value cannot be encoded."""
    if isinstance(value, RawJson):
        return value.data
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def decode_json(data: bytes | str) -> Any:
    """Decodes JSON; integers of any size remain exact. Raises ValueError if `data` is not JSON."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def encode_chunk(chunk: Any) -> tuple[str, bytes]:
    """Returns the content type and bytes of a chunk: text, bytes, or any other value as JSON."""
    if isinstance(chunk, str):
        return TEXT, chunk.encode()
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return BYTES, bytes(chunk)
    return JSON, encode_json(chunk)


def decode(content_type: str, data: bytes) -> Any:
    """Decodes a payload to parsed JSON, str for `text/…`, or bytes for all other types."""
    if is_json(content_type):
        return decode_json(data)
    if content_type.startswith("text/"):
        return data.decode()
    return data


def is_json(content_type: str) -> bool:
    """Returns whether a content type is JSON."""
    return content_type in ("", JSON)


def to_proto(data: bytes, content_type: str = JSON) -> common_pb2.Payload:
    """Returns a payload message that contains `data`."""
    return common_pb2.Payload(content_type=content_type, data=data)


def body(payload: common_pb2.Payload) -> bytes:
    """Returns the bytes of a payload; absent data means an empty JSON object."""
    return payload.data if payload.HasField("data") else b"{}"


def value(payload: common_pb2.Payload) -> Any:
    """Returns the decoded value of a payload."""
    return decode(payload.content_type, body(payload))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
