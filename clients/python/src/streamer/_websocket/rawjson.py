"""Parses a JSON object and keeps the source text of each member. The digest of the output is
computed over the source text; encoding a parsed value again may yield different text."""

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
# Tokens that determine the end of a value; includes strings, because they may contain brackets.
_MARK = re.compile(rf"{_STRING}|[{{}}\[\],]", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """Member of a JSON object, whose value is parsed on first use."""

    text: str
    """Source text between the colon and the comma or brace that follows, with white space."""

    @cached_property
    def value(self) -> Any:
        """Parsed value. Raises ValueError if the text is not valid JSON."""
        return payload.decode_json(self.text)


def members(text: str) -> dict[str, Member]:
    """Returns the members of the JSON object in `text`. Raises ValueError if it is not an object.
    Values are parsed lazily: an invalid value raises ValueError when it is read."""
    found: dict[str, Member] = {}
    at = _expect(text, 0, "{")
    if text[at : at + 1] == "}":
        return found
    while True:
        name = _NAME.match(text, at)
        if name is None:
            raise ValueError(f"expected a name at {at}")
        begin = _skip(text, name.end())
        if text[begin : begin + 1] != ":":
            raise ValueError(f"expected ':' at {begin}")
        end = _value_end(text, begin + 1)
        member = Member(text[begin + 1 : end])
        if not member.text.strip(" \t\n\r"):
            raise ValueError(f"expected a value at {begin + 1}")
        found[json.loads(name.group())] = member
        if text[end] == "}":
            return found
        at = _skip(text, end + 1)


def _value_end(text: str, at: int) -> int:
    """Returns the position of the comma or brace after a value."""
    depth = 0
    for mark in _MARK.finditer(text, at):
        character = mark.group()
        if character in ("{", "["):
            depth += 1
        elif depth and character in ("}", "]"):
            depth -= 1
        elif not depth and character in (",", "}"):
            return mark.start()
    raise ValueError(f"the value at {at} is not terminated")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def _expect(text: str, at: int, character: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != character:
        raise ValueError(f"expected {character!r} at {at}")
    return _skip(text, at + 1)
