"""Reads a JSON object and keeps, for each member, the text that it stands as: a digest is over
those bytes, and writing a value anew would not give the same ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Member:
    """A member of an object: its value, and its text."""

    value: Any
    text: str


def members(text: str) -> dict[str, Member]:
    """The members of the JSON object that `text` is. Raises ValueError when it is none."""
    found: dict[str, Member] = {}
    at = _expect(text, 0, "{")
    if text[at : at + 1] == "}":
        return found
    while True:
        if text[at : at + 1] != '"':
            raise ValueError(f"a name was expected at {at}")
        name, at = _DECODER.raw_decode(text, at)
        begin = _expect(text, at, ":")
        value, end = _DECODER.raw_decode(text, begin)
        found[name] = Member(value, text[begin:end])
        at = _skip(text, end)
        if text[at : at + 1] == "}":
            return found
        at = _expect(text, at, ",")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def _expect(text: str, at: int, character: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != character:
        raise ValueError(f"{character!r} was expected at {at}")
    return _skip(text, at + 1)
