"""Payloads: JSON and other bytes, as they cross the system untouched."""

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
    """Bytes that are JSON already and go out as they are. Raises ValueError if they are not."""

    data: bytes

    def __post_init__(self) -> None:
        decode_json(self.data)


def encode_json(value: Any) -> bytes:
    """A value as JSON. Raises TypeError or ValueError for what JSON cannot write."""
    if isinstance(value, RawJson):
        return value.data
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def decode_json(data: bytes | str) -> Any:
    """The value of JSON; integers of any size stay exact. Raises ValueError if it is not JSON."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None


def encode_chunk(chunk: Any) -> tuple[str, bytes]:
    """Content type and bytes of a chunk: text, bytes, or anything else as JSON."""
    if isinstance(chunk, str):
        return TEXT, chunk.encode()
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return BYTES, bytes(chunk)
    return JSON, encode_json(chunk)


def decode(content_type: str, data: bytes) -> Any:
    """The value of a payload: parsed JSON, str for `text/…`, bytes for everything else."""
    if is_json(content_type):
        return decode_json(data)
    if content_type.startswith("text/"):
        return data.decode()
    return data


def is_json(content_type: str) -> bool:
    """Whether a content type is that of JSON."""
    return content_type in ("", JSON)


def to_proto(data: bytes, content_type: str = JSON) -> common_pb2.Payload:
    """Bytes as a payload."""
    return common_pb2.Payload(content_type=content_type, data=data)


def body(payload: common_pb2.Payload) -> bytes:
    """The bytes of a payload; absent means an empty JSON object."""
    return payload.data if payload.HasField("data") else b"{}"


def value(payload: common_pb2.Payload) -> Any:
    """The value of a payload."""
    return decode(payload.content_type, body(payload))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
