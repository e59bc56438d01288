"""Reads a JSON object and keeps, for each member, the text that it stands as: a digest is over
those bytes, and writing a value anew would not give the same ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streamer import payload

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_NAME = re.compile(_STRING, re.DOTALL)
# What counts on the way to the end of a value: strings, as they may have brackets in them.
_MARK = re.compile(rf"{_STRING}|[{{}}\[\],]", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A member of an object."""

    text: str
    """Everything between its colon and the comma or brace after it, white space included."""

    @cached_property
    def value(self) -> Any:
        """Its value. Raises ValueError when there is none to be read."""
        return payload.decode_json(self.text)


def members(text: str) -> dict[str, Member]:
    """The members of the JSON object that `text` is. Raises ValueError when it is none. The values
    are not read before they are asked for: what is wrong with one of them is not noticed here."""
    found: dict[str, Member] = {}
    at = _expect(text, 0, "{")
    if text[at : at + 1] == "}":
        return found
    while True:
        name = _NAME.match(text, at)
        if name is None:
            raise ValueError(f"a name was expected at {at}")
        begin = _skip(text, name.end())
        if text[begin : begin + 1] != ":":
            raise ValueError(f"':' was expected at {begin}")
        end = _value_end(text, begin + 1)
        member = Member(text[begin + 1 : end])
        if not member.text.strip(" \t\n\r"):
            raise ValueError(f"a value was expected at {begin + 1}")
        found[json.loads(name.group())] = member
        if text[end] == "}":
            return found
        at = _skip(text, end + 1)


def _value_end(text: str, at: int) -> int:
    """Where the comma or the brace after a value is."""
    depth = 0
    for mark in _MARK.finditer(text, at):
        character = mark.group()
        if character in ("{", "["):
            depth += 1
        elif depth and character in ("}", "]"):
            depth -= 1
        elif not depth and character in (",", "}"):
            return mark.start()
    raise ValueError(f"the value at {at} has no end")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def _expect(text: str, at: int, character: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != character:
        raise ValueError(f"{character!r} was expected at {at}")
    return _skip(text, at + 1)
